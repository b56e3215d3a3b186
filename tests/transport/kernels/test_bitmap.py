"""Bitmap kernels against sets of plain Python integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.kernels import bitmap as bm
from transport.kernels.load import warm_up

# Beyond one block of the scan (64 words), and no whole number of words.
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


def runs_of(pages: set[int]) -> list[tuple[int, int]]:
    starts = sorted(page for page in pages if page - 1 not in pages)
    ends = sorted(page + 1 for page in pages if page + 1 not in pages)
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


@given(page_sets(), st.booleans())
def test_scans_find_what_is_set(case: tuple[int, set[int]], dirt: bool) -> None:
    n_pages, pages = case
    bitmap = bitmap_of(pages, n_pages, dirt=dirt)
    bitmap.flags.writeable = False
    assert bm.count(bitmap, n_pages) == len(pages)
    indices = bm.bitmap_to_indices(bitmap, n_pages)
    assert indices.dtype == np.uint32
    assert indices.tolist() == sorted(pages)
    starts, lengths = bm.bitmap_to_runs(bitmap, n_pages)
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == runs_of(pages)
    assert bm.runs_to_indices(starts, lengths).tolist() == sorted(pages)


def test_the_numbers_of_a_word_are_those_of_its_bits() -> None:
    words = np.random.default_rng(5).integers(0, 1 << 64, 200, np.uint64)
    words[::3] &= words[1::3]
    for word in [*words.tolist(), 0, (1 << 64) - 1, 1, 1 << 63]:
        indices = np.zeros(5 + 64 + bm._SLACK, np.uint32)
        bm._write_by_table(np.uint64(word), np.uint32(640), indices, 5)
        bits = [bit for bit in range(64) if word >> bit & 1]
        assert indices[5 : 5 + len(bits)].tolist() == [640 + bit for bit in bits]
        assert not indices[:5].any()


@given(page_sets())
def test_without_a_number_of_pages_all_bits_count(case: tuple[int, set[int]]) -> None:
    n_pages, pages = case
    bitmap = bitmap_of(pages, n_pages)
    assert bm.count(bitmap) == len(pages)
    assert bm.bitmap_to_indices(bitmap).tolist() == sorted(pages)
    starts, lengths = bm.bitmap_to_runs(bitmap)
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == runs_of(pages)


@given(page_sets(), page_sets())
def test_pages_are_set_cleared_merged(
    case: tuple[int, set[int]], other: tuple[int, set[int]]
) -> None:
    n_pages, pages = case
    others = {page for page in other[1] if page < n_pages}
    listed = np.array(sorted(pages), np.uint32)
    bitmap = bm.indices_to_bitmap(listed, n_pages)
    assert bitmap.tolist() == bitmap_of(pages, n_pages).tolist()
    assert all(bm.test_page(bitmap, page) == (page in pages) for page in range(0, n_pages, 7))

    merged = bitmap.copy()
    bm.merge_bitmaps(merged, bitmap_of(others, n_pages))
    assert merged.tolist() == bitmap_of(pages | others, n_pages).tolist()

    changed = np.array(sorted(others), np.uint32)
    bm.clear_pages(merged, changed, n_pages)
    assert merged.tolist() == bitmap_of(pages - others, n_pages).tolist()
    bm.set_pages(merged, changed, n_pages)
    assert merged.tolist() == bitmap_of(pages | others, n_pages).tolist()


@given(page_sets(), st.integers(1, 300), st.integers(0, 299), st.booleans())
def test_coarse_bits_become_their_pages(
    case: tuple[int, set[int]], pages_per_bit: int, less: int, dirt: bool
) -> None:
    coarse_bits, bits = case
    n_pages = max(0, coarse_bits * pages_per_bit - less % pages_per_bit)
    expanded = bm.expand_coarse(bitmap_of(bits, coarse_bits, dirt=dirt), pages_per_bit, n_pages)
    fine = np.zeros(bm.words_for(n_pages) * 64, bool)
    for bit in bits:
        fine[bit * pages_per_bit : min((bit + 1) * pages_per_bit, n_pages)] = True
    assert np.array_equal(np.unpackbits(expanded.view(np.uint8), bitorder="little"), fine)


def test_a_page_out_of_range_is_refused() -> None:
    bitmap = bm.empty_bitmap(100)
    beyond = np.array([3, 100, 4], np.uint32)
    with pytest.raises(IndexError, match="page 100 of 100"):
        bm.indices_to_bitmap(beyond, 100)
    with pytest.raises(IndexError):
        bm.set_pages(bitmap, beyond, 100)
    assert bm.bitmap_to_indices(bitmap).tolist() == [3]
    with pytest.raises(IndexError):
        bm.clear_pages(bitmap, beyond, 100)
    with pytest.raises(IndexError):
        bm.test_page(bitmap, 128)


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
    with pytest.raises(ValueError, match="bitmap"):
        bm.expand_coarse(unfit, 1, 65)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="32-bit"):
        bm.count(np.zeros(1, np.uint64), 1 << 32)
    with pytest.raises(ValueError, match="cannot be merged"):
        bm.merge_bitmaps(bm.empty_bitmap(64), bm.empty_bitmap(65))
    with pytest.raises(ValueError, match="cannot stand for"):
        bm.expand_coarse(bm.empty_bitmap(64), 0, 64)
    with pytest.raises(ValueError, match="behind the last page"):
        bm.runs_to_indices(np.array([0xFFFFFFFF], np.uint32), np.array([2], np.uint32))
    with pytest.raises(ValueError, match="same length"):
        bm.runs_to_indices(np.zeros(1, np.uint32), np.zeros(2, np.uint32))
    with pytest.raises(ValueError, match="uint32"):
        bm.indices_to_bitmap(np.zeros(1, np.int64), 64)
