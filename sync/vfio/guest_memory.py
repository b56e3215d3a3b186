"""Guest memory as a function of the host reaches it: our mappings, pinned in the IOMMU.

Owns the mapping of each region and what of it the function is shown. A region without a descriptor
cannot be mapped, and no function reaches it.
"""

import bisect
import ctypes
import errno
import mmap
import os
import time
from dataclasses import dataclass

from sync.bounce import Bounce
from sync.memory import PAGE_BYTES, page_bytes_of
from sync.queues.errors import MemoryUnreadable
from sync.vfio.device import VfioDevice
from sync.vfio.errors import MemoryNotPinned
from sync.vfio.user_device import UserDevice
from sync.vfio_user.protocol import DmaFlags, DmaMap, VfioUserError


@dataclass(frozen=True, slots=True)
class _Region:
    size: int
    memory: mmap.mmap | None
    shift: int
    """Where in the mapping it begins."""


class PinnedMemory:
    """What one function is shown, by address."""

    def __init__(self, device: VfioDevice | UserDevice) -> None:
        self._device = device
        self._bounce = Bounce()
        self._starts: list[int] = []
        self._regions: dict[int, _Region] = {}
        self.pin_ns_per_page = 0.0
        """What it took to show the device a page, of all that it was shown."""
        self._pinned_pages = 0
        self._had_descriptor: set[tuple[int, int]] = set()

    def map(self, request: DmaMap, fd: int | None) -> None:
        """Show the function a region. Raises `VfioUserError`, `MemoryNotPinned`."""
        key = request.address, request.size
        if request.address in self._regions:
            raise VfioUserError(errno.EEXIST)
        if fd is None:
            if key in self._had_descriptor:
                # Hardware asks nobody: a region taken away to be asked for would just be gone.
                raise VfioUserError(errno.ENOTSUP, "hardware cannot reach memory by message")
            self._add(request, None, 0)
            return
        try:
            # A file of huge pages can be mapped in whole ones only, and regions end in between.
            page_bytes = page_bytes_of(fd)
            shift = request.offset % page_bytes
            length = -(-(shift + request.size) // page_bytes) * page_bytes
            memory = mmap.mmap(fd, length, offset=request.offset - shift)
        except (OSError, ValueError, OverflowError):
            # A ROM whose descriptor is not for writing: nothing that a device is given.
            self._add(request, None, 0)
            return
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + shift
        began = time.perf_counter_ns()
        writable = bool(request.flags & DmaFlags.WRITE)
        try:
            self._device.map_dma(
                request.address,
                request.size,
                address,
                writable=writable,
                file=(fd, request.offset),
            )
        except MemoryNotPinned:
            memory.close()
            raise
        self._took(time.perf_counter_ns() - began, request.size)
        self._had_descriptor.add(key)
        self._add(request, memory, shift)

    def unmap(self, address: int, size: int) -> None:
        """Take a region away; the function cannot reach it any more (I4)."""
        region = self._regions.get(address)
        if region is None or region.size != size:
            raise VfioUserError(errno.ENOENT)
        if region.memory is not None:
            self._device.unmap_dma(address, size)
            region.memory.close()
        del self._regions[address]
        self._starts.remove(address)

    def unmap_all(self) -> None:
        for address in list(self._starts):
            self.unmap(address, self._regions[address].size)

    def close(self) -> None:
        """Take all away; of no further use."""
        try:
            self.unmap_all()
        finally:
            self._bounce.close()

    def extent(self) -> list[tuple[int, int]]:
        """IOVA and length of one range that has all of it."""
        if not self._starts:
            return []
        end = max(start + region.size for start, region in self._regions.items())
        return [(self._starts[0], end - self._starts[0])]

    def read(self, iova: int, length: int) -> bytes:
        """A copy. Raises `MemoryUnreadable`."""
        parts = []
        while length:
            memory, at, room = self._find(iova)
            count = min(length, room)
            try:
                parts.append(self._bounce.read(memory, at, count))
            except OSError as error:
                raise _unreadable(iova, error) from error
            iova, length = iova + count, length - count
        return b"".join(parts)

    def write(self, iova: int, data: bytes) -> None:
        """Raises `MemoryUnreadable`."""
        while data:
            memory, at, room = self._find(iova)
            count = min(len(data), room)
            try:
                self._bounce.write(memory, at, data[:count])
            except OSError as error:
                raise _unreadable(iova, error) from error
            iova, data = iova + count, data[count:]

    def _find(self, iova: int) -> tuple[mmap.mmap, int, int]:
        """A mapping, where in it the address is, and how much of the region follows."""
        index = bisect.bisect_right(self._starts, iova) - 1
        if index >= 0:
            start = self._starts[index]
            region, at = self._regions[start], iova - start
            if region.memory is not None and at < region.size:
                return region.memory, region.shift + at, region.size - at
        raise MemoryUnreadable(f"{iova:#x} is no guest memory")

    def _took(self, ns: int, size: int) -> None:
        pages = max(1, size // PAGE_BYTES)
        total_ns = self.pin_ns_per_page * self._pinned_pages + ns
        self._pinned_pages += pages
        self.pin_ns_per_page = total_ns / self._pinned_pages

    def _add(self, request: DmaMap, memory: mmap.mmap | None, shift: int) -> None:
        self._regions[request.address] = _Region(request.size, memory, shift)
        bisect.insort(self._starts, request.address)


def _unreadable(iova: int, error: OSError) -> MemoryUnreadable:
    return MemoryUnreadable(f"guest memory at {iova:#x} is not there: {error.strerror}")


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
