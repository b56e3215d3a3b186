"""A made-up guest that writes: so many pages a second, by a pattern, so much of each.

Patterns: `uniform`, any page alike; `sequential`, one after the other, round and round; `hot`, nine
of ten writes go to a tenth of the pages; `zipf`, the page of rank r is written 1/r as often as that
of rank 1. Hot pages and ranks are scattered over the memory.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from perf.errors import BenchUsageError
from perf.workloads.images import random_pages
from transport.wire.frames import PAGE_BYTES

PATTERNS = ("uniform", "sequential", "hot", "zipf")
HOT_SHARE = 0.1
HOT_WRITES = 0.9
_BATCH_PAGES = 4096

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.uint32]
MakePages = Callable[[np.random.Generator, int], Bytes]


def check_pattern(pattern: str) -> None:
    """Raises `BenchUsageError` if there is no such pattern."""
    if pattern not in PATTERNS:
        raise BenchUsageError(f"there is no pattern {pattern!r}; there are {', '.join(PATTERNS)}")


class Dirtier:
    """Writes into `memory`, uint8[n_pages * 4096]; the same seed gives the same writes."""

    def __init__(
        self,
        memory: Bytes,
        pattern: str = "uniform",
        *,
        pages_per_s: float = 0.0,
        changed: float = 1.0,
        content: MakePages = random_pages,
        seed: int = 1,
    ) -> None:
        """`changed`: share of a page's bytes that a write replaces, in one piece, by `content`.

        Raises as `check_pattern`.
        """
        check_pattern(pattern)
        self._pages = memory.reshape(-1, PAGE_BYTES)
        self._pattern = pattern
        self._pages_per_s = pages_per_s
        self._span = max(1, round(changed * PAGE_BYTES))
        self._content = content
        self._rng = np.random.default_rng(seed)
        self._order = self._rng.permutation(len(self._pages)).astype(np.uint32)
        self._next = 0
        self._owed = 0.0

    def advance(self, seconds: float) -> Indices:
        """Writes what a guest writes in so many seconds at `pages_per_s`; fractions of a page are
        kept for the next time. Returns as `write`."""
        self._owed += seconds * self._pages_per_s
        due = int(self._owed)
        self._owed -= due
        return self.write(due)

    def write(self, n: int) -> Indices:
        """Makes `n` writes of a page. Returns the pages written: distinct, ascending."""
        indices = np.unique(self._pick(n))
        for start in range(0, indices.size, _BATCH_PAGES):
            self._change(indices[start : start + _BATCH_PAGES])
        return indices

    def _pick(self, n: int) -> Indices:
        n_pages = len(self._pages)
        if self._pattern == "sequential":
            picked = (self._next + np.arange(n)) % n_pages
            self._next = (self._next + n) % n_pages
            return picked.astype(np.uint32)
        if self._pattern == "uniform":
            return self._rng.integers(0, n_pages, n, np.uint32)
        if self._pattern == "zipf":
            # Of the density 1/r on 1..n_pages + 1, by inversion: the logarithm is uniform.
            ranks = np.exp(self._rng.random(n) * np.log(n_pages + 1)).astype(np.intp) - 1
        else:
            n_hot = max(1, int(n_pages * HOT_SHARE))
            ranks = self._rng.integers(0, n_pages, n)
            hot = self._rng.random(n) < HOT_WRITES
            ranks[hot] = self._rng.integers(0, n_hot, int(np.count_nonzero(hot)))
        picked_pages: Indices = self._order[np.minimum(ranks, n_pages - 1)]
        return picked_pages

    def _change(self, indices: Indices) -> None:
        content = self._content(self._rng, indices.size)
        if self._span >= PAGE_BYTES:
            self._pages[indices] = content
            return
        starts = self._rng.integers(0, PAGE_BYTES - self._span + 1, indices.size)
        columns = starts[:, np.newaxis] + np.arange(self._span)
        self._pages[indices[:, np.newaxis], columns] = content[:, : self._span]
