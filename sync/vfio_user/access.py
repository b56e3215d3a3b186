"""Messages that touch memory or registers: DMA map and unmap, region and multi-write access.

Source: vfio-user specification, sections VFIO_USER_DMA_MAP, _DMA_UNMAP, _REGION_READ/WRITE
and _REGION_WRITE_MULTI. Ranges are checked only against what the message itself
says; whether a region exists is the receiver's business.
"""

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Final, Self

from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.wire import require_argsz, unpack_exactly, unpack_start

_DMA_MAP: Final = struct.Struct("<IIQQQ")
_DMA_UNMAP: Final = struct.Struct("<IIQQ")
_REGION_ACCESS: Final = struct.Struct("<QII")
_WRITE_COUNT: Final = struct.Struct("<Q")
_WRITE: Final = struct.Struct("<QII8s")

ADDRESS_LIMIT: Final = 1 << 64
MULTI_WRITE_MAX_BYTES: Final = 8
"""One entry of REGION_WRITE_MULTI has room for this much data."""


class DmaFlags(IntFlag):
    """What the device may do in a DMA region."""

    READ = 1
    WRITE = 2


# A plain number: inverting an IntFlag loses the bits that have no name.
_DMA_FLAGS: Final = int(DmaFlags.READ | DmaFlags.WRITE)


class UnmapFlags(IntFlag):
    """Not in the specification, but spoken by QEMU and libvfio-user: unmap every region."""

    ALL = 2


@dataclass(frozen=True, slots=True)
class DmaMap:
    """DMA_MAP request: `size` bytes of client memory at DMA address `address`.

    `offset` counts from the start of the descriptor sent along; without one the region is reached
    by DMA_READ and DMA_WRITE.
    """

    flags: int
    offset: int
    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size

    def pack(self) -> bytes:
        return _DMA_MAP.pack(_DMA_MAP.size, self.flags, self.offset, self.address, self.size)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, flags, offset, address, size = unpack_exactly(_DMA_MAP, body, "DMA_MAP")
        require_argsz(argsz, _DMA_MAP.size, "DMA_MAP")
        if flags & ~_DMA_FLAGS:
            raise ProtocolError(f"DMA_MAP with unknown flags {flags:#x}")
        if not size or address + size > ADDRESS_LIMIT or offset + size > ADDRESS_LIMIT:
            raise ProtocolError(f"DMA_MAP of {size:#x} bytes at {address:#x}, offset {offset:#x}")
        return cls(flags, offset, address, size)


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """DMA_UNMAP request and reply: the region that was mapped with exactly this address and size.

    With `UnmapFlags.ALL` both are 0 and every region goes.
    """

    flags: int
    address: int
    size: int

    def pack(self) -> bytes:
        return _DMA_UNMAP.pack(_DMA_UNMAP.size, self.flags, self.address, self.size)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, flags, address, size = unpack_exactly(_DMA_UNMAP, body, "DMA_UNMAP")
        require_argsz(argsz, _DMA_UNMAP.size, "DMA_UNMAP")
        if flags not in (0, UnmapFlags.ALL):
            raise ProtocolError(f"DMA_UNMAP with unknown flags {flags:#x}")
        if flags and (address or size):
            raise ProtocolError("DMA_UNMAP of all regions with an address or a size")
        return cls(flags, address, size)


@dataclass(frozen=True, slots=True)
class RegionAccess:
    """REGION_READ and REGION_WRITE, request and reply: `count` bytes at `offset` of a region.

    A write request and a read reply carry `data` of exactly `count` bytes; a read request and a
    write reply carry none.
    """

    offset: int
    region: int
    count: int
    data: bytes = b""

    def pack(self) -> bytes:
        return _REGION_ACCESS.pack(self.offset, self.region, self.count) + self.data

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        offset, region, count = unpack_start(_REGION_ACCESS, body, "region access")
        data = bytes(body[_REGION_ACCESS.size :])
        if data and len(data) != count:
            raise ProtocolError(f"region access of {count} bytes carries {len(data)}")
        return cls(offset, region, count, data)


@dataclass(frozen=True, slots=True)
class WriteMulti:
    """REGION_WRITE_MULTI request: writes of up to 8 bytes each, executed in this order."""

    writes: tuple[RegionAccess, ...]

    def pack(self) -> bytes:
        """Raises ValueError for a write of more than 8 bytes."""
        if any(len(write.data) > MULTI_WRITE_MAX_BYTES for write in self.writes):
            raise ValueError("a write in REGION_WRITE_MULTI has at most 8 bytes")
        return _WRITE_COUNT.pack(len(self.writes)) + b"".join(
            _WRITE.pack(write.offset, write.region, write.count, write.data)
            for write in self.writes
        )

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        (count,) = unpack_start(_WRITE_COUNT, body, "REGION_WRITE_MULTI")
        if len(body) != _WRITE_COUNT.size + count * _WRITE.size:
            raise ProtocolError(f"REGION_WRITE_MULTI of {count} writes in {len(body)} bytes")
        writes = []
        for offset, region, length, data in _WRITE.iter_unpack(body[_WRITE_COUNT.size :]):
            if length > MULTI_WRITE_MAX_BYTES:
                raise ProtocolError(f"REGION_WRITE_MULTI with a write of {length} bytes")
            writes.append(RegionAccess(offset, region, length, data[:length]))
        return cls(tuple(writes))


@dataclass(frozen=True, slots=True)
class WriteMultiReply:
    """REGION_WRITE_MULTI reply: how many of the writes were completed."""

    completed: int

    def pack(self) -> bytes:
        return _WRITE_COUNT.pack(self.completed)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        return cls(*unpack_exactly(_WRITE_COUNT, body, "REGION_WRITE_MULTI reply"))
