"""Pages of shared guest memory into this process's page tables, while nothing else is to be done.

The first access to a page through a mapping is a page fault, and what was loaded by a VMM or
written to the file behind the memory was never accessed through ours. When memory is compared, the
guest stands still; so its pages are mapped before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transport.wire.extents import Extent
from transport.wire.frames import PAGE_BYTES

IDLE_S = 0.02
"""How long a thread has to be without work before it maps: between two rounds it is, within one
it is not."""
STEP_PAGES = 4096
"""Pages that one step looks at: half a millisecond if none is mapped."""
STEP_RANGES = 64
"""Pieces without a hole that one step maps, at most."""

_MADV_POPULATE_READ = 22  # madvise(2), Linux 5.14


class Mapper:
    """Walks over memory, a step at a time, and anew when its files hold more. For one thread."""

    def __init__(self, memory: npt.NDArray[np.uint8], extents: Sequence[Extent]) -> None:
        """Only pages of `extents` (see `check_extents`) are mapped; holes of their files stay."""
        self._address = memory.ctypes.data
        self._extents = [extent for extent in extents if extent[1]]
        self._at = (0, 0)
        """Where the next step begins: extent, and page of it."""
        self._held_blocks: int | None = None
        """What the files held when the latest walk began."""
        self._madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)

    @property
    def useful(self) -> bool:
        """Whether there is anything to walk over, and a way to map it."""
        return bool(self._extents) and self._madvise is not None

    def step(self) -> None:
        """Map the next few pages. Never fails: what cannot be mapped is left alone."""
        if not self.useful:
            return
        number, start = self._at
        if (number, start) == (0, 0):
            held = self._count_blocks()
            if held is not None and held == self._held_blocks:
                return
            self._held_blocks = held
        first, n_pages, descriptor, offset = self._extents[number]
        end = min(n_pages, start + STEP_PAGES)
        for _ in range(STEP_RANGES):
            data = _seek(descriptor, offset + start * PAGE_BYTES, os.SEEK_DATA)
            start = end if data is None else min(end, (data - offset) // PAGE_BYTES)
            if start == end:
                break
            hole = _seek(descriptor, offset + start * PAGE_BYTES, os.SEEK_HOLE)
            stop = end if hole is None else min(end, -((offset - hole) // PAGE_BYTES))
            self._map(first + start, max(1, stop - start))
            start = max(start + 1, stop)
        self._at = (number, start) if start < n_pages else ((number + 1) % len(self._extents), 0)

    def _count_blocks(self) -> int | None:
        """Of all that is in the files; None: they do not tell."""
        try:
            return sum(os.fstat(each).st_blocks for each in {extent[2] for extent in self._extents})
        except OSError:
            return None

    def _map(self, page: int, count: int) -> None:
        assert self._madvise is not None
        address = ctypes.c_void_p(self._address + page * PAGE_BYTES)
        length = ctypes.c_size_t(count * PAGE_BYTES)
        if self._madvise(address, length, _MADV_POPULATE_READ):
            # An older kernel, or memory of a kind that has no pages: it would fail every time.
            self._extents = []


def _seek(descriptor: int, at: int, what: int) -> int | None:
    """Byte of the next data or hole; None: there is none, or the file does not tell."""
    try:
        return os.lseek(descriptor, at, what)
    except OSError:
        return None
