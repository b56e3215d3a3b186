"""What a device may touch of its client's memory: the DMA map.

Owns the mapped regions (own mapping where a descriptor came along, messages otherwise), the check
of every address and length that a guest hands in, and marking the dirty log after a write. Does
not own when DMA may happen: `unmap` and `unmap_all` are called only while nobody does any.

An address that is not mapped is one of two things. It is *absent* if it may come back: its region
was unmapped since the driver's last reset, or the client is still setting its map up after it
connected or a state was loaded. Work that needs it waits for a map. Otherwise it is a *fault*: the
driver gave an address that does not exist.
"""

import contextlib
import errno
import mmap
import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lab.devices.dirty_log import DirtyLog
from sync.memory import PAGE_BYTES, page_bytes_of
from sync.vfio_user.protocol import Disconnected, DmaFlags, DmaMap, VfioUserError

MAX_ABSENT_RANGES = 1024
"""Unmapped ranges remembered; a VMM that remaps everything has some tens."""

# Native size and order: CPython then copies the two bytes at once, and a driver that polls an index
# never sees half of it. The device runs on little-endian hosts only, as its protocol does.
_U16 = struct.Struct("H")


class MemoryFault(Exception):
    """The guest named memory that it does not have, or may not be accessed in this way."""


class MemoryAbsent(Exception):
    """The memory is not mapped at present. Nothing is wrong: try again after the next map."""


class MessageAccess(Protocol):
    """Access to client memory by message, each call one or more round trips."""

    def read(self, address: int, count: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


class Segment(NamedTuple):
    """`length` bytes at IOVA `address`; `view` is our own mapping of them, None: use messages."""

    address: int
    length: int
    view: memoryview | None


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    start: int
    end: int
    flags: int
    mapping: mmap.mmap | None
    view: memoryview | None


class GuestMemory:
    """The DMA map of one client. Reading and writing is safe from any thread."""

    def __init__(self, log: DirtyLog | None = None) -> None:
        self._log = log
        self._messages: MessageAccess | None = None
        # Replaced as a whole, never changed: readers need no lock.
        self._table: tuple[list[int], list[_Region]] = ([], [])
        self._absent: list[tuple[int, int]] = []
        self._settled = False

    def attach(self, messages: MessageAccess) -> None:
        """A client came. Its map is empty and about to be set up."""
        self._messages = messages
        self._settled = False

    def lose(self) -> None:
        """The client went: from now on every access finds its memory absent."""
        self._messages = None

    def settle(self) -> None:
        """The driver is at work, so whatever is not mapped now does not exist."""
        if self._table[1]:
            self._settled = True

    def unsettle(self) -> None:
        """Addresses are known before their memory is mapped (a state was loaded)."""
        self._settled = False

    def forget_absent(self) -> None:
        """The driver was reset and refers to nothing any more."""
        self._absent.clear()

    def map(self, request: DmaMap, fd: int | None) -> None:
        """Add a region. Owns `fd` when it returns. Raises `VfioUserError`."""
        mapping = view = None
        if fd is not None:
            mapping = _map_descriptor(request, fd)
            skip = _skip(request, fd)
            view = memoryview(mapping)[skip : skip + request.size]
            os.close(fd)
        region = _Region(request.address, request.end, request.flags, mapping, view)
        self._replace([*self._table[1], region])
        self._absent = _subtract(self._absent, region.start, region.end)

    def unmap(self, address: int, size: int) -> None:
        """Remove the region with exactly this range. Raises `VfioUserError` if there is none."""
        for region in self._table[1]:
            if (region.start, region.end) == (address, address + size):
                self._replace([other for other in self._table[1] if other is not region])
                _release(region)
                self._absent.append((region.start, region.end))
                del self._absent[:-MAX_ABSENT_RANGES]
                return
        raise VfioUserError(errno.ENOENT, f"no region of {size} bytes at {address:#x}")

    def unmap_all(self) -> None:
        """Remove every region; all of it is absent until the client has set up a new map."""
        regions = self._table[1]
        self._replace([])
        for region in regions:
            _release(region)
        self._settled = False

    def segments(self, address: int, length: int, flags: DmaFlags) -> list[Segment]:
        """The parts of a range, in order, checked for access by `flags`.

        Raises `MemoryFault` or `MemoryAbsent` if the range is not mapped from end to end.
        """
        segments = []
        end = address + length
        while address < end:
            region = self._region_at(address, flags)
            stop = min(end, region.end)
            view = region.view
            if view is not None:
                view = view[address - region.start : stop - region.start]
            segments.append(Segment(address, stop - address, view))
            address = stop
        return segments

    def read(self, address: int, length: int) -> bytes:
        """A copy of a range. Raises as `segments` does."""
        return b"".join(
            self.read_segment(segment) for segment in self.segments(address, length, DmaFlags.READ)
        )

    def write(self, address: int, data: bytes) -> None:
        """Write and log. Raises as `segments` does, and then nothing was written."""
        at = 0
        for segment in self.segments(address, len(data), DmaFlags.WRITE):
            self.write_segment(segment, data[at : at + segment.length])
            at += segment.length

    def read_u16(self, address: int) -> int:
        """A little-endian number at an even address, read at once. Raises as `segments` does."""
        region = self._region_at(address, DmaFlags.READ)
        if region.view is None:
            return int.from_bytes(self.read(address, 2), "little")
        self.require_client()
        if address + 2 > region.end:
            raise MemoryFault(f"a number at {address:#x} leaves its region")
        value: int = _U16.unpack_from(region.view, address - region.start)[0]
        return value

    def write_u16(self, address: int, value: int) -> None:
        """Write a number at an even address at once, and log it. Raises as `segments` does."""
        region = self._region_at(address, DmaFlags.WRITE)
        if region.view is None:
            self.write(address, value.to_bytes(2, "little"))
            return
        self.require_client()
        if address + 2 > region.end:
            raise MemoryFault(f"a number at {address:#x} leaves its region")
        at = address - region.start
        # Not pack_into, which zeroes the bytes first: a driver would see a ring index of 0.
        region.view[at : at + 2] = value.to_bytes(2, "little")
        self.mark(address, 2)

    def read_segment(self, segment: Segment) -> bytes:
        """A copy of a segment. Raises `MemoryFault` or `MemoryAbsent`."""
        messages = self.require_client()
        if segment.view is not None:
            return bytes(segment.view)
        try:
            return messages.read(segment.address, segment.length)
        except VfioUserError as error:
            raise MemoryFault(f"the client refused to read: {error}") from error
        except Disconnected as error:
            raise MemoryAbsent("the client went") from error

    def write_segment(self, segment: Segment, data: bytes | memoryview) -> None:
        """Fill a segment and log it. `data` has its length. Raises as `read_segment` does."""
        messages = self.require_client()
        if segment.view is not None:
            segment.view[:] = data
            self.mark(segment.address, segment.length)
            return
        try:
            messages.write(segment.address, bytes(data))
        except VfioUserError as error:
            raise MemoryFault(f"the client refused to write: {error}") from error
        except Disconnected as error:
            raise MemoryAbsent("the client went") from error

    def mark(self, address: int, length: int) -> None:
        """Log a write that was made through a segment's `view`, once it is complete."""
        if self._log is not None:
            self._log.mark(address, length)

    def require_client(self) -> MessageAccess:
        """Raise `MemoryAbsent` if the client went; a `view` must not be used any more then."""
        if self._messages is None:
            raise MemoryAbsent("there is no client")
        return self._messages

    def _region_at(self, address: int, flags: DmaFlags) -> _Region:
        starts, regions = self._table
        at = bisect_right(starts, address) - 1
        if at < 0 or address >= regions[at].end:
            if not self._settled or any(low <= address < high for low, high in self._absent):
                raise MemoryAbsent(f"{address:#x} is not mapped at present")
            raise MemoryFault(f"there is no memory at {address:#x}")
        if not regions[at].flags & flags:
            raise MemoryFault(f"memory at {address:#x} is not for this")
        return regions[at]

    def _replace(self, regions: list[_Region]) -> None:
        regions.sort(key=lambda region: region.start)
        self._table = ([region.start for region in regions], regions)


def _release(region: _Region) -> None:
    if region.view is not None and region.mapping is not None:
        region.view.release()
        # A traceback that somebody keeps may still hold a view of the mapping, which is never
        # looked at again; the mapping goes with it.
        with contextlib.suppress(BufferError):
            region.mapping.close()


def _map_descriptor(request: DmaMap, fd: int) -> mmap.mmap:
    prot = 0
    if request.flags & DmaFlags.READ:
        prot |= mmap.PROT_READ
    if request.flags & DmaFlags.WRITE:
        # A page that cannot be read cannot be written by parts on every architecture.
        prot |= mmap.PROT_READ | mmap.PROT_WRITE
    try:
        # `mmap` itself refuses what lies behind the end of the file and would be a SIGBUS later.
        skip, page_bytes = _skip(request, fd), page_bytes_of(fd)
        size = request.size + skip
        if page_bytes > PAGE_BYTES:
            size = -(-size // page_bytes) * page_bytes
        offset = request.offset - skip
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=prot, offset=offset)
    except (OSError, ValueError, OverflowError) as error:
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        raise VfioUserError(code, f"the region cannot be mapped: {error}") from error


def _skip(request: DmaMap, fd: int) -> int:
    """What has to be mapped before the region: a file of huge pages is mapped in whole ones."""
    page_bytes = page_bytes_of(fd)
    return request.offset % page_bytes if page_bytes > PAGE_BYTES else 0


def _subtract(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    left = []
    for low, high in ranges:
        if end <= low or high <= start:
            left.append((low, high))
            continue
        if low < start:
            left.append((low, start))
        if end < high:
            left.append((end, high))
    return left
