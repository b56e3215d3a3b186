"""Bitmap kernels against sets of plain Python integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.kernels import bitmap as bm
from transport.kernels.load import warm_up

# No whole number of words.
MAX_PAGES = 64 * 130 + 17


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> None:
    """So that no example's deadline meets a first compilation."""
    warm_up()


@st.composite
def page_sets(draw: st.DrawFn) -> tuple[int, set[int]]:
    """A number of pages and some of them: single ones, long runs, and everything between."""
    n_pages = draw(st.integers(0, MAX_PAGES))
    pages: set[int] = set()
    if n_pages:
        for first, length, step in draw(
            st.lists(
                st.tuples(
                    st.integers(0, n_pages - 1), st.integers(1, 700), st.sampled_from([1, 1, 2, 9])
                ),
                max_size=6,
            )
        ):
            pages |= set(range(first, min(first + length, n_pages), step))
    return n_pages, pages


def bitmap_of(pages: set[int], n_pages: int, *, dirt: bool = False) -> np.ndarray:
    """Built by Python's integers; with `dirt` all bits behind the last page are set."""
    words = (n_pages + 63) // 64
    value = sum(1 << page for page in pages)
    if dirt:
        value |= (1 << words * 64) - (1 << n_pages)
    return np.frombuffer(value.to_bytes(words * 8, "little"), np.uint64).copy()


@given(page_sets(), st.booleans())
def test_scans_find_what_is_set(case: tuple[int, set[int]], dirt: bool) -> None:
    n_pages, pages = case
    bitmap = bitmap_of(pages, n_pages, dirt=dirt)
    bitmap.flags.writeable = False
    assert bm.count(bitmap, n_pages) == len(pages)
    indices = bm.bitmap_to_indices(bitmap, n_pages)
    assert indices.dtype == np.uint32
    assert indices.tolist() == sorted(pages)


@given(page_sets())
def test_without_a_number_of_pages_all_bits_count(case: tuple[int, set[int]]) -> None:
    n_pages, pages = case
    bitmap = bitmap_of(pages, n_pages)
    assert bm.count(bitmap) == len(pages)
    assert bm.bitmap_to_indices(bitmap).tolist() == sorted(pages)


@given(page_sets())
def test_pages_become_a_bitmap(case: tuple[int, set[int]]) -> None:
    n_pages, pages = case
    bitmap = bm.indices_to_bitmap(np.array(sorted(pages), np.uint32), n_pages)
    assert bitmap.tolist() == bitmap_of(pages, n_pages).tolist()


def test_a_page_out_of_range_is_refused() -> None:
    with pytest.raises(IndexError, match="page 100 of 100"):
        bm.indices_to_bitmap(np.array([3, 100, 4], np.uint32), 100)


@pytest.mark.parametrize(
    "unfit",
    [
        np.zeros(1, np.uint64),
        np.zeros(4, np.int64),
        np.zeros((2, 2), np.uint64),
        np.zeros(8, np.uint64)[::2],
    ],
)
def test_an_array_that_is_no_bitmap_of_that_size_is_refused(unfit: np.ndarray) -> None:
    with pytest.raises(ValueError, match="bitmap"):
        bm.bitmap_to_indices(unfit, 65)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="32-bit"):
        bm.count(np.zeros(1, np.uint64), 1 << 32)
    with pytest.raises(ValueError, match="uint32"):
        bm.indices_to_bitmap(np.zeros(1, np.int64), 64)
