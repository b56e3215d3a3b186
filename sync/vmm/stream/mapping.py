"""Which file a RAM block of the VMM is, and from which byte on: proven by content, not by names.

The files are those behind the gateway's memory map. A block may be any of them, from the beginning
of any of their regions on. Pages of the VMM's first pass are compared with the memory that each
candidate has in their place. Evidence for a candidate is a page that only this one matches, that is
not uniform, and whose content was not seen in another place of the guest. `MIN_MATCHES` such pages
prove a candidate, unless it has mismatches beyond what a guest that goes on writing would cause.

A mismatch is a race if the VMM announces the page once more, or if a device has written it. A
mismatch that is none by the end of the stream refutes what was proven (`check`), and nothing may be
built on it: the other VMM must not be given its tail.
"""

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sync.memory import PAGE_BYTES
from sync.vmm.stream.errors import MappingRefuted
from sync.vmm.stream.reader import Announced, PageRange, Sample
from sync.vmm.stream.sections import RamBlock

MIN_MATCHES = 32
MATCHES_PER_MISMATCH = 4
"""So many matches have to stand against each mismatch."""

_SEVERAL = "", -1
"""In the place of a content that was seen in more than one."""


class FileRange(NamedTuple):
    """`n_pages` of the guest from flat page `flat` on are `file` from byte `offset` on."""

    flat: int
    n_pages: int
    file: Hashable
    """The same for ranges of the same file: device and inode."""
    offset: int

    @property
    def end_offset(self) -> int:
        return self.offset + self.n_pages * PAGE_BYTES


def candidates(block: RamBlock, files: Sequence[FileRange]) -> list[tuple[PageRange, ...]]:
    """Every way in which `block` may lie in `files`, as the ranges of it that are in the memory.

    A region of a memory map lies in one block, so none may cross the block's end.
    """
    found = list[tuple[PageRange, ...]]()
    for file, base in sorted({(f.file, base) for f in files for base in (0, f.offset)}, key=repr):
        end = base + block.n_pages * PAGE_BYTES
        inside = [f for f in files if f.file == file and f.offset < end and f.end_offset > base]
        if inside and all(base <= f.offset and f.end_offset <= end for f in inside):
            ranges = sorted(
                PageRange((f.offset - base) // PAGE_BYTES, f.n_pages, f.flat) for f in inside
            )
            if all(one.first + one.n_pages <= other.first for one, other in pairwise(ranges)):
                found.append(tuple(ranges))
    return found


class _Candidate:
    def __init__(self, ranges: tuple[PageRange, ...]) -> None:
        self.ranges = ranges
        self.matches = set[int]()
        """Pages of the block."""
        self.mismatches = dict[int, int]()
        """Page of the block -> which of the page's samples, counted from 1, did not match last."""

    def flat(self, page: int) -> int | None:
        for first, n_pages, flat in self.ranges:
            if first <= page < first + n_pages:
                return flat + page - first
        return None

    @property
    def is_proven(self) -> bool:
        n_needed = max(MIN_MATCHES, MATCHES_PER_MISMATCH * len(self.mismatches))
        return len(self.matches) >= n_needed


class MappingProof:
    """The proof for all blocks of one stream."""

    def __init__(self, memory: npt.NDArray[np.uint8], files: Iterable[FileRange]) -> None:
        """`memory` is the guest's, uint8[n_pages * 4096] by flat pages, of which `files` speaks."""
        self._memory = memory
        self._files = tuple(files)
        self._candidates = dict[str, list[_Candidate]]()
        self._n_samples = dict[tuple[str, int], int]()
        self._seen = dict[int, tuple[str, int]]()
        """Hash of a content -> the place where it was seen."""
        self._suspects = dict[int, int]()
        """Flat page of a mismatch -> how many announcements with content are still to come up to
        the one that it was found in."""

    def add(self, block: RamBlock) -> bool:
        """Whether `block` may be any of the files; if not, it is to be carried."""
        ways = candidates(block, self._files)
        if ways:
            self._candidates[block.name] = [_Candidate(ranges) for ranges in ways]
        return bool(ways)

    def sample(self, sample: Sample) -> tuple[PageRange, ...] | None:
        """Takes evidence in; what the block is, once that is proven."""
        block, page, content = sample.block, sample.page, sample.content
        number = self._n_samples[block, page] = self._n_samples.get((block, page), 0) + 1
        matching = list[_Candidate]()
        for candidate in self._candidates[block]:
            if (flat := candidate.flat(page)) is None:
                continue
            candidate.matches.discard(page)
            if self._memory[flat * PAGE_BYTES : (flat + 1) * PAGE_BYTES].tobytes() == content:
                candidate.mismatches.pop(page, None)
                matching.append(candidate)
            else:
                candidate.mismatches[page] = number
        if self._is_distinctive(sample) and len(matching) == 1:
            matching[0].matches.add(page)
        for candidate in matching:
            if candidate.is_proven:
                self._suspect(candidate)
                del self._candidates[block]
                return candidate.ranges
        return None

    def announced(self, event: Announced) -> None:
        """To be told of every announcement, in order."""
        if not self._suspects:
            return
        hits = np.flatnonzero(np.isin(event.pages, list(self._suspects)))
        for page, is_zero in zip(event.pages[hits].tolist(), event.zeros[hits], strict=True):
            n_left = self._suspects.get(page)
            if n_left == 0:
                del self._suspects[page]
            elif n_left and not is_zero:
                self._suspects[page] = n_left - 1

    def written(self, pages: npt.NDArray[np.uint32]) -> None:
        """Flat pages that a device has written since the stream began: the VMM does not know."""
        if self._suspects:
            for page in pages[np.isin(pages, list(self._suspects))].tolist():
                self._suspects.pop(page, None)

    def check(self) -> None:
        """All announcements have come. Raises `MappingRefuted`."""
        if self._suspects:
            raise MappingRefuted(
                f"{len(self._suspects)} pages of the guest, the first at {min(self._suspects)}, "
                "are not what the VMM sent, and nobody wrote them since: the VMM's RAM is not the "
                "memory that the devices see; use --vmm-stream closed"
            )

    def _is_distinctive(self, sample: Sample) -> bool:
        content, place = sample.content, (sample.block, sample.page)
        if content.count(content[:1]) == len(content):
            return False
        first = self._seen.setdefault(hash(content), place)
        if first == place:
            return True
        for candidate in self._candidates.get(first[0], ()):
            candidate.matches.discard(first[1])
        self._seen[hash(content)] = _SEVERAL
        return False

    def _suspect(self, proven: _Candidate) -> None:
        for page, number in proven.mismatches.items():
            flat = proven.flat(page)
            assert flat is not None
            self._suspects[flat] = number
