"""A device process, by vfio-user, in the place of a function of the host.

Owns one connection on which each command waits for its answer. So a device that offers no migration
by itself gets from its queues what a function of the host gets (`queue_migration`).

Source: vfio-user specification.
"""

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from sync.errors import SyncError
from sync.pci import MSIX_CAPABILITY, MSIX_ENABLE
from sync.registers.profile.locate import DeviceView
from sync.vfio.device import Region
from sync.vfio.errors import MemoryNotPinned, NoFunction, VfioError
from sync.vfio_user.errors import errno_text
from sync.vfio_user.framing import Framer, Message, close_fds, recv_into_framer, send_message
from sync.vfio_user.protocol import (
    FLAG_REPLY,
    FLAG_TYPE_MASK,
    Capabilities,
    Command,
    DeviceFlags,
    DeviceInfo,
    DeviceInfoRequest,
    DmaFlags,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    IrqInfoRequest,
    IrqSet,
    PciIrq,
    PciRegion,
    RegionAccess,
    RegionFlags,
    RegionInfo,
    RegionInfoRequest,
    SetIrqs,
    Version,
    encode_message,
    message_limit_bytes,
)

DEADLINE_S = 5.0
"""A device that takes longer for an answer has failed."""
_PAGE_SIZES = (1 << 63) - 4096
_COMMAND = 4
_BUS_MASTER, _MEMORY = 1 << 2, 1 << 1
_MAX_TRANSFER_BYTES = 1 << 20


class UserDevice:
    """The device that listens at `path`. Has the methods of `device.VfioDevice`.

    Raises `VfioError` and what is derived from it, here and in every method.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.lost = False
        """Whether the connection is of no use any more."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(DEADLINE_S)
        self._framer = Framer(message_limit_bytes(_MAX_TRANSFER_BYTES))
        try:
            self._socket.connect(os.fspath(path))
            offer = Capabilities(max_data_xfer_size=_MAX_TRANSFER_BYTES, pgsizes=_PAGE_SIZES)
            answer = self._ask(Command.VERSION, Version(capabilities=offer).pack())
            self._max_fds = Version.unpack(answer).capabilities.max_msg_fds
            self._describe()
        except OSError as error:
            self._socket.close()
            raise NoFunction(f"no device at {path}: {error.strerror}") from error
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when the device is gone, or says what nobody asked for."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
        self._framer.close()

    def read(self, region: int, offset: int, length: int) -> bytes:
        access = RegionAccess(offset, region, length)
        data = RegionAccess.unpack(self._ask(Command.REGION_READ, access.pack())).data
        if len(data) != length:
            raise VfioError(f"{self.name} answers a read of {length} bytes with {len(data)}")
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        self._ask(Command.REGION_WRITE, RegionAccess(offset, region, len(data), data).pack())

    def set_bus_master(self, on: bool) -> None:
        command = int.from_bytes(self.read(PciRegion.CONFIG, _COMMAND, 2), "little")
        wanted = (command | _MEMORY) & ~_BUS_MASTER | (_BUS_MASTER if on else 0)
        self.write(PciRegion.CONFIG, _COMMAND, wanted.to_bytes(2, "little"))

    def enable_msix(self) -> None:
        """The device learns of it from its configuration space alone."""
        if self.msix_control is not None:
            control = int.from_bytes(self.read(PciRegion.CONFIG, self.msix_control, 2), "little")
            wanted = (control | MSIX_ENABLE).to_bytes(2, "little")
            self.write(PciRegion.CONFIG, self.msix_control, wanted)

    def reset(self) -> None:
        self._ask(Command.DEVICE_RESET)

    def map_dma(
        self,
        iova: int,
        length: int,
        address: int,
        *,
        writable: bool = True,
        file: tuple[int, int] | None = None,
    ) -> None:
        if file is None:
            raise MemoryNotPinned(f"{self.name} cannot be shown memory without a descriptor")
        flags = DmaFlags.READ | (DmaFlags.WRITE if writable else DmaFlags(0))
        fd, offset = file
        self._ask(Command.DMA_MAP, DmaMap(flags, offset, iova, length).pack(), (fd,))

    def unmap_dma(self, iova: int, length: int) -> None:
        self._ask(Command.DMA_UNMAP, DmaUnmap(0, iova, length).pack())

    def set_irqs(self, index: PciIrq, fds: Sequence[int], start: int = 0) -> None:
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        at = 0
        while at < len(fds):
            # A message takes away, or gives, for all that it names.
            gives = fds[at] >= 0
            end = at
            while end < len(fds) and (fds[end] >= 0) is gives and end - at < self._max_fds:
                end += 1
            body = SetIrqs(flags, index, start + at, end - at).pack()
            self._ask(Command.DEVICE_SET_IRQS, body, fds[at:end] if gives else ())
            at = end

    def disable_irqs(self, index: PciIrq) -> None:
        self._set_irqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, index, 0, 0)

    def mask_intx(self, masked: bool) -> None:
        action = IrqSet.ACTION_MASK if masked else IrqSet.ACTION_UNMASK
        self._set_irqs(IrqSet.DATA_NONE | action, PciIrq.INTX, 0, 1)

    def trigger(self, index: PciIrq, vector: int) -> None:
        self._set_irqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, index, vector, 1)

    def _set_irqs(self, flags: int, index: PciIrq, start: int, count: int) -> None:
        self._ask(Command.DEVICE_SET_IRQS, SetIrqs(flags, index, start, count).pack())

    def _describe(self) -> None:
        info = DeviceInfo.unpack(self._ask(Command.DEVICE_GET_INFO, DeviceInfoRequest().pack()))
        self.can_reset = bool(info.flags & DeviceFlags.RESET)
        if not self.can_reset:
            raise VfioError(f"{self.name} cannot be reset, so its queues cannot be made anew")
        self.regions: dict[int, Region] = {}
        for index in range(min(info.num_regions, PciRegion.CONFIG + 1)):
            answer = self._ask(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(index).pack())
            region = RegionInfo.unpack(answer)
            if region.size:
                self.regions[index] = Region(region.size, RegionFlags(region.flags & 3), 0)
        self.vectors = {}
        for irq in PciIrq:
            if irq < info.num_irqs:
                answer = self._ask(Command.DEVICE_GET_IRQ_INFO, IrqInfoRequest(irq).pack())
                self.vectors[irq] = IrqInfo.unpack(answer).count
        config = b"".join(self.read(PciRegion.CONFIG, at, 4) for at in range(0, 256, 4))
        capabilities = DeviceView(0, 0, 0, 0, 0, config, {}).capabilities()
        found = [at for kind, at in capabilities if kind == MSIX_CAPABILITY]
        self.msix_control = found[0] + 2 if found else None

    def _ask(self, command: Command, body: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        try:
            send_message(self._socket, encode_message(0, command, body), fds)
            message = self._next()
        except (OSError, SyncError) as error:
            self.lost = True
            raise VfioError(f"{self.name} does not answer {command.name}: {error}") from error
        close_fds(message.fds)
        header = message.header
        if header.command != command or header.flags & FLAG_TYPE_MASK != FLAG_REPLY:
            raise VfioError(f"{self.name} answers {command.name} with something else")
        if header.error:
            raise VfioError(f"{self.name} refuses {command.name}: {errno_text(header.error)}")
        return message.body

    def _next(self) -> Message:
        while (message := self._framer.next_message()) is None:
            if not recv_into_framer(self._socket, self._framer):
                raise OSError(errno.ECONNRESET, "the device is gone")
        return message
