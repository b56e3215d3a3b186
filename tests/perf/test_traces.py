"""Recorded guests: what a file says, which of it the floor samples, and the benchmark over one."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ferry.cli import main
from ferry.errors import Exit
from perf.benchmarks.trace import SAMPLE_PAGES, sampled
from perf.errors import BenchUsageError
from perf.results import read
from perf.table import BENCHMARKS
from perf.workloads import traces

PAGE = 4096


def write_trace(path: Path, **changed: np.ndarray) -> Path:
    """Two rounds: page 1 in full, then page 1 as a difference and page 2 in full."""
    arrays: dict[str, Any] = {
        "base": np.zeros((4, PAGE), np.uint8),
        "ptr": np.array([0, 1, 3]),
        "idx": np.array([1, 1, 2], np.uint32),
        "kind": np.array([0, 1, 0], np.uint8),
        "data": np.stack([np.full(PAGE, value, np.uint8) for value in (3, 1, 9)]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays, **changed})
    path.write_bytes(zstandard.compress(buffer.getvalue()))
    return path


def test_a_trace_gives_pages_not_differences(tmp_path: Path) -> None:
    trace = traces.load(write_trace(tmp_path / "trace"))
    assert not trace.base.any()
    assert [indices.tolist() for indices, _ in trace.rounds] == [[1], [1, 2]]
    assert [pages[:, 0].tolist() for _, pages in trace.rounds] == [[3], [2, 9]]


def test_what_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(BenchUsageError, match="is no trace"):
        traces.load(tmp_path / "none")
    (tmp_path / "text").write_text("no")
    with pytest.raises(BenchUsageError, match="is no trace"):
        traces.load(tmp_path / "text")
    with pytest.raises(BenchUsageError, match="pages are not of 4096 bytes"):
        traces.load(write_trace(tmp_path / "odd", base=np.zeros((4, 100), np.uint8)))


def test_the_benchmark_counts_and_finds_a_floor(tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace"), tmp_path / "out.json"
    run = ["bench", "run", "trace", "--trace", str(trace), "--repeat", "1", "--out", str(out)]
    assert main([*run, "--set", "codecs=lz4+zstd:9", "--debug"]) == Exit.OK
    found = {(each.metric, each.dimensions.get("codec")): each.value for each in read(out)}
    assert {bar.metric for bar in BENCHMARKS["trace"].bars} <= {metric for metric, _ in found}
    assert 0 < found["floor_of_raw", None] < found["wire_of_raw", "zstd:9"] < 0.1


@given(st.integers(0, 2000), st.integers(0, 5))
def test_a_sample_is_of_whole_blocks(n_pages: int, seed: int) -> None:
    assert sampled(n_pages, 1.0, seed).tolist() == [True] * n_pages
    assert not sampled(n_pages, 0.0, seed).any()
    taken = sampled(n_pages, 0.5, seed)
    assert taken.size == n_pages
    blocks = np.split(taken, range(SAMPLE_PAGES, n_pages, SAMPLE_PAGES))
    assert all(block.all() or not block.any() for block in blocks)


def test_a_sample_is_of_the_share_asked_for() -> None:
    taken = np.concatenate([sampled(3000, 0.25, seed) for seed in range(100)])
    assert taken.mean() == pytest.approx(0.25, abs=0.02)
