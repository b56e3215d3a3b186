"""The guest's RAM: a memfd, its guest-physical map, and the VMM's own view of what is dirty.

    address                     memfd offset      mapped for DMA
    0          - 640 KiB        the same          yes
    640 KiB    - 1 MiB          the same          no
    1 MiB      - low_bytes      the same          yes
    4 GiB      - + high_bytes   low_bytes + ...   yes

Page numbers here count pages of the memfd. Dirty tracking sees what goes through `store`, `write`,
`fill_from` and `mark`, which is what the CPU writes. A device that writes through its own mapping
is not seen, as QEMU does not see it.
"""

import contextlib
import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lab.guest.errors import RamError
from sync.memory import PAGE_BYTES

LOW_DMA_END = 640 << 10
LOW_DMA_RESTART = 1 << 20
HIGH_BASE = 4 << 30

Pages = npt.NDArray[np.uint32]


class DmaRegion(NamedTuple):
    """A range of guest-physical memory and where it lies in the memfd; all in bytes."""

    address: int
    size: int
    offset: int


class Ram:
    """RAM of `low_bytes` + `high_bytes`. One thread writes as the CPU, another may take_dirty."""

    def __init__(self, low_bytes: int, high_bytes: int) -> None:
        self._low = low_bytes
        self._high = high_bytes
        self.size = low_bytes + high_bytes
        self.n_pages = self.size // PAGE_BYTES
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._mmap = mmap.mmap(self.fd, self.size)
        self._memory = memoryview(self._mmap)
        self._dirty = bytearray(self.n_pages)
        self._dirty_array = np.frombuffer(self._dirty, np.uint8)

    @property
    def dma_regions(self) -> tuple[DmaRegion, ...]:
        return (
            DmaRegion(0, LOW_DMA_END, 0),
            DmaRegion(LOW_DMA_RESTART, self._low - LOW_DMA_RESTART, LOW_DMA_RESTART),
            DmaRegion(HIGH_BASE, self._high, self._low),
        )

    def view(self, address: int, length: int) -> memoryview:
        """The memory itself, to read from. Raises `RamError` if it is not all there."""
        offset = self._offset(address, length)
        return self._memory[offset : offset + length].toreadonly()

    def load(self, address: int, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack_from(self._memory, self._offset(address, layout.size))

    def store(self, address: int, layout: struct.Struct, *values: int) -> None:
        """Packs `values` at `address`, as the CPU."""
        offset = self._offset(address, layout.size)
        # Not pack_into, which zeroes the bytes first: a device would see a ring index of 0.
        self._memory[offset : offset + layout.size] = layout.pack(*values)
        self._mark(offset, layout.size)

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Copies `data` to `address`, as the CPU."""
        offset = self._offset(address, len(data))
        self._memory[offset : offset + len(data)] = data
        self._mark(offset, len(data))

    def fill_from(self, fd: int, position: int, address: int, length: int) -> int:
        """Reads up to `length` bytes of a file to `address`, as the CPU; returns how many."""
        offset = self._offset(address, length)
        done = os.preadv(fd, [self._memory[offset : offset + length]], position)
        self._mark(offset, done)
        return done

    def mark_all(self) -> None:
        """Everything is to be sent."""
        self._dirty_array[:] = 1

    def dirty_pages(self) -> int:
        """How many pages are dirty."""
        return int(np.count_nonzero(self._dirty_array))

    def dirty_indices(self) -> Pages:
        """The dirty pages, ascending. They stay dirty until they are `clean`ed."""
        # A copy: numpy counts first and gives up if the CPU marks a page before it collects.
        return np.flatnonzero(self._dirty_array.copy()).astype(np.uint32)

    def clean(self, pages: Pages) -> None:
        """Forgets that `pages` are dirty. To be called before they are read (I1): a page that is
        written meanwhile is marked again, after the write."""
        self._dirty_array[pages] = 0

    def copy_pages(self, pages: Pages) -> npt.NDArray[np.uint8]:
        """A private copy of `pages`: uint8 [len(pages), PAGE_BYTES]."""
        copy: npt.NDArray[np.uint8] = self._pages()[pages]
        return copy

    def put_pages(self, pages: Pages, data: npt.NDArray[np.uint8]) -> None:
        """Overwrites `pages` with uint8 [len(pages), PAGE_BYTES], as the VMM that loads them."""
        self._check_pages(pages)
        self._pages()[pages] = data

    def zero_pages(self, pages: Pages) -> None:
        """As `put_pages` with zeros; does not touch a page that is zero already."""
        self._check_pages(pages)
        array = self._pages()
        array[pages[array[pages].any(axis=1)]] = 0

    def close(self) -> None:
        os.close(self.fd)
        with contextlib.suppress(BufferError):
            # Somebody may still hold a view; then the mapping lives as long as that.
            self._memory.release()
            self._mmap.close()

    def _pages(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8).reshape(self.n_pages, PAGE_BYTES)

    def _check_pages(self, pages: Pages) -> None:
        if len(pages) and int(pages.max()) >= self.n_pages:
            raise RamError(f"page {int(pages.max())} does not exist")

    def _offset(self, address: int, length: int) -> int:
        if address >= 0 and address + length <= self._low:
            return address
        offset = address - HIGH_BASE
        if offset >= 0 and offset + length <= self._high:
            return self._low + offset
        raise RamError(f"no RAM for {length} bytes at {address:#x}")

    def _mark(self, offset: int, length: int) -> None:
        # After the write, so that whoever cleans before it reads cannot miss it.
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        if first == last:
            self._dirty[first] = 1
        elif length > 0:
            self._dirty[first : last + 1] = b"\1" * (last + 1 - first)
