"""Messages about what a device has: device, region and interrupt information, SET_IRQS.

Source: vfio-user specification, sections VFIO_USER_DEVICE_GET_INFO, _GET_REGION_INFO,
_GET_REGION_IO_FDS, _GET_IRQ_INFO and _SET_IRQS; <linux/vfio.h> for PCI indices.
`argsz` of a request is the largest reply body that its sender can take.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Final, Self

from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.wire import require_argsz, unpack_exactly, unpack_start

_INFO: Final = struct.Struct("<IIII")
_REGION: Final = struct.Struct("<IIIIQQ")
_SET_IRQS: Final = struct.Struct("<IIIII")


class DeviceFlags(IntFlag):
    RESET = 1
    PCI = 2


class RegionFlags(IntFlag):
    """CAPS is not among them: unpacking removes it."""

    READ = 1
    WRITE = 2
    MMAP = 4


_REGION_FLAG_CAPS: Final = 8


class IrqFlags(IntFlag):
    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqSet(IntFlag):
    """Flags of SET_IRQS: one DATA and one ACTION."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    ACTION_MASK = 8
    ACTION_UNMASK = 16
    ACTION_TRIGGER = 32


_IRQ_DATA: Final = IrqSet.DATA_NONE | IrqSet.DATA_BOOL | IrqSet.DATA_EVENTFD
_IRQ_ACTIONS: Final = IrqSet.ACTION_MASK | IrqSet.ACTION_UNMASK | IrqSet.ACTION_TRIGGER


class PciRegion(IntEnum):
    """Region indices of a PCI device (<linux/vfio.h>)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class PciIrq(IntEnum):
    """Interrupt indices of a PCI device (<linux/vfio.h>)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


PCI_NUM_REGIONS: Final = len(PciRegion)
PCI_NUM_IRQS: Final = len(PciIrq)


@dataclass(frozen=True, slots=True)
class DeviceInfoRequest:
    """DEVICE_GET_INFO request."""

    argsz: int = _INFO.size

    def pack(self) -> bytes:
        return _INFO.pack(self.argsz, 0, 0, 0)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, *_ = unpack_exactly(_INFO, body, "DEVICE_GET_INFO")
        require_argsz(argsz, _INFO.size, "DEVICE_GET_INFO")
        return cls(argsz)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """DEVICE_GET_INFO reply."""

    flags: int
    num_regions: int
    num_irqs: int

    def pack(self) -> bytes:
        return _INFO.pack(_INFO.size, self.flags, self.num_regions, self.num_irqs)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, flags, num_regions, num_irqs = unpack_start(_INFO, body, "DEVICE_GET_INFO reply")
        require_argsz(argsz, _INFO.size, "DEVICE_GET_INFO reply")
        return cls(flags, num_regions, num_irqs)


@dataclass(frozen=True, slots=True)
class _Question:
    """A request for what the device has under the number `index`."""

    index: int
    argsz: int = _INFO.size
    COMMAND: ClassVar[str]
    SIZE: ClassVar[int] = _INFO.size

    def pack(self) -> bytes:
        return _INFO.pack(self.argsz, 0, self.index, 0).ljust(self.SIZE, b"\0")

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        if len(body) != cls.SIZE:
            raise ProtocolError(f"{cls.COMMAND} of {len(body)} bytes, expected {cls.SIZE}")
        argsz, _, index, _ = _INFO.unpack_from(body)
        require_argsz(argsz, cls.SIZE, cls.COMMAND)
        return cls(index, argsz)


@dataclass(frozen=True, slots=True)
class RegionInfoRequest(_Question):
    """DEVICE_GET_REGION_INFO request."""

    argsz: int = _REGION.size
    COMMAND = "DEVICE_GET_REGION_INFO"
    SIZE = _REGION.size


class RegionIoFdsRequest(_Question):
    """DEVICE_GET_REGION_IO_FDS request."""

    COMMAND = "DEVICE_GET_REGION_IO_FDS"


class IrqInfoRequest(_Question):
    """DEVICE_GET_IRQ_INFO request."""

    COMMAND = "DEVICE_GET_IRQ_INFO"


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """DEVICE_GET_REGION_INFO reply: a region of `size` bytes.

    `offset`: where the region starts in its descriptor (MMAP only). Capabilities behind it are
    passed over.
    """

    index: int
    flags: int
    size: int
    offset: int = 0

    def pack(self) -> bytes:
        return _REGION.pack(_REGION.size, self.flags, self.index, 0, self.size, self.offset)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, flags, index, _, size, offset = unpack_start(
            _REGION, body, "DEVICE_GET_REGION_INFO reply"
        )
        require_argsz(argsz, max(_REGION.size, len(body)), "DEVICE_GET_REGION_INFO reply")
        return cls(index, flags & ~_REGION_FLAG_CAPS, size, offset)


@dataclass(frozen=True, slots=True)
class RegionIoFds:
    """DEVICE_GET_REGION_IO_FDS reply: no part of the region is told of by a descriptor."""

    index: int

    def pack(self) -> bytes:
        return _INFO.pack(_INFO.size, 0, self.index, 0)


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """DEVICE_GET_IRQ_INFO reply: `count` interrupts of one type."""

    index: int
    flags: int
    count: int

    def pack(self) -> bytes:
        return _INFO.pack(_INFO.size, self.flags, self.index, self.count)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, flags, index, count = unpack_start(_INFO, body, "DEVICE_GET_IRQ_INFO reply")
        require_argsz(argsz, _INFO.size, "DEVICE_GET_IRQ_INFO reply")
        return cls(index, flags, count)


@dataclass(frozen=True, slots=True)
class SetIrqs:
    """DEVICE_SET_IRQS request: an action on interrupts [start, start + count) of a type.

    `data`: `count` bytes of 0 or 1 with DATA_BOOL, else empty. With DATA_EVENTFD the descriptors
    travel beside the message: one for each interrupt, or none to take theirs away.
    """

    flags: int
    index: int
    start: int
    count: int
    data: bytes = b""

    @property
    def is_disable(self) -> bool:
        """Whether every interrupt of the type is to be disabled."""
        return bool(self.flags & IrqSet.DATA_NONE) and self.start == 0 and self.count == 0

    def pack(self) -> bytes:
        argsz = _SET_IRQS.size + len(self.data)
        return _SET_IRQS.pack(argsz, self.flags, self.index, self.start, self.count) + self.data

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, flags, index, start, count = unpack_start(_SET_IRQS, body, "DEVICE_SET_IRQS")
        # No equality: QEMU counts descriptors as data, as the ioctl does, and does not send them.
        require_argsz(argsz, len(body), "DEVICE_SET_IRQS")
        data = bytes(body[_SET_IRQS.size :])
        data_kind, action = flags & _IRQ_DATA, flags & _IRQ_ACTIONS
        if flags != data_kind | action or data_kind.bit_count() != 1 or action.bit_count() != 1:
            raise ProtocolError(f"DEVICE_SET_IRQS with flags {flags:#x}")
        if len(data) != (count if data_kind == IrqSet.DATA_BOOL else 0):
            raise ProtocolError(f"DEVICE_SET_IRQS of {count} interrupts with {len(data)} bytes")
        if count == 0 and (start or data_kind != IrqSet.DATA_NONE):
            raise ProtocolError("DEVICE_SET_IRQS of no interrupt")
        return cls(flags, index, start, count, data)
