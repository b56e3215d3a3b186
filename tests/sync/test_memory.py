"""Guest memory as one array, against reads and writes of the files behind it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sync.memory import GuestMemory, GuestMemoryError, MemoryRegion

PAGE = 4096


@pytest.fixture
def file() -> Iterator[int]:
    """64 pages; the first bytes of each say which it is."""
    number = os.memfd_create("ram")
    os.ftruncate(number, 64 * PAGE)
    for page in range(64):
        os.pwrite(number, page.to_bytes(2, "little"), page * PAGE)
    yield number
    os.close(number)


def _region(iova_page: int, pages: int, offset_page: int, fd: int) -> MemoryRegion:
    return MemoryRegion(iova_page * PAGE, pages * PAGE, offset_page * PAGE, True, fd)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8), st.integers(0, 56)), min_size=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_are_the_regions_one_after_the_other(file: int, rows: list[tuple[int, ...]]) -> None:
    regions, expected, iova = [], [], 0
    for gap, pages, offset in rows:
        iova += gap
        regions.append(_region(iova, pages, offset, file))
        expected += [(iova + step, offset + step) for step in range(pages)]
        iova += pages
    with GuestMemory.map(regions[::-1]) as memory:
        assert memory.n_pages == len(expected)
        assert memory.array.shape == (len(expected) * PAGE,)
        assert memory.array.dtype == np.uint8
        assert memory.layout == tuple((r.iova, r.length) for r in regions)
        for page, (iova_page, file_page) in enumerate(expected):
            assert memory.page_of(iova_page * PAGE + 17) == page
            assert memory.array[page * PAGE : page * PAGE + 2].tobytes() == file_page.to_bytes(
                2, "little"
            )
        with pytest.raises(GuestMemoryError):
            memory.page_of(iova * PAGE)


def test_what_is_written_is_in_the_file_and_the_other_way_round(file: int) -> None:
    with GuestMemory.map([_region(16, 2, 4, file)], writable=True) as memory:
        memory.array[PAGE + 8] = 99
        assert os.pread(file, 1, 5 * PAGE + 8) == b"\x63"
        os.pwrite(file, b"guest", 4 * PAGE)
        assert memory.array[:5].tobytes() == b"guest"


def test_without_leave_nothing_can_be_written(file: int) -> None:
    with GuestMemory.map([_region(0, 1, 0, file)]) as memory:
        with pytest.raises(ValueError):
            memory.array[0] = 1
        assert not memory.array.flags.writeable


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(0, PAGE - 1, 0)],
        [(512, PAGE, 0)],
        [(0, PAGE, 512)],
        [(0, 0, 0)],
        [(-PAGE, PAGE, 0)],
        [(0, 2 * PAGE, 0), (PAGE, PAGE, 0)],
        [(0, PAGE, 64 * PAGE)],
        [(0, 65 * PAGE, 0)],
    ],
)
def test_i9_what_cannot_be_one_array_is_refused_before_anything_is_mapped(
    file: int, rows: list[tuple[int, int, int]]
) -> None:
    """A mapping behind the end of its file would be a SIGBUS at the first touch."""
    regions = [MemoryRegion(iova, length, offset, True, file) for iova, length, offset in rows]
    with pytest.raises(GuestMemoryError):
        GuestMemory.map(regions)


def test_a_descriptor_that_cannot_be_mapped_so_is_an_error(file: int) -> None:
    reading, writing = os.pipe()
    with pytest.raises(GuestMemoryError):
        GuestMemory.map([_region(0, 1, 0, reading)])
    readonly = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    with pytest.raises(GuestMemoryError):
        GuestMemory.map([_region(0, 1, 0, readonly)], writable=True)
    with pytest.raises(GuestMemoryError):
        GuestMemory.map([_region(0, 1, 0, 12345)])
    for number in (reading, writing, readonly):
        os.close(number)


def test_the_descriptors_stay_the_callers_and_closing_unmaps(file: int) -> None:
    def count() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:ram")

    before = count()
    memory = GuestMemory.map([_region(0, 2, 0, file), _region(8, 1, 8, file)])
    assert count() == before + 2
    memory.close()
    memory.close()
    assert count() == before
    assert os.fstat(file).st_size == 64 * PAGE


def test_the_files_of_the_pages_are_descriptors_of_its_own(file: int) -> None:
    """Each with a position of its own: seeking in it moves nobody else's."""
    with GuestMemory.map([_region(16, 2, 4, file), _region(32, 3, 9, file)]) as memory:
        assert [(first, pages, offset) for first, pages, _, offset in memory.files] == [
            (0, 2, 4 * PAGE),
            (2, 3, 9 * PAGE),
        ]
        for first, _, descriptor, offset in memory.files:
            content = memory.array[first * PAGE : (first + 1) * PAGE].tobytes()
            assert os.pread(descriptor, PAGE, offset) == content
            os.lseek(descriptor, 17, os.SEEK_SET)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(descriptor, b"x", 0)
        descriptors = [descriptor for _, _, descriptor, _ in memory.files]
        assert os.lseek(file, 0, os.SEEK_CUR) == 0
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
