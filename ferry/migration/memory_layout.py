"""Guest memory as the two sides of a migration have to agree on it.

Owned here: what the greeting says of the source's memory, and how the target finds the same pages
in its own VMM. The two DMA maps need not be equal: firmware moves RAM in and out of the map below
1 MiB, so a target that has not run it yet lacks some of the source's regions. What has to be equal
is the RAM behind the maps: its files, and which part of a file lies at which address.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ferry.errors import Mismatch, PeerProtocolError
from sync.memory import MAX_HUGE_PAGE_BYTES, PAGE_BYTES, MemoryRegion, page_bytes_of


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

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """The files and regions as a greeting carries them and `from_rows` takes them."""
        files = [list(file) for file in zip(self.files, self.page_bytes, strict=True)]
        return files, [list(region) for region in self.regions]

    def __str__(self) -> str:
        return ", ".join(f"{r[1] >> 10} KiB at {r[0]:#x}" for r in self.regions) or "empty"


def same_pages(theirs: MemoryLayout, ours: Sequence[MemoryRegion]) -> list[MemoryRegion]:
    """The regions of `theirs` in the files of `ours`; the descriptors stay those of `ours`.

    Raises `Mismatch` if the RAM behind both is not laid out in the same way.
    """
    here = MemoryLayout.of(ours)
    if here.files != theirs.files or not _agree(theirs, here):
        raise Mismatch(
            f"the guest's memory is {here} of {sum(here.files) >> 20} MiB here, the source's "
            f"{theirs} of {sum(theirs.files) >> 20} MiB: start the VMM with the same memory"
        )
    descriptors: dict[int, int] = {}
    for (_, _, file, _), region in zip(here.regions, sorted(ours), strict=True):
        descriptors.setdefault(file, region.fd)
    return [
        MemoryRegion(iova, length, offset, True, descriptors[file], theirs.page_bytes[file])
        for iova, length, file, offset in theirs.regions
    ]


def _agree(a: MemoryLayout, b: MemoryLayout) -> bool:
    """Whether every address that is in both lies at the same place of the same file."""
    left, right = list(a.regions), list(b.regions)
    while left and right:
        (start, length, file, offset), (start2, length2, file2, offset2) = left[-1], right[-1]
        if max(start, start2) < min(start + length, start2 + length2) and (
            (file, offset - start) != (file2, offset2 - start2)
        ):
            return False
        (left if start >= start2 else right).pop()
    return True
