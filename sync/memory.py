"""Guest memory as one array: maps the regions of a memory map side by side.

Owned here: the reservation, the mappings in it, and the arithmetic between an IOVA and a page of
the flat page space. Not owned: where the regions come from (`sync.gateway`), and who writes there.

The flat page space has the regions by IOVA, one after the other. A file of huge pages can be mapped
in whole huge pages only, and regions do not begin and end there (QEMU's are cut at 640 KiB): each
gets the huge pages that it has a part in, so that pages lie between two regions that no region
holds (`Slots`).
"""

import bisect
import contextlib
import ctypes
import mmap
import os
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from sync.errors import SyncError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_BYTES = 4096
MAX_PAGES = 1 << 32
"""Page numbers are uint32: 16 TiB of guest memory."""

_HUGETLBFS = 0x958458F6
"""Linux's magic number of the file system, HUGETLBFS_MAGIC."""
MAX_HUGE_PAGE_BYTES = 1 << 34
"""The largest page of any processor that Linux runs on (16 GiB, POWER)."""

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
_libc.fstatfs.restype = ctypes.c_int
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def page_bytes_of(fd: int) -> int:
    """The size of the pages in which the file `fd` can be mapped: 4096, or a huge page's.

    Raises `OSError`.
    """
    answer = (ctypes.c_long * 32)()
    if _libc.fstatfs(fd, answer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    kind, block_bytes = answer[0], answer[1]
    return block_bytes if kind & 0xFFFF_FFFF == _HUGETLBFS else PAGE_BYTES


class Slots:
    """Gives each region its place in the flat page space, in the order of their IOVA."""

    def __init__(self) -> None:
        self.n_pages = 0
        """Of all regions and what lies between them."""
        self.n_bytes = 0
        """Of all that has to be mapped for them: it may end behind the last region."""

    def place(self, offset: int, length: int, page_bytes: int) -> int:
        """The first page of a region of `length` bytes at byte `offset` of a file that is mapped in
        pages of `page_bytes`."""
        start = _round_up(self.n_bytes, page_bytes) + offset % page_bytes
        self.n_pages = (start + length) // PAGE_BYTES
        self.n_bytes = _round_up(start + length, page_bytes)
        return start // PAGE_BYTES


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class GuestMemoryError(SyncError):
    """The guest's memory cannot be mapped as one array."""


class MemoryRegion(NamedTuple):
    """A range of guest memory: `length` bytes at `iova` are the file `fd` from `offset` on.

    `writable` says whether the device may write there; `page_bytes`, the size of the pages by which
    the region gets its place in the flat page space, 0: that of the file's own.
    """

    iova: int
    length: int
    offset: int
    writable: bool
    fd: int
    page_bytes: int = 0


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
        reserved: tuple[int, int],
        address: int,
        n_pages: int,
        layout: tuple[tuple[int, int, int], ...],
        files: tuple[tuple[int, int, int, int], ...],
        writable: bool,
    ) -> None:
        """`reserved` is (address, bytes) of all that is to be unmapped; `layout` has the first page
        of each region, too."""
        import numpy as np

        self._reserved = reserved
        self.layout = tuple((iova, length) for iova, length, _ in layout)
        self.files = files
        self.n_pages = n_pages
        self._starts = [iova for iova, _, _ in layout]
        self._first_pages = [first for _, _, first in layout]
        buffer = (ctypes.c_uint8 * (self.n_pages * PAGE_BYTES)).from_address(address)
        self.array = np.ctypeslib.as_array(buffer)
        self.array.flags.writeable = writable

    @classmethod
    def map(
        cls,
        regions: Iterable[MemoryRegion],
        *,
        writable: bool = False,
        passing: Collection[int] = (),
    ) -> Self:
        """Maps `regions` shared, in the order of their IOVA; their descriptors stay the caller's.

        `passing` are descriptors of files that will be replaced: `files` leaves them out.
        `writable` holds for the whole array, also for regions that the device may only read (a
        migration fills those, too). Raises `GuestMemoryError` if there is no region, if one does
        not begin and end at pages, overlaps another, reaches behind the end of its file (touching
        that would be a SIGBUS) or cannot be mapped.
        """
        ordered = sorted(regions)
        _check(ordered)
        page_sizes = [_page_bytes(region) for region in ordered]
        slots = Slots()
        placed = [
            (region, page_bytes, slots.place(region.offset, region.length, page_bytes))
            for region, page_bytes in zip(ordered, page_sizes, strict=True)
        ]
        if slots.n_pages > MAX_PAGES:
            raise GuestMemoryError(f"the guest has more than {MAX_PAGES} pages")
        total = slots.n_bytes + max(page_sizes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = _mmap(None, total, _PROT_NONE, flags, -1, 0)
        address = _round_up(reserved, max(page_sizes))
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            for region, page_bytes, first in placed:
                before = region.offset % page_bytes
                position = address + first * PAGE_BYTES - before
                length = _round_up(before + region.length, page_bytes)
                flags = mmap.MAP_SHARED | _MAP_FIXED
                _mmap(position, length, protection, flags, region.fd, region.offset - before)
        except GuestMemoryError:
            _libc.munmap(reserved, total)
            raise
        return cls(
            (reserved, total),
            address,
            slots.n_pages,
            tuple((region.iova, region.length, first) for region, _, first in placed),
            tuple(_open_again((p for p in placed if p[0].fd not in passing), writable)),
            writable,
        )

    def replace(self, region: MemoryRegion) -> None:
        """Has the region at `region.iova`, of the same length, be another file from now on.

        Raises `GuestMemoryError`: then it is what it was.
        """
        index = self._starts.index(region.iova)
        if self.layout[index][1] != region.length or _page_bytes(region) != PAGE_BYTES:
            raise GuestMemoryError(
                f"the region at {region.iova:#x} has another length or page size"
            )
        _check([region])
        address = self.array.ctypes.data + self._first_pages[index] * PAGE_BYTES
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.array.flags.writeable else 0)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _mmap(address, region.length, protection, flags, region.fd, region.offset)

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
        address, n_bytes = self._reserved
        if address:
            del self.array
            _libc.munmap(address, n_bytes)
            self._reserved = (0, 0)
            for _, _, descriptor, _ in self.files:
                os.close(descriptor)
            self.files = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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


def _page_bytes(region: MemoryRegion) -> int:
    """The size of the pages by which the region is placed. Raises `GuestMemoryError` where its file
    cannot be mapped like that."""
    try:
        own = page_bytes_of(region.fd)
    except OSError as error:
        raise GuestMemoryError(f"a file of the guest cannot be asked: {error.strerror}") from error
    wanted = region.page_bytes or own
    if wanted != own:
        raise GuestMemoryError(
            f"the guest's memory is in pages of {own >> 10} KiB here, of {wanted >> 10} KiB at the "
            "source: start the VMM here with pages of the source's size"
        )
    return own


def _open_again(
    placed: Iterable[tuple[MemoryRegion, int, int]], writable: bool
) -> Iterator[tuple[int, int, int, int]]:
    """The files of regions; opened, not duplicated, so that their position is not the owner's.

    A file of huge pages is not among them: it has neither holes of 4 KiB nor write(2).
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    for region, _, first_page in placed:
        with contextlib.suppress(OSError):
            if page_bytes_of(region.fd) == PAGE_BYTES:
                descriptor = os.open(f"/proc/self/fd/{region.fd}", flags)
                yield first_page, region.length // PAGE_BYTES, descriptor, region.offset


def _mmap(
    address: int | None, length: int, protection: int, flags: int, fd: int, offset: int
) -> int:
    mapped = _libc.mmap(address, length, protection, flags | _MAP_NORESERVE, fd, offset)
    if mapped is None or mapped == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise GuestMemoryError(f"{length} bytes of guest memory cannot be mapped: {reason}")
    return int(mapped)
