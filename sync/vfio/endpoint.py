"""A function of the host as a vfio-user device, in the gateway's own process.

Owns the answer to each command. Takes the place of a connection to a device
(`sync.gateway.datapath.peer.Peer`): a command is executed when it is sent, its reply is handed over
by the next `flush`. So a register access wakes one process, not two.

What may take long (a walk, a device that comes to rest) is done in turns, one for each `receive`;
`fileno` is readable until it is done. Meanwhile the VMM's accesses, interrupts and memory are
served; other steps of a migration wait for it, and a reset ends it.

Source: vfio-user specification.
"""

import contextlib
import errno
import hashlib
import os
import select
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sync.errors import SyncError
from sync.queues.choose import find_class, load_classes
from sync.queues.errors import CannotMove
from sync.queues.interface import DeviceClass
from sync.registers.errors import RegisterError
from sync.registers.profile.locate import DeviceView
from sync.vfio.device import VfioDevice
from sync.vfio.dma_log import DmaLog, log_of
from sync.vfio.errors import MemoryNotPinned, VfioError
from sync.vfio.executor import DEADLINE_S, Executor, Work
from sync.vfio.guest_memory import PinnedMemory, close_all
from sync.vfio.interrupts import FunctionInterrupts
from sync.vfio.native_migration import NativeMigration, supported
from sync.vfio.queue_migration import QueueMigration
from sync.vfio.sysfs import PciFunction
from sync.vfio.user_device import UserDevice
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    HEADER,
    HEADER_BYTES,
    MAJOR,
    MINOR,
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    Capabilities,
    Command,
    DataSize,
    DeviceFlags,
    DeviceInfo,
    Disconnected,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureIndex,
    IrqFlags,
    IrqInfo,
    IrqInfoRequest,
    LoggingControl,
    LoggingReport,
    MigData,
    MigrationFlags,
    MigrationState,
    MigrationSupport,
    MigState,
    PciIrq,
    PciRegion,
    ProtocolError,
    RegionAccess,
    RegionFlags,
    RegionInfo,
    RegionInfoRequest,
    SetIrqs,
    UnmapFlags,
    Version,
    VfioUserError,
    WriteMulti,
    WriteMultiReply,
    encode_message,
)

OFFER = Capabilities(max_msg_fds=16, write_multiple=True)
"""QEMU refuses a device that takes more descriptors in a message."""
BY_IOMMUFD = "iommufd:"
MAX_TOLD_CHARACTERS = 32768
_LOGGING = (
    FeatureIndex.DMA_LOGGING_START,
    FeatureIndex.DMA_LOGGING_STOP,
    FeatureIndex.DMA_LOGGING_REPORT,
)
_ACCESSES = (Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI)
_STEPS = (Command.DEVICE_FEATURE, Command.MIG_DATA_READ, Command.MIG_DATA_WRITE)
"""Of a migration: each begins when what came before it is done."""
_TOLD = {
    PciIrq.ERR: "it reported an error (PCI Express AER): the host's kernel log says which",
    PciIrq.REQ: "the host wants it back (an unbind or a removal waits for its release)",
}
Handler = Callable[[int, int, int, int, memoryview, list[int]], None]
Answer = bytes | Work[bytes]


@dataclass(frozen=True, slots=True)
class _Asked:
    message_id: int
    command: int
    wants_reply: bool
    body: bytes
    fds: list[int]


class HostEndpoint:
    """`device` is owned. `log` takes an event and its fields. Until the device has told what it is,
    every command waits."""

    patience_s = DEADLINE_S
    """A device may take as long until it is ready to tell."""

    def __init__(
        self,
        device: VfioDevice | UserDevice,
        log: Callable[..., None],
        classes: tuple[DeviceClass, ...] | None = None,
    ) -> None:
        self.handler: Handler = _nobody
        self.backlog_bytes = 0
        self.short = self.wants_write = False
        self.reason = ""
        """Why the command is refused whose reply is being handed over: the wire has no words."""
        self._device = device
        self._log = log
        self._replies: deque[tuple[_Asked, int, str, bytes]] = deque()
        self._waiting: deque[_Asked] = deque()
        self._under_way: tuple[_Asked | None, Work[bytes]] | None = None
        self._troubles: dict[PciIrq, str] = {}
        """What the kernel has told of the function, and keeps it from moving."""
        self._memory = PinnedMemory(device)
        device.reset()
        device.set_bus_master(True)
        self._irqs = FunctionInterrupts(device)
        self._turn = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._readable = select.epoll()
        for fd in (self._turn, *self._irqs.told):
            self._readable.register(fd, select.EPOLLIN)
        if isinstance(device, UserDevice):
            self._readable.register(device.fileno(), select.EPOLLIN)
        self._executor = Executor(device, self._irqs.signal_vector)
        self._migration: QueueMigration | NativeMigration | None = None
        self._queues: QueueMigration | None = None
        """The migration, if it is made of queues."""
        self._dma_log = log_of(device) if isinstance(device, VfioDevice) else None
        self._handlers: dict[int, Callable[[bytes, list[int]], Answer]] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._write_multi,
            Command.DEVICE_RESET: self._reset,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._migration_read,
            Command.MIG_DATA_WRITE: self._migration_write,
        }

        self._begin(None, self._find_migration(load_classes() if classes is None else classes))

    def _find_migration(self, classes: tuple[DeviceClass, ...]) -> Work[bytes]:
        device = self._device
        native = supported(device) if isinstance(device, VfioDevice) else MigrationSupport(0)
        found = find_class(self._view(), classes)
        if isinstance(device, VfioDevice) and MigrationSupport.STOP_COPY in native:
            self._migration = NativeMigration(device, native)
        elif found is not None:
            executor = self._executor
            executor.quiet_interrupts()
            unfenced = ""
            try:
                inventory = yield from executor.work(found.inventory())
                unfenced = found.unfenced(inventory)
                self._migration = self._queues = QueueMigration(
                    found, inventory, executor, self._device, self._memory, self._irqs.restore
                )
            except SyncError as error:
                self._log("device-cannot-move", reason=str(error))
                executor.drop_scratch()
            if unfenced and isinstance(device, VfioDevice):
                raise VfioError(unfenced)
            if self._device.vectors.get(PciIrq.MSIX):
                self._device.disable_irqs(PciIrq.MSIX)
        self._device.reset()
        self._device.set_bus_master(False)
        return b""

    def _view(self) -> DeviceView:
        config = self._device.read(PciRegion.CONFIG, 0, 64)

        def word(at: int) -> int:
            return int.from_bytes(config[at : at + 2], "little")

        sizes = {index: region.size for index, region in self._device.regions.items()}
        class_code = int.from_bytes(config[9:12], "little")
        return DeviceView(word(0), word(2), word(0x2C), word(0x2E), class_code, config, sizes)

    # What the gateway's loop asks of a connection.

    @property
    def local(self) -> "HostEndpoint":
        """It is in this process."""
        return self

    def fileno(self) -> int:
        """Readable when there is something to be done, or a device process is gone."""
        return self._readable.fileno()

    def receive(self) -> None:
        """Do one turn of what is under way. Raises `Disconnected`."""
        for fd, _ in self._readable.poll(0):
            if fd in self._irqs.told:
                kind = self._irqs.hear(fd)
                self._troubles[kind] = _TOLD[kind]
                self._log("device-trouble", reason=_TOLD[kind])
            elif fd != self._turn:
                raise Disconnected("the device is gone")
        self._take_turn()

    @property
    def pin_ns_per_page(self) -> float:
        """What it took to show the device a page of guest memory."""
        return self._memory.pin_ns_per_page

    @property
    def holds(self) -> Mapping[str, str]:
        """What the device told of itself, as far as it can be told in a status."""
        told = self._migration.holds if self._migration is not None else {}
        if sum(len(name) + len(text) for name, text in told.items()) <= MAX_TOLD_CHARACTERS:
            return told
        digest = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()
        return {f"{len(told)} properties": digest}

    @property
    def tracks_writes(self) -> bool:
        """Whether what the device writes follows from its queues."""
        return self._queues is not None and self._queues.tracks_writes

    def start_tracking(self) -> None:
        if self._queues is not None:
            self._queues.start_tracking()

    def take_written(self) -> list[int]:
        return self._queues.take_written() if self._queues is not None else []

    def stop_tracking(self) -> None:
        if self._queues is not None:
            self._queues.stop_tracking()

    def relic(self, *, only_if_it_went_on: bool = False) -> bytes:
        """The device is gone: the state stream from which another process of it goes on, or nothing
        if there can be none. `only_if_it_went_on`: it is not the first that the guest has."""
        queues = self._queues
        if queues is None or (only_if_it_went_on and not queues.went_on):
            return b""
        try:
            return queues.lost()
        except SyncError as error:
            self._log("device-cannot-move", reason=str(error))
            return b""

    def drain(self) -> None:
        """There is nothing that waits."""

    def send(
        self, message: bytes | bytearray | memoryview, descriptors: Sequence[int] = ()
    ) -> None:
        """Execute a command, or begin to. Owns `descriptors`."""
        message_id, command, _, flags, _ = HEADER.unpack_from(message)
        body = bytes(message[HEADER_BYTES:])
        asked = _Asked(message_id, command, not flags & FLAG_NO_REPLY, body, list(descriptors))
        under_way = self._under_way
        if under_way is not None and (under_way[0] is None or command in _STEPS):
            self._waiting.append(asked)
            return
        if command == Command.DEVICE_RESET:
            self._break_off()
        self._execute(asked)

    def flush(self) -> None:
        """Hand over the replies, also to what is sent meanwhile. Raises `Disconnected`."""
        while self._replies:
            if isinstance(self._device, UserDevice) and self._device.lost:
                raise Disconnected("the device is gone")
            asked, error, self.reason, body = self._replies.popleft()
            reply = encode_message(asked.message_id, asked.command, body, reply=True, error=error)
            flags = HEADER.unpack_from(reply)[3]
            message = memoryview(bytearray(reply))
            self.handler(asked.message_id, asked.command, flags, error, message, [])

    def close(self) -> None:
        """Take all memory away, and let go of the function."""
        if self._under_way is not None:
            self._under_way[1].close()
        for asked in self._waiting:
            close_all(asked.fds)
        with contextlib.suppress(VfioError):
            self._executor.drop_scratch()
            self._memory.close()
        if isinstance(self._migration, NativeMigration):
            self._migration.close()
        self._irqs.close()
        self._device.close()
        self._readable.close()
        os.close(self._turn)

    # Executing, at once or in turns.

    def _execute(self, asked: _Asked) -> None:
        try:
            handler = self._handlers.get(asked.command)
            if handler is None:
                raise VfioUserError(errno.ENOTSUP)
            answer = handler(asked.body, asked.fds)
        except Exception as error:
            self._refuse(asked, error)
        else:
            if isinstance(answer, Generator):
                self._begin(asked, answer)
            else:
                self._reply(asked, answer)
        finally:
            close_all(asked.fds)

    def _begin(self, asked: _Asked | None, work: Work[bytes]) -> None:
        self._under_way = asked, work
        os.eventfd_write(self._turn, 1)

    def _take_turn(self) -> None:
        if self._under_way is None:
            return
        asked, work = self._under_way
        try:
            # What waits for the device holds up what came meanwhile for no longer than this.
            time.sleep(next(work))
            return
        except StopIteration as end:
            self._end()
            if asked is not None:
                self._reply(asked, end.value)
        except Exception as error:
            self._end()
            if asked is None:
                raise Disconnected(f"the device cannot be made ready: {error}") from error
            self._refuse(asked, error)
        while self._waiting and self._under_way is None:
            self._execute(self._waiting.popleft())

    def _end(self) -> None:
        self._under_way = None
        os.eventfd_read(self._turn)

    def _break_off(self) -> None:
        if self._under_way is None:
            return
        asked, work = self._under_way
        self._end()
        work.close()
        for each in (asked, *self._waiting):
            if each is not None:
                self._refuse(each, VfioUserError(errno.ECANCELED, "the device was reset"))
        self._waiting.clear()

    def _reply(self, asked: _Asked, body: bytes) -> None:
        if asked.wants_reply:
            self._replies.append((asked, 0, "", body))

    def _refuse(self, asked: _Asked, error: Exception) -> None:
        number = errno.EIO
        if isinstance(error, VfioUserError):
            number = error.errno or errno.EIO
        elif isinstance(error, ProtocolError):
            number = errno.EINVAL
        elif isinstance(error, MemoryNotPinned):
            self._log("memory-not-pinned", reason=str(error))
            number = errno.ENOMEM
        elif isinstance(error, RegisterError):
            self._log("device-cannot-move", reason=str(error))
            number = errno.EBUSY
        elif asked.command not in _ACCESSES:
            # A guest may access what is not there as often as it likes.
            self._log("device-refuses", reason=str(error))
        if asked.wants_reply:
            self._replies.append((asked, number, str(error), b""))

    # Commands.

    def _version(self, body: bytes, _: list[int]) -> bytes:
        proposed = Version.unpack(body)
        agreed = OFFER.accept(proposed.capabilities)
        return Version(MAJOR, min(MINOR, proposed.minor), agreed).pack()

    def _device_info(self, _body: bytes, _: list[int]) -> bytes:
        return DeviceInfo(
            DeviceFlags.PCI | (DeviceFlags.RESET if self._device.can_reset else 0),
            PCI_NUM_REGIONS,
            PCI_NUM_IRQS,
        ).pack()

    def _region_info(self, body: bytes, _: list[int]) -> bytes:
        index = RegionInfoRequest.unpack(body).index
        region = self._device.regions.get(index)
        # Nothing is offered for mapping: an access that bypasses us cannot be watched.
        if region is None:
            return RegionInfo(index, 0, 0).pack()
        return RegionInfo(index, RegionFlags.READ | RegionFlags.WRITE, region.size).pack()

    def _irq_info(self, body: bytes, _: list[int]) -> bytes:
        index = IrqInfoRequest.unpack(body).index
        if index >= PCI_NUM_IRQS:
            raise VfioUserError(errno.EINVAL)
        flags = IrqFlags.EVENTFD
        if index == PciIrq.INTX:
            flags |= IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
        return IrqInfo(index, flags, self._device.vectors.get(PciIrq(index), 0)).pack()

    def _region_read(self, body: bytes, _: list[int]) -> bytes:
        access = RegionAccess.unpack(body)
        data = self._device.read(access.region, access.offset, access.count)
        if self._queues is not None:
            self._queues.watch.read(access.region, access.offset, data)
        return body + data

    def _region_write(self, body: bytes, _: list[int]) -> bytes:
        self._write(RegionAccess.unpack(body))
        return body[: len(RegionAccess(0, 0, 0).pack())]

    def _write_multi(self, body: bytes, _: list[int]) -> bytes:
        writes = WriteMulti.unpack(body).writes
        for access in writes:
            self._write(access)
        return WriteMultiReply(len(writes)).pack()

    def _write(self, access: RegionAccess) -> None:
        if self._queues is not None:
            # Before the device sees it: it may change what a doorbell tells of.
            self._queues.watch.write(access.region, access.offset, access.data)
            if access.region == PciRegion.CONFIG:
                self._queues.note(access.offset, access.data)
        self._device.write(access.region, access.offset, access.data)

    def _dma_map(self, body: bytes, fds: list[int]) -> bytes:
        self._memory.map(DmaMap.unpack(body), fds[0] if fds else None)
        return b""

    def _dma_unmap(self, body: bytes, _: list[int]) -> bytes:
        request = DmaUnmap.unpack(body)
        if request.flags & UnmapFlags.ALL:
            self._memory.unmap_all()
        else:
            self._memory.unmap(request.address, request.size)
        return body

    def _reset(self, _body: bytes, _: list[int]) -> bytes:
        self._device.reset()
        self._troubles.pop(PciIrq.ERR, None)
        if self._migration is not None:
            self._migration.reset()
        return b""

    def _set_irqs(self, body: bytes, fds: list[int]) -> bytes:
        self._irqs.set(SetIrqs.unpack(body), fds)
        return b""

    # Migration and logging.

    def _feature(self, body: bytes, _: list[int]) -> Answer:
        request = Feature.unpack(body)
        migration, log = self._migration, self._dma_log
        if log is not None and request.index in _LOGGING:
            return self._log_feature(log, request)
        index = request.index
        if migration is None or index not in {
            FeatureIndex.MIGRATION,
            FeatureIndex.MIG_DEVICE_STATE,
            FeatureIndex.MIG_DATA_SIZE,
        }:
            raise VfioUserError(errno.ENOTSUP)
        if request.is_probe:
            return Feature(request.flags).pack()
        data = request.data
        if index == FeatureIndex.MIGRATION:
            data = MigrationFlags(migration.support).pack()
        elif index == FeatureIndex.MIG_DATA_SIZE:
            size = migration.size()
            if size is None or request.is_set:
                raise VfioUserError(errno.ENOTSUP)
            data = DataSize(size).pack()
        elif request.is_set:
            return self._set_state(migration, request)
        else:
            data = MigState(migration.state).pack()
        return Feature(request.flags, data).pack()

    def _log_feature(self, log: DmaLog, request: Feature) -> bytes:
        if request.is_probe:
            return Feature(request.flags).pack()
        data = request.data
        if request.index == FeatureIndex.DMA_LOGGING_START:
            control = LoggingControl.unpack(data)
            page_bytes = log.start(control.page_size, control.ranges or self._memory.extent())
            data = LoggingControl(page_bytes, control.ranges).pack()
        elif request.index == FeatureIndex.DMA_LOGGING_STOP:
            log.stop()
        else:
            report = LoggingReport.unpack(data)
            iova, length, page_bytes = report.iova, report.length, report.page_size
            bitmap = log.report(iova, length, page_bytes, report.bitmap_bytes)
            data = LoggingReport(iova, length, page_bytes, bitmap).pack()
        return Feature(request.flags, data).pack()

    def _set_state(
        self, migration: QueueMigration | NativeMigration, request: Feature
    ) -> Work[bytes]:
        wanted = MigState.unpack(request.data).device_state
        if wanted is not MigrationState.RUNNING:
            self._require_sound()
        yield from migration.set_state(wanted)
        return Feature(request.flags, MigState(migration.state).pack()).pack()

    def _migration_read(self, body: bytes, _: list[int]) -> Work[bytes]:
        self._require_sound()
        data = yield from self._require_migration().read(MigData.unpack(body).size)
        return MigData(len(data), data).pack()

    def _migration_write(self, body: bytes, _: list[int]) -> Work[bytes]:
        self._require_sound()
        yield from self._require_migration().write(MigData.unpack(body).data)
        return b""

    def _require_sound(self) -> None:
        if self._troubles:
            raise CannotMove(list(self._troubles.values()))

    def _require_migration(self) -> QueueMigration | NativeMigration:
        if self._migration is None:
            raise VfioUserError(errno.ENOTSUP)
        return self._migration


def open_endpoint(address: str, log: Callable[..., None]) -> HostEndpoint:
    """The function at `address`, which vfio-pci has, by iommufd if that stands in front; or the
    device process at this path. Raises `VfioError`."""
    device: VfioDevice | UserDevice
    if address.startswith("/"):
        device = UserDevice(Path(address))
    else:
        function = PciFunction(address.removeprefix(BY_IOMMUFD))
        device = VfioDevice(function, iommufd=address.startswith(BY_IOMMUFD))
    try:
        return HostEndpoint(device, log)
    except BaseException:
        device.close()
        raise


def _nobody(
    message_id: int,
    command: int,
    flags: int,
    error: int,
    message: memoryview,
    descriptors: list[int],
) -> None:
    raise VfioError("a reply that nobody waits for")
