"""A device in memory that answers vfio-user requests, for the tests of the gateway."""

import contextlib
import errno
import struct

from sync.registers.record import Access, Op
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    HEADER,
    Capabilities,
    Command,
    DataSize,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureIndex,
    IrqInfo,
    IrqInfoRequest,
    LoggingControl,
    LoggingReport,
    MigData,
    MigrationFlags,
    MigrationState,
    MigState,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    RegionInfoRequest,
    Version,
    VfioUserError,
    WriteMulti,
    WriteMultiReply,
    encode_message,
)

PAGE = 4096
SELECTOR, BANKED = 0x10, 0x14
"""Registers of the model: what is at BANKED depends on what was written to SELECTOR."""
COUNTER = 0x20
"""Every read of it gives one more."""


class Registers:
    """One BAR of 4 KiB with a selector and a counter, and a configuration space. Both devices of
    these tests are made of it. `log` has every access in the order of execution."""

    def __init__(self) -> None:
        self.bar = bytearray(4096)
        self.config = bytearray(
            struct.pack("<HHIBBBBIIII", 0x1AF4, 0x1042, 0, 1, 0, 0, 1, 0, 0, 0, 0)
        )
        self.config += bytes(256 - len(self.config))
        self.banks: dict[int, bytes] = {}
        self.counter = 0
        self.log: list[Access] = []
        self.refuse_offsets: set[int] = set()

    def read(self, region: int, offset: int, count: int) -> bytes:
        if offset in self.refuse_offsets:
            self.log.append(Access(Op.READ, region, offset, count, b"", failed=True))
            raise VfioUserError(errno.EIO)
        data = bytes(self._space(region)[offset : offset + count]).ljust(count, b"\0")
        if region == 0 and (offset, count) == (COUNTER, 4):
            self.counter += 1
            data = self.counter.to_bytes(4, "little")
        if region == 0 and (offset, count) == (BANKED, 4):
            data = self.banks.get(self._selected(), bytes(4))
        self.log.append(Access(Op.READ, region, offset, count, data))
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        failed = offset in self.refuse_offsets
        self.log.append(Access(Op.WRITE, region, offset, len(data), data, failed))
        if failed:
            raise VfioUserError(errno.EIO)
        if region == 0 and (offset, len(data)) == (BANKED, 4):
            self.banks[self._selected()] = data
        space = self._space(region)
        space[offset : offset + len(data)] = data

    def reset(self) -> None:
        self.log.append(Access(Op.RESET, 0, 0, 0))
        self.bar[:] = bytes(4096)
        self.banks.clear()

    def _selected(self) -> int:
        return int.from_bytes(self.bar[SELECTOR : SELECTOR + 4], "little")

    def _space(self, region: int) -> bytearray:
        return self.config if region == 7 else self.bar


_OF_MIGRATION = (
    FeatureIndex.MIGRATION,
    FeatureIndex.MIG_DEVICE_STATE,
    FeatureIndex.MIG_DATA_SIZE,
)


class DeviceFeatures:
    """Migration states and a DMA log, each if wanted."""

    def __init__(self, *, v2: bool = False, logging: bool = False) -> None:
        self.v2 = v2
        self.logging = logging
        self.state = MigrationState.RUNNING
        self.state_data = b""
        self.loaded = b""
        self.log_page = 0
        self.log_pages_of = PAGE
        self.logged: set[int] = set()
        """Addresses of written pages of `log_page` bytes, while logging is on."""
        self.refuse: set[int] = set()

    def wrote(self, address: int, count: int) -> None:
        """The device has written guest memory through its own mapping."""
        if self.log_page:
            for page in range(address // self.log_page, (address + count - 1) // self.log_page + 1):
                self.logged.add(page * self.log_page)

    def handle(self, request: Feature) -> bytes:
        index = request.index
        wanted = self.v2 if index in _OF_MIGRATION else self.logging
        if not wanted or index in self.refuse:
            raise VfioUserError(errno.ENOTSUP)
        if request.is_probe:
            return b""
        if index == FeatureIndex.MIGRATION:
            return MigrationFlags(5).pack()
        if index == FeatureIndex.MIG_DEVICE_STATE:
            if request.is_set:
                self.state = MigState.unpack(request.data).device_state
            return MigState(self.state).pack()
        if index == FeatureIndex.MIG_DATA_SIZE:
            return DataSize(len(self.state_data)).pack()
        if index == FeatureIndex.DMA_LOGGING_START:
            if self.log_page:
                raise VfioUserError(errno.EBUSY)
            control = LoggingControl.unpack(request.data)
            self.log_page = max(control.page_size, self.log_pages_of)
            return LoggingControl(self.log_page, control.ranges).pack()
        if index == FeatureIndex.DMA_LOGGING_STOP:
            self.log_page = 0
            self.logged.clear()
            return b""
        return self._report(LoggingReport.unpack(request.data))

    def _report(self, report: LoggingReport) -> bytes:
        if not self.log_page:
            raise VfioUserError(errno.EINVAL)
        bits = 0
        end = report.iova + report.length
        for address in list(self.logged):
            if address < end and address + self.log_page > report.iova:
                self.logged.discard(address)
                low = max(address, report.iova) - report.iova
                high = min(address + self.log_page, end) - report.iova
                for page in range(low // report.page_size, (high - 1) // report.page_size + 1):
                    bits |= 1 << page
        bitmap = bits.to_bytes(report.bitmap_bytes, "little")
        return LoggingReport(report.iova, report.length, report.page_size, bitmap).pack()


class ModelDevice:
    """A device that speaks vfio-user messages, one at a time, when it is told to."""

    def __init__(self, *, v2: bool = False, logging: bool = False) -> None:
        self.registers = Registers()
        self.features = DeviceFeatures(v2=v2, logging=logging)
        self.mapped: dict[int, tuple[DmaMap, bool]] = {}
        """By address: the request, and whether a descriptor came with it."""
        self.commands: list[int] = []
        self.refuse: dict[int, int] = {}
        self.capabilities = Capabilities(max_msg_fds=16, write_multiple=True)

    def execute(self, message: bytes, n_descriptors: int) -> bytes:
        """Executes a message; returns the reply, or nothing to a posted one."""
        message_id, command, _size, flags, _ = HEADER.unpack_from(message)
        self.commands.append(command)
        try:
            if command in self.refuse:
                raise VfioUserError(self.refuse[command])
            body = self._execute(command, message[HEADER.size :], n_descriptors)
        except ProtocolError:
            reply = encode_message(message_id, command, reply=True, error=errno.EINVAL)
        except VfioUserError as error:
            reply = encode_message(message_id, command, reply=True, error=error.errno)
        else:
            reply = encode_message(message_id, command, body, reply=True)
        return b"" if flags & FLAG_NO_REPLY else reply

    def _execute(self, command: int, body: bytes, n_descriptors: int) -> bytes:
        if command == Command.VERSION:
            return Version(capabilities=self.capabilities).pack()
        if command == Command.DEVICE_GET_INFO:
            return DeviceInfo(3, 9, 5).pack()
        if command == Command.DEVICE_GET_REGION_INFO:
            index = RegionInfoRequest.unpack(body).index
            flags = 7 if index == 0 else 3
            return RegionInfo(index, flags, 256 if index == 7 else 4096).pack()
        if command == Command.DEVICE_GET_IRQ_INFO:
            index = IrqInfoRequest.unpack(body).index
            return IrqInfo(index, 1, 4 if index == 2 else 1).pack()
        if command == Command.DEVICE_SET_IRQS:
            return b""
        if command == Command.REGION_READ:
            access = RegionAccess.unpack(body)
            data = self.registers.read(access.region, access.offset, access.count)
            return RegionAccess(access.offset, access.region, access.count, data).pack()
        if command == Command.REGION_WRITE:
            access = RegionAccess.unpack(body)
            self.registers.write(access.region, access.offset, access.data)
            return RegionAccess(access.offset, access.region, access.count).pack()
        if command == Command.REGION_WRITE_MULTI:
            writes = WriteMulti.unpack(body).writes
            done = 0
            with contextlib.suppress(VfioUserError):
                for write in writes:
                    self.registers.write(write.region, write.offset, write.data)
                    done += 1
            return WriteMultiReply(done).pack()
        if command == Command.DEVICE_RESET:
            self.registers.reset()
            return b""
        if command == Command.DMA_MAP:
            request = DmaMap.unpack(body)
            if request.address in self.mapped:
                raise VfioUserError(errno.EEXIST)
            self.mapped[request.address] = (request, n_descriptors > 0)
            return b""
        if command == Command.DMA_UNMAP:
            unmap = DmaUnmap.unpack(body)
            if unmap.flags:
                self.mapped.clear()
            elif self.mapped.pop(unmap.address, None) is None:
                raise VfioUserError(errno.EINVAL)
            return body
        if command == Command.DEVICE_FEATURE:
            feature = Feature.unpack(body)
            data = self.features.handle(feature)
            return Feature(feature.flags, data).pack()
        if command == Command.MIG_DATA_READ:
            size = MigData.unpack(body).size
            state = self.features
            part, state.state_data = state.state_data[:size], state.state_data[size:]
            return MigData(len(part), part).pack()
        if command == Command.MIG_DATA_WRITE:
            self.features.loaded += MigData.unpack(body).data
            return b""
        raise VfioUserError(errno.ENOTSUP)
