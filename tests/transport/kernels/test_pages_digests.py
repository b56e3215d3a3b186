"""Digests of pages and blocks, and the content scan, against the xxhash package."""

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.kernels.bitmap import bitmap_to_indices
from transport.kernels.digests import (
    BLOCK_PAGES,
    digest_all,
    digest_blocks,
    digest_pages,
    scan_changed,
)
from transport.kernels.load import warm_up

SEED = 0xFEDCBA9876543210


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> None:
    """So that no example's deadline meets a first compilation."""
    warm_up()


def random_memory(n_pages: int) -> np.ndarray:
    return np.random.default_rng(n_pages).integers(0, 256, n_pages * 4096, np.uint8)


def test_digests_are_xxh3_of_each_page() -> None:
    memory = random_memory(5)
    memory.flags.writeable = False
    pages = [memory[start : start + 4096].tobytes() for start in range(0, memory.size, 4096)]
    expected = [xxhash.xxh3_64_intdigest(page, SEED) for page in pages]
    assert digest_all(memory, SEED).tolist() == expected
    order = [4, 0, 4, 2]
    found = digest_pages(memory, np.array(order, np.uint32), SEED)
    assert found.tolist() == [expected[page] for page in order]
    assert digest_pages(memory, np.empty(0, np.uint32), SEED).size == 0


@given(st.integers(0, 3 * BLOCK_PAGES + 1))
def test_a_block_digest_covers_the_digests_of_its_pages(n_pages: int) -> None:
    digests = np.arange(n_pages, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [
        xxhash.xxh3_64_intdigest(digests[first : first + BLOCK_PAGES].tobytes(), SEED)
        for first in range(0, n_pages, BLOCK_PAGES)
    ]
    assert digest_blocks(digests, SEED).tolist() == expected


@settings(max_examples=30)
@given(st.lists(st.sets(st.integers(0, 129)), max_size=5))
def test_i1_a_scan_finds_what_was_written_since_the_one_before(rounds: list[set[int]]) -> None:
    memory = random_memory(130)
    seen = np.zeros(130, np.uint64)
    assert bitmap_to_indices(scan_changed(memory, seen, SEED)).tolist() == list(range(130))
    for written in rounds:
        for page in written:
            memory[page * 4096 + 77] ^= 1
        assert bitmap_to_indices(scan_changed(memory, seen, SEED)).tolist() == sorted(written)


def test_memory_that_is_not_whole_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        digest_all(np.zeros(4097, np.uint8), SEED)
    with pytest.raises(ValueError, match="aligned"):
        digest_all(np.zeros(8192, np.uint8)[1:4097], SEED)
    with pytest.raises(ValueError, match="uint8"):
        digest_all(np.zeros(4096, np.uint16), SEED)
    with pytest.raises(IndexError, match="page 1 of 1"):
        digest_pages(np.zeros(4096, np.uint8), np.array([1], np.uint32), SEED)
    with pytest.raises(ValueError, match="2 digests for 1 pages"):
        scan_changed(np.zeros(4096, np.uint8), np.zeros(2, np.uint64), SEED)
