"""A function of the host as a vfio-user device, in the gateway's own process.

Owns the answer to each command and the interrupts that the VMM has asked for. Takes the place of a
connection to a device (`sync.gateway.datapath.peer.Peer`): a command is executed when it is sent,
its reply is handed over by the next `flush`. So a register access wakes one process, not two.

Source: vfio-user specification.
"""

import contextlib
import errno
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from sync.errors import SyncError
from sync.queues.choose import find_class, load_classes
from sync.queues.interface import DeviceClass
from sync.registers.profile.locate import DeviceView
from sync.vfio.device import VfioDevice
from sync.vfio.errors import MemoryNotPinned, VfioError
from sync.vfio.executor import Executor
from sync.vfio.guest_memory import PinnedMemory, close_all
from sync.vfio.queue_migration import QueueMigration
from sync.vfio.sysfs import PciFunction
from sync.vfio.uapi import IrqIndex
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
    DeviceFlags,
    DeviceInfo,
    Disconnected,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureFlags,
    FeatureIndex,
    IrqFlags,
    IrqInfo,
    IrqInfoRequest,
    IrqSet,
    LoggingControl,
    LoggingReport,
    MigData,
    MigrationFlags,
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
_LOGGING_PAGE_BYTES = 4096
_ACCESSES = (Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI)
_LOGGING = {
    FeatureIndex.DMA_LOGGING_START: FeatureFlags.SET,
    FeatureIndex.DMA_LOGGING_STOP: FeatureFlags.SET,
    FeatureIndex.DMA_LOGGING_REPORT: FeatureFlags.GET,
}

Handler = Callable[[int, int, int, int, memoryview, list[int]], None]


class HostEndpoint:
    """`device` is owned. `log` takes an event and its fields."""

    def __init__(
        self,
        device: VfioDevice | UserDevice,
        log: Callable[..., None],
        classes: tuple[DeviceClass, ...] | None = None,
    ) -> None:
        self.handler: Handler = _nobody
        self.backlog_bytes = 0
        self._device = device
        self._log = log
        self._replies: deque[tuple[int, int, int, bytes]] = deque()
        self._memory = PinnedMemory(device)
        self._irqs: dict[IrqIndex, dict[int, int]] = {index: {} for index in IrqIndex}
        self._event = -1
        if isinstance(device, VfioDevice):
            self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        device.reset()
        device.set_bus_master(True)
        self._migration = self._find_migration(load_classes() if classes is None else classes)
        device.reset()
        device.set_bus_master(False)
        self._handlers: dict[int, Callable[[bytes, list[int]], bytes]] = {
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

    def _find_migration(self, classes: tuple[DeviceClass, ...]) -> QueueMigration | None:
        found = find_class(self._view(), classes)
        if found is None:
            return None
        executor = Executor(self._device, self._signal)
        executor.quiet_interrupts()
        try:
            return QueueMigration(
                found,
                executor,
                self._device,
                self._memory,
                self._log,
                self._restore_interrupts,
            )
        except SyncError as error:
            self._log("device-cannot-move", reason=str(error))
            executor.drop_scratch()
            self._device.reset()
            return None
        finally:
            if self._device.vectors.get(IrqIndex.MSIX):
                self._device.disable_irqs(IrqIndex.MSIX)

    def _view(self) -> DeviceView:
        config = self._device.read(PciRegion.CONFIG, 0, 64)

        def word(at: int) -> int:
            return int.from_bytes(config[at : at + 2], "little")

        sizes = {index: region.size for index, region in self._device.regions.items()}
        class_code = int.from_bytes(config[9:12], "little")
        return DeviceView(word(0), word(2), word(0x2C), word(0x2E), class_code, config, sizes)

    # What the gateway's loop asks of a connection.

    def fileno(self) -> int:
        """Readable only when a device process is gone."""
        return self._device.fileno() if isinstance(self._device, UserDevice) else self._event

    def receive(self) -> None:
        """Raises `Disconnected`: nothing is said that was not asked for."""
        raise Disconnected("the device is gone")

    def drain(self) -> None:
        """There is nothing that waits."""

    def send(
        self, message: bytes | bytearray | memoryview, descriptors: Sequence[int] = ()
    ) -> None:
        """Execute a command. Owns `descriptors`."""
        message_id, command, _, flags, _ = HEADER.unpack_from(message)
        fds = list(descriptors)
        number = 0
        body = b""
        try:
            handler = self._handlers.get(command)
            if handler is None:
                raise VfioUserError(errno.ENOTSUP)
            body = handler(bytes(message[HEADER_BYTES:]), fds)
        except VfioUserError as error:
            number = error.errno or errno.EIO
        except ProtocolError:
            number = errno.EINVAL
        except MemoryNotPinned as error:
            self._log("memory-not-pinned", reason=str(error))
            number = errno.ENOMEM
        except (SyncError, OSError) as error:
            if command not in _ACCESSES:
                # A guest may access what is not there as often as it likes.
                self._log("device-refuses", reason=str(error))
            number = errno.EIO
        finally:
            close_all(fds)
        if not flags & FLAG_NO_REPLY:
            self._replies.append((message_id, command, number, body))

    def flush(self) -> None:
        """Hand over the replies, also to what is sent meanwhile. Raises `Disconnected`."""
        while self._replies:
            if isinstance(self._device, UserDevice) and self._device.lost:
                raise Disconnected("the device is gone")
            message_id, command, number, body = self._replies.popleft()
            reply = encode_message(message_id, command, body, reply=True, error=number)
            flags = HEADER.unpack_from(reply)[3]
            self.handler(message_id, command, flags, number, memoryview(bytearray(reply)), [])

    def close(self) -> None:
        """Take all memory away, and let go of the function."""
        with contextlib.suppress(VfioError):
            self._memory.unmap_all()
        for fds in self._irqs.values():
            close_all(list(fds.values()))
        self._device.close()
        if self._event >= 0:
            os.close(self._event)

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
        return IrqInfo(index, flags, self._device.vectors.get(IrqIndex(index), 0)).pack()

    def _region_read(self, body: bytes, _: list[int]) -> bytes:
        access = RegionAccess.unpack(body)
        data = self._device.read(access.region, access.offset, access.count)
        if self._migration is not None:
            self._migration.watch.read(access.region, access.offset, data)
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
        if self._migration is not None:
            # Before the device sees it: it may change what a doorbell tells of.
            self._migration.watch.write(access.region, access.offset, access.data)
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
        if self._migration is not None:
            self._migration.reset()
        return b""

    # Interrupts.

    def _set_irqs(self, body: bytes, fds: list[int]) -> bytes:
        request = SetIrqs.unpack(body)
        index = IrqIndex(request.index) if request.index < PCI_NUM_IRQS else None
        count = self._device.vectors.get(index, 0) if index is not None else 0
        if index is None or request.start + request.count > count:
            raise VfioUserError(errno.EINVAL)
        if request.flags & IrqSet.ACTION_TRIGGER:
            self._trigger(index, request, fds)
        elif index is IrqIndex.INTX and request.count:
            self._device.mask_intx(bool(request.flags & IrqSet.ACTION_MASK))
        else:
            raise VfioUserError(errno.ENOTSUP)
        return b""

    def _trigger(self, index: IrqIndex, request: SetIrqs, fds: list[int]) -> None:
        known = self._irqs[index]
        if request.is_disable:
            self._device.disable_irqs(index)
            close_all(list(known.values()))
            known.clear()
        elif request.flags & IrqSet.DATA_EVENTFD:
            given = fds or [-1] * request.count
            self._device.set_irqs(index, given, request.start)
            for vector, fd in enumerate(given, request.start):
                if vector in known:
                    os.close(known.pop(vector))
                if fd >= 0:
                    known[vector] = fd
            fds.clear()
        else:
            chosen = [
                request.start + at
                for at in range(request.count)
                if request.flags & IrqSet.DATA_NONE or request.data[at]
            ]
            for vector in chosen:
                self._device.trigger(index, vector)

    def _signal(self, vector: int) -> None:
        fd = self._irqs[IrqIndex.MSIX].get(vector)
        if fd is None:
            return
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        # Never wait for a VMM: an eventfd that is full has a signal in it already (I9).
        if poller.poll(0):
            with contextlib.suppress(OSError):
                os.eventfd_write(fd, 1)

    def _restore_interrupts(self) -> None:
        """What the VMM has asked for, after a walk during which nobody was interrupted."""
        if self._device.vectors.get(IrqIndex.MSIX):
            self._device.disable_irqs(IrqIndex.MSIX)
        for index in (IrqIndex.INTX, IrqIndex.MSI, IrqIndex.MSIX):
            known = self._irqs[index]
            if known:
                fds = [known.get(vector, -1) for vector in range(max(known) + 1)]
                self._device.set_irqs(index, fds)

    # Migration and logging.

    def _feature(self, body: bytes, _: list[int]) -> bytes:
        request = Feature.unpack(body)
        migration = self._migration
        index = request.index
        if migration is None or index not in {
            FeatureIndex.MIGRATION,
            FeatureIndex.MIG_DEVICE_STATE,
            *_LOGGING,
        }:
            raise VfioUserError(errno.ENOTSUP)
        if request.is_probe:
            return Feature(request.flags).pack()
        data = request.data
        if index == FeatureIndex.MIGRATION:
            data = MigrationFlags(MigrationSupport.STOP_COPY | MigrationSupport.PRE_COPY).pack()
        elif index == FeatureIndex.MIG_DEVICE_STATE:
            if request.is_set:
                migration.set_state(MigState.unpack(data).device_state)
            data = MigState(migration.state).pack()
        elif index == FeatureIndex.DMA_LOGGING_START:
            migration.start_logging()
            data = LoggingControl(_LOGGING_PAGE_BYTES, LoggingControl.unpack(data).ranges).pack()
        elif index == FeatureIndex.DMA_LOGGING_STOP:
            migration.stop_logging()
        else:
            report = LoggingReport.unpack(data)
            bitmap = migration.report(report)
            data = LoggingReport(report.iova, report.length, report.page_size, bitmap).pack()
        return Feature(request.flags, data).pack()

    def _migration_read(self, body: bytes, _: list[int]) -> bytes:
        size = MigData.unpack(body).size
        data = self._require_migration().read(size)
        return MigData(len(data), data).pack()

    def _migration_write(self, body: bytes, _: list[int]) -> bytes:
        self._require_migration().write(MigData.unpack(body).data)
        return b""

    def _require_migration(self) -> QueueMigration:
        if self._migration is None:
            raise VfioUserError(errno.ENOTSUP)
        return self._migration


def open_endpoint(address: str, log: Callable[..., None]) -> HostEndpoint:
    """The function at `address`, which vfio-pci has; or the device process at this path. Raises
    `VfioError`."""
    device: VfioDevice | UserDevice
    if address.startswith("/"):
        device = UserDevice(Path(address))
    else:
        device = VfioDevice(PciFunction(address))
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
