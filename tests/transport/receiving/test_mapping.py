"""Memory is mapped ahead of use, and nothing is made of its holes."""

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.receiving import mapping
from transport.receiving.mapping import Mapper

PAGE = 4096
N_PAGES = 400


class Guest:
    """Memory that is a file of two extents behind a page that is not the guest's."""

    def __init__(self, written: set[int]) -> None:
        self.descriptor = os.memfd_create("guest")
        os.ftruncate(self.descriptor, (N_PAGES + 1) * PAGE)
        for page in written:
            os.pwrite(self.descriptor, b"x", (page + 1) * PAGE)
        self.array = np.frombuffer(
            mmap.mmap(self.descriptor, N_PAGES * PAGE, offset=PAGE, prot=mmap.PROT_READ), np.uint8
        )
        half = N_PAGES // 2
        self.extents = [
            (half, N_PAGES - half, self.descriptor, (1 + half) * PAGE),
            (0, half, self.descriptor, PAGE),
        ]

    def mapped(self) -> int:
        """Pages in this process's page table (proc(5), smaps)."""
        smaps = Path("/proc/self/smaps").read_text()
        start = f"{self.array.ctypes.data:x}-"
        entry = smaps[smaps.index(start) :]
        found = re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024 // PAGE

    def allocated(self) -> int:
        return os.fstat(self.descriptor).st_blocks * 512 // PAGE


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mapping, "STEP_PAGES", 64)
    monkeypatch.setattr(mapping, "STEP_RANGES", 3)
    yield


@pytest.mark.usefixtures("small_steps")
@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.integers(0, N_PAGES - 1), max_size=60),
    st.sets(st.integers(0, N_PAGES - 1), max_size=60),
)
def test_what_is_there_is_mapped_and_holes_stay(before: set[int], later: set[int]) -> None:
    guest = Guest(before)
    mapper = Mapper(guest.array, guest.extents)
    for _ in range(N_PAGES):
        mapper.step()
    assert guest.mapped() == len(before)
    for page in later:
        os.pwrite(guest.descriptor, b"x", (page + 1) * PAGE)
    for _ in range(N_PAGES):
        mapper.step()
    assert guest.mapped() == len(before | later)
    assert guest.allocated() == len(before | later)
    os.close(guest.descriptor)


@pytest.mark.usefixtures("small_steps")
def test_a_walk_that_would_find_nothing_new_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(set(range(0, N_PAGES, 7)))
    looked_at = []
    seek = os.lseek

    def count(descriptor: int, at: int, what: int) -> int:
        looked_at.append(at)
        return seek(descriptor, at, what)

    monkeypatch.setattr(os, "lseek", count)
    mapper = Mapper(guest.array, guest.extents)
    for _ in range(N_PAGES):
        mapper.step()
    looked_at.clear()
    mapper.step()
    assert not looked_at
    # Written when a walk is past it: that walk is not the last.
    os.pwrite(guest.descriptor, b"x", 2 * PAGE)
    mapper.step()
    assert looked_at
    os.pwrite(guest.descriptor, b"x", (N_PAGES // 2 + 2) * PAGE)
    for _ in range(N_PAGES):
        mapper.step()
    assert guest.mapped() == guest.allocated()
    os.close(guest.descriptor)


def test_memory_that_cannot_be_mapped_is_left_alone() -> None:
    array = np.frombuffer(mmap.mmap(-1, PAGE), np.uint8)
    closed = os.memfd_create("guest")
    os.close(closed)
    for extents in ([], [(0, 1, closed, 0)]):
        mapper = Mapper(array, extents)
        mapper.step()
        mapper.step()
