"""Guest memory as the two sides of a migration have to agree on it.

Owned here: what the greeting says of the source's memory, and how the target finds the same pages
in its own VMM. The two DMA maps need not be equal: firmware moves RAM in and out of the map below
1 MiB, so a target that has not run it yet lacks some of the source's regions. What has to be equal
is the RAM behind the maps: its files, and which part of a file lies at which address. Files that
no region here is in yet are `late_memory`'s.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ferry.errors import Mismatch, PeerProtocolError
from sync.memory import MAX_HUGE_PAGE_BYTES, PAGE_BYTES, MemoryRegion, page_bytes_of
from sync.vmm.stream.mapping import FileRange


@dataclass(frozen=True)
class MemoryLayout:
    """A guest's memory: `files` are the sizes in bytes of the files behind it, `regions` its ranges
    as (IOVA, length, number of the file, offset in it), by IOVA. `page_bytes` is the size of the
    pages of each file, by which a region gets its place in the flat page space."""

    files: list[int]
    regions: list[tuple[int, int, int, int]]
    page_bytes: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, regions: Sequence[MemoryRegion]) -> "MemoryLayout":
        """The layout of `regions`; files are numbered in the order in which they appear."""
        numbers: dict[tuple[int, int], int] = {}
        sizes: list[int] = []
        page_bytes: list[int] = []
        rows = []
        for region in sorted(regions):
            status = os.fstat(region.fd)
            number = numbers.setdefault((status.st_dev, status.st_ino), len(numbers))
            if number == len(sizes):
                sizes.append(status.st_size)
                page_bytes.append(page_bytes_of(region.fd))
            rows.append((region.iova, region.length, number, region.offset))
        return cls(sizes, rows, page_bytes)

    @classmethod
    def from_rows(cls, files: list[list[int]], rows: list[list[int]]) -> "MemoryLayout":
        """The layout that a greeting tells. Raises `PeerProtocolError` for regions that overlap,
        are not made of whole pages or are not in their file."""
        sizes = [size for size, _ in files]
        page_bytes = [pages for _, pages in files]
        for each in page_bytes:
            if each.bit_count() != 1 or not PAGE_BYTES <= each <= MAX_HUGE_PAGE_BYTES:
                raise PeerProtocolError("the pages of the source's memory make no sense")
        regions = [(iova, length, file, offset) for iova, length, file, offset in rows]
        end = 0
        for iova, length, file, offset in regions:
            if iova < end or length == 0 or (iova | length | offset) % PAGE_BYTES:
                raise PeerProtocolError("the regions of the source's memory make no sense")
            if file >= len(sizes) or offset + length > sizes[file]:
                raise PeerProtocolError("a region of the source's memory is not in its file")
            end = iova + length
        return cls(sizes, regions, page_bytes)

    def file_ranges(self) -> list[FileRange]:
        """Which file is behind which pages of the flat page space."""
        ranges, page = list[FileRange](), 0
        for _, length, file, offset in self.regions:
            ranges.append(FileRange(page, length // PAGE_BYTES, file, offset))
            page += length // PAGE_BYTES
        return ranges

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """The files and regions as a greeting carries them and `from_rows` takes them."""
        files = [list(file) for file in zip(self.files, self.page_bytes, strict=True)]
        return files, [list(region) for region in self.regions]

    def __str__(self) -> str:
        return ", ".join(f"{r[1] >> 10} KiB at {r[0]:#x}" for r in self.regions) or "empty"


def same_pages(
    theirs: MemoryLayout, ours: Sequence[MemoryRegion], stand_ins: Mapping[int, int] | None = None
) -> list[MemoryRegion]:
    """The regions of `theirs` in the files of `ours`, whose descriptors they keep; `stand_ins` has
    descriptors for files of `theirs`, by number, that are not mapped here yet.

    Raises `Mismatch` if the RAM behind both is not laid out in the same way.
    """
    here = MemoryLayout.of(ours)
    pairs = _pair(theirs, here)
    descriptors = dict(stand_ins or {})
    for (_, _, file, _), region in zip(here.regions, sorted(ours), strict=True):
        if file in pairs:
            descriptors.setdefault(pairs[file], region.fd)
    if len(descriptors) < len(theirs.files):
        raise _mismatch(theirs, here)
    return [
        MemoryRegion(iova, length, offset, True, descriptors[file], theirs.page_bytes[file])
        for iova, length, file, offset in theirs.regions
    ]


def late_files(theirs: MemoryLayout, ours: Sequence[MemoryRegion]) -> list[int]:
    """The files of `theirs` that no region of `ours` is in: a VMM may map them only once the guest
    is there. Raises `Mismatch` if what is mapped is not laid out in the same way."""
    here = MemoryLayout.of(ours)
    known = set(_pair(theirs, here).values())
    if not known:
        raise _mismatch(theirs, here)
    return [file for file in range(len(theirs.files)) if file not in known]


def _mismatch(theirs: MemoryLayout, here: MemoryLayout) -> Mismatch:
    return Mismatch(
        f"the guest's memory is {here} of {sum(here.files) >> 20} MiB here, the source's "
        f"{theirs} of {sum(theirs.files) >> 20} MiB: start the VMM with the same memory"
    )


def _pair(theirs: MemoryLayout, here: MemoryLayout) -> dict[int, int]:
    """Which file here is which of theirs: those that the same addresses lie in, at the same place.

    Raises `Mismatch` where an address lies at another place, a file is two or has another size,
    and for a file here that none of theirs is.
    """
    pairs: dict[int, int] = {}
    left, right = list(here.regions), list(theirs.regions)
    while left and right:
        (start, length, file, offset), (start2, length2, file2, offset2) = left[-1], right[-1]
        if max(start, start2) < min(start + length, start2 + length2):
            same_place = offset - start == offset2 - start2
            if not same_place or pairs.setdefault(file, file2) != file2:
                raise _mismatch(theirs, here)
        (left if start >= start2 else right).pop()
    whole = len(set(pairs.values())) == len(pairs) == len(here.files)
    if not whole or any(here.files[a] != theirs.files[b] for a, b in pairs.items()):
        raise _mismatch(theirs, here)
    return pairs
