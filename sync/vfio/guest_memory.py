"""Guest memory as a function of the host reaches it: our mappings, pinned in the IOMMU.

Owns the mapping of each region and what of it the function is shown. A region without a descriptor
cannot be mapped, and no function reaches it.
"""

import bisect
import ctypes
import errno
import mmap
import os

from sync.bounce import Bounce
from sync.queues.errors import MemoryUnreadable
from sync.vfio.device import VfioDevice
from sync.vfio.errors import MemoryNotPinned
from sync.vfio.user_device import UserDevice
from sync.vfio_user.protocol import DmaFlags, DmaMap, VfioUserError


class PinnedMemory:
    """What one function is shown, by address."""

    def __init__(self, device: VfioDevice | UserDevice) -> None:
        self._device = device
        self._bounce = Bounce()
        self._starts: list[int] = []
        self._regions: dict[int, tuple[int, mmap.mmap | None]] = {}
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
            self._add(request, None)
            return
        try:
            memory = mmap.mmap(fd, request.size, offset=request.offset)
        except (OSError, ValueError, OverflowError):
            # A ROM whose descriptor is not for writing: nothing that a device is given.
            self._add(request, None)
            return
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
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
        self._had_descriptor.add(key)
        self._add(request, memory)

    def unmap(self, address: int, size: int) -> None:
        """Take a region away; the function cannot reach it any more (I4)."""
        known, memory = self._regions.get(address, (0, None))
        if known != size:
            raise VfioUserError(errno.ENOENT)
        if memory is not None:
            self._device.unmap_dma(address, size)
            memory.close()
        del self._regions[address]
        self._starts.remove(address)

    def unmap_all(self) -> None:
        for address in list(self._starts):
            self.unmap(address, self._regions[address][0])

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
        end = max(start + size for start, (size, _) in self._regions.items())
        return [(self._starts[0], end - self._starts[0])]

    def read(self, iova: int, length: int) -> bytes:
        """A copy. Raises `MemoryUnreadable`."""
        parts = []
        while length:
            memory, at, size = self._find(iova)
            count = min(length, size - at)
            try:
                parts.append(self._bounce.read(memory, at, count))
            except OSError as error:
                raise _unreadable(iova, error) from error
            iova, length = iova + count, length - count
        return b"".join(parts)

    def write(self, iova: int, data: bytes) -> None:
        """Raises `MemoryUnreadable`."""
        while data:
            memory, at, size = self._find(iova)
            count = min(len(data), size - at)
            try:
                self._bounce.write(memory, at, data[:count])
            except OSError as error:
                raise _unreadable(iova, error) from error
            iova, data = iova + count, data[count:]

    def _find(self, iova: int) -> tuple[mmap.mmap, int, int]:
        index = bisect.bisect_right(self._starts, iova) - 1
        if index >= 0:
            start = self._starts[index]
            size, memory = self._regions[start]
            if memory is not None and iova < start + size:
                return memory, iova - start, size
        raise MemoryUnreadable(f"{iova:#x} is no guest memory")

    def _add(self, request: DmaMap, memory: mmap.mmap | None) -> None:
        self._regions[request.address] = request.size, memory
        bisect.insort(self._starts, request.address)


def _unreadable(iova: int, error: OSError) -> MemoryUnreadable:
    return MemoryUnreadable(f"guest memory at {iova:#x} is not there: {error.strerror}")


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
