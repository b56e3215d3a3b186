"""What workloads hold and write is what they were asked for, and the same again."""

import lz4.block
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf.errors import BenchUsageError
from perf.workloads.dirtying import PATTERNS, Dirtier
from perf.workloads.images import EXTENT_PAGES, Mix, file_pages, fill, random_pages

PAGE = 4096


def lz4_share(pages: np.ndarray) -> float:
    packed = [
        min(PAGE, len(lz4.block.compress(page.tobytes(), store_size=False))) for page in pages
    ]
    return sum(packed) / pages.size


def test_an_image_has_the_shares_it_was_asked_for() -> None:
    memory = np.zeros((64 * EXTENT_PAGES + 3) * PAGE, np.uint8)
    fill(memory, Mix(zero=0.5, random=0.25))
    pages = memory.reshape(-1, PAGE)
    used = pages[pages.any(axis=1)]
    assert len(used) / len(pages) == pytest.approx(0.5, abs=0.02)
    random = [page for page in used if len(lz4.block.compress(page.tobytes())) > PAGE]
    assert len(random) / len(pages) == pytest.approx(0.25, abs=0.05)
    again = np.zeros_like(memory)
    fill(again, Mix(zero=0.5, random=0.25))
    assert np.array_equal(memory, again)
    other = np.zeros_like(memory)
    fill(other, Mix(zero=0.5, random=0.25), seed=2)
    assert not np.array_equal(memory, other)


def test_file_pages_compress_to_about_half_and_random_ones_do_not() -> None:
    rng = np.random.default_rng(7)
    assert lz4_share(file_pages(rng, 512)) == pytest.approx(0.5, abs=0.06)
    assert lz4_share(random_pages(rng, 64)) == 1.0


@pytest.mark.parametrize(("zero", "random"), [(-0.1, 0), (0.6, 0.5)])
def test_shares_that_cannot_be(zero: float, random: float) -> None:
    with pytest.raises(BenchUsageError, match="shares"):
        Mix(zero, random)


@given(
    pattern=st.sampled_from(PATTERNS),
    n=st.integers(0, 300),
    n_pages=st.integers(1, 200),
    changed=st.sampled_from([0.0, 0.1, 1.0]),
)
@settings(max_examples=50)
def test_exactly_the_pages_told_have_changed(
    pattern: str, n: int, n_pages: int, changed: float
) -> None:
    memory = np.zeros(n_pages * PAGE, np.uint8)
    content = lambda rng, k: np.full((k, PAGE), 1, np.uint8)  # noqa: E731
    told = Dirtier(memory, pattern, changed=changed, content=content).write(n)
    per_page = memory.reshape(-1, PAGE).sum(axis=1, dtype=np.int64)
    assert told.dtype == np.uint32
    assert np.array_equal(told, np.flatnonzero(per_page))
    assert told.size <= n
    assert set(per_page[told]) <= {max(1, round(changed * PAGE))}


def test_patterns() -> None:
    n_pages = 1000

    def written(pattern: str, times: int = 200) -> np.ndarray:
        dirtier = Dirtier(np.zeros(n_pages * PAGE, np.uint8), pattern, changed=0.0)
        counts = np.zeros(n_pages, np.int64)
        for _ in range(times):
            counts[dirtier.write(10)] += 1
        return np.sort(counts)[::-1]

    assert set(written("sequential", 300)) == {3}
    uniform, hot, zipf = written("uniform"), written("hot"), written("zipf")
    assert uniform[0] < 12
    assert hot[:100].sum() > 0.8 * hot.sum()
    assert zipf[0] > zipf[9] > zipf[99]
    assert zipf[:10].sum() > 0.2 * zipf.sum()
    with pytest.raises(BenchUsageError, match="uniform, sequential"):
        written("none")


def test_a_rate_is_kept_over_short_times() -> None:
    dirtier = Dirtier(np.zeros(100 * PAGE, np.uint8), "sequential", pages_per_s=25)
    assert sum(dirtier.advance(0.01).size for _ in range(200)) == 50
