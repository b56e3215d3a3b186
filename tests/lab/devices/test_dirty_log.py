"""The dirty log against a plain set of pages."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.devices.dirty_log import MAX_RANGES, DirtyLog, DirtyLogError

PAGE = 4096
SPAN_PAGES = 20_000


def reported(log: DirtyLog, iova: int, length: int, page: int = PAGE) -> set[int]:
    bitmap = log.report(iova, length, page)
    assert len(bitmap) % 8 == 0
    bits = int.from_bytes(bitmap, "little")
    n_bits = -(-length // page)
    assert bits >> n_bits == 0
    return {iova + page * bit for bit in range(n_bits) if bits >> bit & 1}


def touched(iova: int, length: int, page: int) -> set[int]:
    return set(range(iova // page * page, iova + length, page)) if length else set()


marks = st.lists(
    st.tuples(st.integers(0, SPAN_PAGES * PAGE - 1), st.integers(0, 300 * 1024)), max_size=20
)
windows = st.lists(
    st.tuples(st.integers(0, SPAN_PAGES), st.integers(1, SPAN_PAGES), st.integers(0, 6)), max_size=6
)


@given(st.integers(0, 4), marks, windows)
def test_i1_reports_are_what_was_marked_and_clear_it(
    coarseness: int, writes: list[tuple[int, int]], reports: list[tuple[int, int, int]]
) -> None:
    """Every page marked is reported once, by whatever windows and page sizes it is asked for."""
    log = DirtyLog(PAGE << coarseness)
    assert log.start(PAGE, []) == PAGE << coarseness
    dirty = set()
    for iova, length in writes:
        log.mark(iova, length)
        for coarse in touched(iova, length, PAGE << coarseness):
            dirty |= set(range(coarse, coarse + (PAGE << coarseness), PAGE))
    for first, count, shift in [*reports, (0, 2 * SPAN_PAGES, 0)]:
        start, end, page = first * PAGE, (first + count) * PAGE, PAGE << shift
        inside = {at for at in dirty if start <= at < end}
        expected = {start + (at - start) // page * page for at in inside}
        assert reported(log, start, end - start, page) == expected
        dirty -= inside
    assert not dirty


@given(marks, st.lists(st.tuples(st.integers(0, SPAN_PAGES), st.integers(1, 500)), min_size=1))
def test_only_the_ranges_asked_for_are_logged(
    writes: list[tuple[int, int]], ranges: list[tuple[int, int]]
) -> None:
    log = DirtyLog(PAGE)
    log.start(PAGE, [(first * PAGE, count * PAGE) for first, count in ranges])
    wanted = {page * PAGE for first, count in ranges for page in range(first, first + count)}
    dirty = set()
    for iova, length in writes:
        log.mark(iova, length)
        dirty |= touched(iova, length, PAGE) & wanted
    assert reported(log, 0, 2 * SPAN_PAGES * PAGE) == dirty


def test_the_last_page_of_the_address_space() -> None:
    log = DirtyLog(PAGE)
    log.start(PAGE, [])
    log.mark((1 << 64) - 1, 1)
    assert reported(log, (1 << 64) - PAGE, PAGE) == {(1 << 64) - PAGE}


def test_a_hint_that_is_coarser_than_the_device_is_taken() -> None:
    log = DirtyLog(PAGE)
    assert log.start(1 << 16, []) == 1 << 16
    log.mark(0x1_2345, 1)
    assert reported(log, 0, 1 << 18) == set(range(0x1_0000, 0x2_0000, PAGE))


def test_i9_a_hint_that_is_absurd_is_cut() -> None:
    log = DirtyLog(PAGE)
    assert log.start(1 << 63, []) == 2 << 20
    log.mark(5, 1)
    assert len(reported(log, 0, 1 << 30)) == 512


def test_nothing_is_logged_before_start_and_after_stop() -> None:
    log = DirtyLog(PAGE)
    log.mark(0, PAGE)
    log.start(PAGE, [])
    assert reported(log, 0, PAGE) == set()
    log.mark(0, PAGE)
    log.stop()
    log.stop()
    with pytest.raises(DirtyLogError):
        log.report(0, PAGE, PAGE)
    log.start(PAGE, [])
    assert reported(log, 0, PAGE) == set()


@pytest.mark.parametrize(
    ("page", "ranges"),
    [
        (0, []),
        (5000, []),
        (PAGE, [(0, 0)]),
        (PAGE, [(1, PAGE)]),
        (PAGE, [((1 << 64) - PAGE, 2 * PAGE)]),
        (PAGE, [(0, PAGE)] * (MAX_RANGES + 1)),
    ],
)
def test_starts_that_make_no_sense(page: int, ranges: list[tuple[int, int]]) -> None:
    log = DirtyLog(PAGE)
    with pytest.raises(DirtyLogError):
        log.start(page, ranges)
    log.start(PAGE, [])
    with pytest.raises(DirtyLogError):
        log.start(PAGE, [])


@pytest.mark.parametrize(
    ("iova", "length", "page"),
    [
        (0, PAGE, 0),
        (0, PAGE, 2048),
        (0, PAGE, 6000),
        (1, PAGE, PAGE),
        (0, 0, PAGE),
        (0, PAGE + 1, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE, PAGE),
        (0, 1 << 63, PAGE),
    ],
)
def test_reports_that_make_no_sense(iova: int, length: int, page: int) -> None:
    log = DirtyLog(PAGE)
    log.start(PAGE, [])
    with pytest.raises(DirtyLogError):
        log.report(iova, length, page)


def test_i1_no_mark_is_lost_between_concurrent_reports() -> None:
    log = DirtyLog(PAGE)
    log.start(PAGE, [])
    seen = set()
    done = threading.Event()

    def write(number: int) -> None:
        for page in range(number, 8192, 4):
            log.mark(page * PAGE, PAGE)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]

    def read() -> None:
        while not done.is_set():
            seen.update(reported(log, 0, 8192 * PAGE))

    reader = threading.Thread(target=read)
    reader.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    seen |= reported(log, 0, 8192 * PAGE)
    assert seen == {page * PAGE for page in range(8192)}
