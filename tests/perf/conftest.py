"""Samples to read, compare and draw."""

from collections.abc import Callable
from pathlib import Path

import pytest

from perf.results import Better, Dimension, Sample

MakeSamples = Callable[..., list[Sample]]


def make_samples(
    *values: float,
    benchmark: str = "link",
    metric: str = "rate",
    better: Better = "higher",
    machine: str = "a machine",
    **dimensions: Dimension,
) -> list[Sample]:
    return [
        Sample(benchmark, metric, value, "GiB/s", better, dimensions, machine, "abc")
        for value in values
    ]


@pytest.fixture
def samples() -> MakeSamples:
    return make_samples


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[Sample]], Path]:
    def write_file(name: str, several: list[Sample]) -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{sample.to_line()}\n" for sample in several))
        return path

    return write_file
