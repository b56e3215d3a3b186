"""The DMA map: which guest memory the VMM has shared, and access to it by address.

Owned here: the regions, our own duplicates of their descriptors and our own mappings of them; and
the flat page space (the regions with a descriptor; see `sync.memory`). Not owned: what the device
has been told of a region (`jobs`, `snoops` note it in `at_device`), and which pages are dirty
(`bitmap`).
"""

import bisect
import errno
import mmap
import os
import stat
from enum import Enum
from typing import NamedTuple

from sync.bounce import Bounce, cannot_shrink
from sync.gateway.errors import LayoutUnaligned
from sync.memory import MAX_PAGES, PAGE_BYTES, Slots, page_bytes_of
from sync.vfio_user.errors import errno_text
from sync.vfio_user.protocol import DmaFlags, DmaMap

MAX_REGIONS = 8192
"""Each may take a descriptor of ours; QEMU uses some twenty."""

_READ, _WRITE = int(DmaFlags.READ), int(DmaFlags.WRITE)


class DmaFault(Exception):
    """An access or a change of the map is refused; `errno` goes into the error reply."""

    def __init__(self, number: int) -> None:
        super().__init__(errno_text(number))
        self.errno = number


class AtDevice(Enum):
    """How the device knows a region."""

    NOT = 0
    DIRECT = 1
    """As the VMM gave it."""
    MESSAGE = 2
    """Without its descriptor: the device has to ask us for every access."""


class FlatRegion(NamedTuple):
    """A region in the flat page space. The descriptor stays the map's."""

    iova: int
    length: int
    offset: int
    writable: bool
    descriptor: int
    first_page: int


class DmaRegion:
    """`size` bytes at DMA address `address`. Owns `descriptor` (or None) and the mapping of it."""

    __slots__ = (
        "_map",
        "_skip",
        "_sound",
        "address",
        "at_device",
        "descriptor",
        "end",
        "page_bytes",
        "request",
    )

    def __init__(
        self, request: DmaMap, descriptor: int | None, page_bytes: int = PAGE_BYTES
    ) -> None:
        """`page_bytes`: the size of the pages in which the file can be mapped."""
        self.page_bytes = page_bytes
        self.request = request
        self.address = request.address
        self.end = request.end
        self.descriptor = descriptor
        self.at_device = AtDevice.NOT
        self._map: mmap.mmap | None = None
        self._skip = 0
        self._sound = descriptor is not None and cannot_shrink(descriptor)

    def mapping(self) -> tuple[mmap.mmap, int]:
        """Our mapping and the place of the region's first byte in it, made when first needed.

        Raises `DmaFault` if the file cannot be mapped or is too short. Who else has the file may
        cut it short at any time: the mapping is touched by `read` and `write` only.
        """
        if self._map is None:
            if self.descriptor is None:
                raise DmaFault(errno.EFAULT)
            self._skip = self.request.offset % self.page_bytes
            protection = mmap.PROT_READ
            if self.request.flags & _WRITE:
                protection |= mmap.PROT_WRITE
            try:
                self._map = mmap.mmap(
                    self.descriptor,
                    self._mapped_bytes(self.request.size + self._skip),
                    mmap.MAP_SHARED,
                    protection,
                    offset=self.request.offset - self._skip,
                )
            except (OSError, ValueError, OverflowError) as error:
                raise DmaFault(errno.EFAULT) from error
        return self._map, self._skip

    def read(self, offset: int, size: int, bounce: Bounce) -> bytes:
        """`size` bytes at `offset` of the region. Raises `DmaFault`."""
        memory, skip = self.mapping()
        start = skip + offset
        if self._sound:
            return memory[start : start + size]
        try:
            return bounce.read(memory, start, size)
        except OSError as error:
            raise DmaFault(errno.EFAULT) from error

    def write(self, offset: int, data: bytes | memoryview, bounce: Bounce) -> None:
        """Writes `data` at `offset` of the region. Raises `DmaFault`."""
        memory, skip = self.mapping()
        start = skip + offset
        if self._sound:
            memory[start : start + len(data)] = data
            return
        try:
            bounce.write(memory, start, data)
        except OSError as error:
            raise DmaFault(errno.EFAULT) from error

    def _mapped_bytes(self, size: int) -> int:
        """Part of a huge page can be mapped, but not unmapped."""
        return (
            size if self.page_bytes == PAGE_BYTES else -(-size // self.page_bytes) * self.page_bytes
        )

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class DmaMemory:
    """The regions of one VMM connection, by address. `generation` goes up with each change of those
    that have a descriptor: the others have no pages that anybody tracks."""

    def __init__(self, generation: int = 0) -> None:
        self._bounce = Bounce()
        self._starts: list[int] = []
        self._regions: list[DmaRegion] = []
        self.generation = generation

    @property
    def regions(self) -> list[DmaRegion]:
        return list(self._regions)

    def add(self, request: DmaMap, descriptor: int | None) -> DmaRegion:
        """Takes a region in; owns `descriptor` from here on, if it does not raise.

        Raises `DmaFault`: EEXIST over another region, ENOSPC for too many, EINVAL when the file is
        shorter than the region.
        """
        index = bisect.bisect_right(self._starts, request.address)
        overlaps = (index > 0 and self._regions[index - 1].end > request.address) or (
            index < len(self._regions) and self._regions[index].address < request.end
        )
        if overlaps:
            raise DmaFault(errno.EEXIST)
        if len(self._regions) >= MAX_REGIONS:
            raise DmaFault(errno.ENOSPC)
        page_bytes = PAGE_BYTES
        if descriptor is not None:
            status = os.fstat(descriptor)
            page_bytes = page_bytes_of(descriptor)
            too_short = status.st_size < request.offset + request.size
            if stat.S_ISREG(status.st_mode) and too_short:
                raise DmaFault(errno.EINVAL)
        region = DmaRegion(request, descriptor, page_bytes)
        self._starts.insert(index, request.address)
        self._regions.insert(index, region)
        self.generation += descriptor is not None
        return region

    def take_back(self, region: DmaRegion) -> None:
        """Undoes `add`, the last change: the device has refused the region."""
        generation = self.generation - (region.descriptor is not None)
        self.remove(region)
        self.generation = generation

    def exactly(self, address: int, size: int) -> DmaRegion:
        """The region with just this address and size. Raises `DmaFault` (ENOENT)."""
        index = bisect.bisect_left(self._starts, address)
        if index < len(self._regions) and self._starts[index] == address:
            region = self._regions[index]
            if region.request.size == size:
                return region
        raise DmaFault(errno.ENOENT)

    def remove(self, region: DmaRegion) -> None:
        """Forgets a region and closes what it owns."""
        index = bisect.bisect_left(self._starts, region.address)
        del self._starts[index], self._regions[index]
        self.generation += region.descriptor is not None
        region.close()

    def close(self) -> None:
        """Forgets every region, and is of no further use."""
        for region in self.regions:
            self.remove(region)
        self._bounce.close()

    def find(self, address: int) -> DmaRegion:
        """The region that the device knows and that holds `address`. Raises `DmaFault` (EFAULT)."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index >= 0:
            region = self._regions[index]
            if address < region.end and region.at_device is not AtDevice.NOT:
                return region
        raise DmaFault(errno.EFAULT)

    def spans(self, address: int, count: int, permission: int) -> list[tuple[DmaRegion, int, int]]:
        """The pieces (region, offset in it, bytes) of an access; all of them checked.

        Raises `DmaFault`: EFAULT where the device knows no region, EACCES without `permission`.
        """
        pieces: list[tuple[DmaRegion, int, int]] = []
        end = address + count
        while address < end:
            region = self.find(address)
            if not region.request.flags & permission:
                raise DmaFault(errno.EACCES)
            piece = min(end, region.end) - address
            pieces.append((region, address - region.address, piece))
            address += piece
        return pieces

    def read(self, address: int, count: int) -> bytes:
        """`count` bytes of guest memory. Raises `DmaFault`."""
        parts = []
        for region, offset, size in self.spans(address, count, _READ):
            parts.append(region.read(offset, size, self._bounce))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Writes guest memory: all of `data` or nothing, unless a file was cut short. Raises
        `DmaFault`."""
        spans = self.spans(address, len(data), _WRITE)
        for region, _, _ in spans:
            region.mapping()
        position = 0
        for region, offset, size in spans:
            region.write(offset, data[position : position + size], self._bounce)
            position += size

    def flat(self) -> list[FlatRegion]:
        """The regions of the flat page space, in order. Raises `LayoutUnaligned`."""
        flat: list[FlatRegion] = []
        slots = Slots()
        for region in self._regions:
            if region.descriptor is None:
                continue
            request = region.request
            if (request.address | request.size | request.offset) % PAGE_BYTES:
                raise LayoutUnaligned(
                    f"the region of {request.size:#x} bytes at {request.address:#x} (offset "
                    f"{request.offset:#x}) does not begin and end at pages of {PAGE_BYTES} bytes"
                )
            flat.append(
                FlatRegion(
                    request.address,
                    request.size,
                    request.offset,
                    bool(request.flags & _WRITE),
                    region.descriptor,
                    slots.place(request.offset, request.size, region.page_bytes),
                )
            )
        if slots.n_pages > MAX_PAGES:
            raise LayoutUnaligned(f"the guest has more than {MAX_PAGES} pages")
        return flat
