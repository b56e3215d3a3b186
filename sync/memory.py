"""Guest memory as one array: maps the regions of a memory map side by side.

Owned here: the reservation, the mappings in it, and the arithmetic between an IOVA and a page of
the flat page space (the regions by IOVA, one after the other). Not owned: where the regions come
from (`sync.gateway`), and who writes to them.
"""

import bisect
import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from sync.errors import SyncError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_BYTES = 4096
MAX_PAGES = 1 << 32
"""Page numbers are uint32: 16 TiB of guest memory."""

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class GuestMemoryError(SyncError):
    """The guest's memory cannot be mapped as one array."""


class MemoryRegion(NamedTuple):
    """A range of guest memory: `length` bytes at `iova` are the file `fd` from `offset` on.

    `writable` says whether the device may write there.
    """

    iova: int
    length: int
    offset: int
    writable: bool
    fd: int


class GuestMemory:
    """The regions of one guest in one contiguous mapping.

    `array` is uint8 of shape (n_pages * 4096,), `layout` the (iova, length) of each region in it.
    `files` says what is behind the pages: (first page, number of pages, descriptor of ours, byte of
    the file); a region whose file cannot be opened again is missing there. No array made from it
    and no descriptor may be used after `close`.
    """

    array: "NDArray[np.uint8]"

    def __init__(
        self,
        address: int,
        layout: tuple[tuple[int, int], ...],
        files: tuple[tuple[int, int, int, int], ...],
        writable: bool,
    ) -> None:
        import numpy as np

        self._address = address
        self.layout = layout
        self.files = files
        self.n_pages = sum(length for _, length in layout) // PAGE_BYTES
        self._starts = [iova for iova, _ in layout]
        self._first_pages: list[int] = []
        pages = 0
        for _, length in layout:
            self._first_pages.append(pages)
            pages += length // PAGE_BYTES
        buffer = (ctypes.c_uint8 * (self.n_pages * PAGE_BYTES)).from_address(address)
        self.array = np.ctypeslib.as_array(buffer)
        self.array.flags.writeable = writable

    @classmethod
    def map(cls, regions: Iterable[MemoryRegion], *, writable: bool = False) -> Self:
        """Maps `regions` shared, in the order of their IOVA; their descriptors stay the caller's.

        `writable` holds for the whole array, also for regions that the device may only read (a
        migration fills those, too). Raises `GuestMemoryError` if there is no region, if one does
        not begin and end at pages, overlaps another, reaches behind the end of its file (touching
        that would be a SIGBUS) or cannot be mapped.
        """
        ordered = sorted(regions)
        _check(ordered)
        total = sum(region.length for region in ordered)
        address = _mmap(None, total, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        position = address
        try:
            for region in ordered:
                flags = mmap.MAP_SHARED | _MAP_FIXED
                _mmap(position, region.length, protection, flags, region.fd, region.offset)
                position += region.length
        except GuestMemoryError:
            _libc.munmap(address, total)
            raise
        layout = tuple((region.iova, region.length) for region in ordered)
        return cls(address, layout, tuple(_open_again(ordered, writable)), writable)

    def page_of(self, iova: int) -> int:
        """The page number of the page that holds `iova`. Raises `GuestMemoryError` if none does."""
        index = bisect.bisect_right(self._starts, iova) - 1
        if index >= 0:
            start, length = self.layout[index]
            if iova < start + length:
                return self._first_pages[index] + (iova - start) // PAGE_BYTES
        raise GuestMemoryError(f"{iova:#x} is in no region of the guest's memory")

    def close(self) -> None:
        """Unmaps everything."""
        if self._address:
            del self.array
            _libc.munmap(self._address, self.n_pages * PAGE_BYTES)
            self._address = 0
            for _, _, descriptor, _ in self.files:
                os.close(descriptor)
            self.files = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check(ordered: list[MemoryRegion]) -> None:
    if not ordered:
        raise GuestMemoryError("the guest has no memory with a descriptor")
    end = 0
    for region in ordered:
        what = f"the region of {region.length} bytes at {region.iova:#x}"
        if min(region.iova, region.length, region.offset) < 0 or region.length == 0:
            raise GuestMemoryError(f"{what} makes no sense")
        if region.iova % PAGE_BYTES or region.length % PAGE_BYTES or region.offset % PAGE_BYTES:
            raise GuestMemoryError(f"{what} does not begin and end at pages")
        if region.iova < end:
            raise GuestMemoryError(f"{what} overlaps the one before it")
        end = region.iova + region.length
        try:
            file_bytes = os.fstat(region.fd).st_size
        except OSError as error:
            raise GuestMemoryError(f"{what} has no usable descriptor: {error.strerror}") from error
        if region.offset + region.length > file_bytes:
            raise GuestMemoryError(f"{what} reaches behind the end of its file")
    if sum(region.length for region in ordered) > MAX_PAGES * PAGE_BYTES:
        raise GuestMemoryError(f"the guest has more than {MAX_PAGES} pages")


def _open_again(
    ordered: Iterable[MemoryRegion], writable: bool
) -> Iterator[tuple[int, int, int, int]]:
    """The files of regions; opened, not duplicated, so that their position is not the owner's."""
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    first_page = 0
    for region in ordered:
        n_pages = region.length // PAGE_BYTES
        with contextlib.suppress(OSError):
            descriptor = os.open(f"/proc/self/fd/{region.fd}", flags)
            yield first_page, n_pages, descriptor, region.offset
        first_page += n_pages


def _mmap(
    address: int | None, length: int, protection: int, flags: int, fd: int, offset: int
) -> int:
    mapped = _libc.mmap(address, length, protection, flags | _MAP_NORESERVE, fd, offset)
    if mapped is None or mapped == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise GuestMemoryError(f"{length} bytes of guest memory cannot be mapped: {reason}")
    return int(mapped)
