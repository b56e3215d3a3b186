"""The dirty bitmap against a set of page numbers."""

import mmap
import os
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.dma import FlatRegion

PAGE = 4096
# Gaps between regions, one region that follows another without a gap, sizes that fill no word.
LAYOUT = [(0x0, 7), (0x10000, 70), (0x10000 + 70 * PAGE, 3), (0x100000000, 130)]
N_PAGES = sum(pages for _, pages in LAYOUT)


def _flat() -> list[FlatRegion]:
    flat, page = [], 0
    for iova, pages in LAYOUT:
        flat.append(FlatRegion(iova, pages * PAGE, 0, True, -1, page))
        page += pages
    return flat


def _page_of(address: int) -> int | None:
    page = 0
    for iova, pages in LAYOUT:
        if iova <= address < iova + pages * PAGE:
            return page + (address - iova) // PAGE
        page += pages
    return None


def _pages(bitmap: DirtyBitmap, half: int) -> set[int]:
    data = os.pread(bitmap.descriptor, bitmap.half_bytes, half * bitmap.half_bytes)
    bits = int.from_bytes(data, "little")
    return {page for page in range(len(data) * 8) if bits >> page & 1}


@pytest.fixture
def bitmap() -> Iterator[DirtyBitmap]:
    bitmap = DirtyBitmap(_flat())
    yield bitmap
    bitmap.close()


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    iova, pages = draw(st.sampled_from(LAYOUT))
    address = max(0, iova + draw(st.integers(-3 * PAGE, pages * PAGE)))
    return address, draw(st.integers(1, 20 * PAGE))


@given(st.sets(st.integers(0, 0x100000 + 140) | st.integers(0x10, 0x70), max_size=60))
def test_pages_by_their_numbers(numbers: set[int]) -> None:
    bitmap = DirtyBitmap(_flat())
    try:
        bitmap.mark_pages(sorted(numbers))
        found = {_page_of(number * PAGE) for number in numbers} - {None}
        assert _pages(bitmap, bitmap.swap()) == found
    finally:
        bitmap.close()


@given(st.lists(ranges(), max_size=12))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i1_every_page_written_is_marked_and_no_other(
    bitmap: DirtyBitmap, writes: list[tuple[int, int]]
) -> None:
    expected = set()
    for address, count in writes:
        bitmap.mark(address, count)
        # Every page that the write touches, one byte of each at a time.
        probes = {address + count - 1, *range(address, address + count, PAGE)}
        expected |= {page for probe in probes if (page := _page_of(probe)) is not None}
    half = bitmap.swap()
    assert _pages(bitmap, half) == expected
    os.pwrite(bitmap.descriptor, bytes(bitmap.half_bytes), half * bitmap.half_bytes)


@given(
    st.integers(0, len(LAYOUT) - 1),
    st.sampled_from([1, 2, 16, 512]),
    st.integers(0, 80),
    st.integers(min_value=0, max_value=(1 << 140) - 1),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i1_a_report_lands_on_the_pages_it_stands_for(
    bitmap: DirtyBitmap, index: int, factor: int, first: int, bits: int
) -> None:
    """Any alignment of the region in the flat page space, any page size of the device."""
    region = _flat()[index]
    pages = region.length // PAGE
    first = min(first, pages - 1)
    n_bits = -(-(pages - first) // factor)
    bits &= (1 << n_bits) - 1
    data = bits.to_bytes(-(-n_bits // 64) * 8, "little")
    bitmap.mark(0, 1)
    bitmap.merge(region, first * PAGE, data, factor * PAGE)
    expected = {
        region.first_page + first + bit * factor + step
        for bit in range(n_bits)
        if bits >> bit & 1
        for step in range(factor)
        if first + bit * factor + step < pages
    }
    half = bitmap.swap()
    assert _pages(bitmap, half) == expected | {0}
    os.pwrite(bitmap.descriptor, bytes(bitmap.half_bytes), half * bitmap.half_bytes)


TIB = 1 << 40


def _sparse(n_bytes: int) -> tuple[DirtyBitmap, FlatRegion]:
    region = FlatRegion(1 << 32, n_bytes, 0, True, -1, 0)
    return DirtyBitmap([region]), region


@pytest.mark.parametrize("page_bytes", [PAGE, 4 * PAGE, 2 << 20, 1 << 30])
@pytest.mark.parametrize("n_bytes", [TIB, 16 * TIB])
def test_an_empty_log_of_a_large_guest_touches_nothing(n_bytes: int, page_bytes: int) -> None:
    """Nothing is allocated, and what is handled as a number is short: one as long as a report
    would take a second for each TiB."""
    bitmap, region = _sparse(n_bytes)
    chunk = 1 << 38
    empty = bytes(-(-chunk // page_bytes // 64) * 8)
    for start in range(0, n_bytes, chunk):
        bitmap.merge(region, start, empty, page_bytes)
    assert os.fstat(bitmap.descriptor).st_blocks == 0
    bitmap.close()


@pytest.mark.parametrize("page_bytes", [PAGE, 4 * PAGE, 2 << 20, 1 << 30])
def test_what_is_set_in_the_log_of_a_large_guest_is_found_and_all_that_is_touched(
    page_bytes: int,
) -> None:
    n_bytes = 16 * TIB
    bitmap, region = _sparse(n_bytes)
    chunk = 1 << 35
    expected: set[int] = set()
    for start in (0, 5 * TIB, n_bytes - chunk):
        n_bits = chunk // page_bytes
        bits = 1 | 1 << n_bits // 3 | 1 << n_bits - 1
        bitmap.merge(region, start, bits.to_bytes(-(-n_bits // 64) * 8, "little"), page_bytes)
        for bit in (0, n_bits // 3, n_bits - 1):
            first = (start + bit * page_bytes) // PAGE
            expected |= {first, first + page_bytes // PAGE - 1}
    for page in expected:
        byte = os.pread(bitmap.descriptor, 1, page >> 3)[0]
        assert byte >> (page & 7) & 1
    n_set = 0
    position = 0
    while True:
        try:
            position = os.lseek(bitmap.descriptor, position, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(bitmap.descriptor, position, os.SEEK_HOLE)
        data = os.pread(bitmap.descriptor, end - position, position)
        n_set += int.from_bytes(data, "little").bit_count()
        position = end
    assert n_set == 9 * page_bytes // PAGE
    bitmap.close()


@pytest.mark.parametrize("page_bytes", [PAGE, 4 * PAGE, 2 << 20, 1 << 30, 1 << 42])
def test_numbers_stay_short_however_large_the_guest_is(page_bytes: int) -> None:
    """An operation on a number takes as long as the number is: none is as long as the region."""
    large, region = _sparse(16 * TIB)
    large.merge(region, 0, b"\1", PAGE)
    some = b"\1" + bytes(4094) + b"\x80"
    tracemalloc.start()
    try:
        large.merge(region, 0, some if page_bytes < 1 << 30 else b"\1", page_bytes)
        large.mark(region.iova, 1 << 30)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 18
    large.close()


def test_i1_a_page_marked_after_the_swap_is_in_the_other_half(bitmap: DirtyBitmap) -> None:
    bitmap.mark(0, 1)
    first = bitmap.swap()
    bitmap.mark(PAGE, 1)
    assert _pages(bitmap, first) == {0}
    second = bitmap.swap()
    assert second != first
    assert _pages(bitmap, second) == {1}


def test_who_gets_the_descriptor_cannot_take_the_file_away(bitmap: DirtyBitmap) -> None:
    assert bitmap.n_pages == N_PAGES
    with pytest.raises(PermissionError):
        os.ftruncate(bitmap.descriptor, 0)
    other = mmap.mmap(bitmap.descriptor, 2 * bitmap.half_bytes)
    other[:] = bytes(2 * bitmap.half_bytes)
    other.close()
    bitmap.mark(0, PAGE)
