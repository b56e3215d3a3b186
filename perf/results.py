"""The result format: one JSON line for each sample, and what is said about many of them.

A line holds the keys of `Sample`. Samples that differ in nothing but their value, machine and
revision are a series; figures are computed from series when they are read, never stored.
"""

import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from perf.errors import BenchUsageError

Dimension = str | int | float
"""The value of a dimension."""
Better = Literal["higher", "lower", "neither"]
"""Which values are good. `neither`: a yardstick (a peer, a limit), or a mere description."""
Key = tuple[str, str, tuple[tuple[str, Dimension], ...]]
"""Benchmark, metric, and dimensions in order: what names a series."""

_BETTER = ("higher", "lower", "neither")


@dataclass(frozen=True)
class Sample:
    """One measured value, and all that has to be known to compare it with another."""

    benchmark: str
    metric: str
    value: float
    unit: str
    better: Better
    dimensions: Mapping[str, Dimension]
    machine: str
    revision: str

    @property
    def key(self) -> Key:
        return self.benchmark, self.metric, tuple(sorted(self.dimensions.items()))

    def to_line(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> "Sample":
        """Raises ValueError with what is wrong with the line."""
        data = json.loads(line)
        fields = cls.__dataclass_fields__
        if not isinstance(data, dict) or set(data) != set(fields):
            raise ValueError(f"a sample has the keys {', '.join(fields)}")
        texts = ("benchmark", "metric", "unit", "machine", "revision")
        if not all(isinstance(data[name], str) for name in texts) or data["better"] not in _BETTER:
            raise ValueError("a text of the sample is missing")
        if not _is_number(data["value"]):
            raise ValueError(f"the value {data['value']!r} is no finite number")
        dimensions = data["dimensions"]
        if not isinstance(dimensions, dict) or not all(
            isinstance(value, str) or _is_number(value) for value in dimensions.values()
        ):
            raise ValueError("the dimensions have to be an object of texts and numbers")
        return cls(**data)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read(path: Path) -> list[Sample]:
    """All samples of a file. Raises `BenchUsageError` naming the line that is not one."""
    samples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchUsageError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            samples.append(Sample.from_line(line))
        except ValueError as error:
            raise BenchUsageError(f"{path}:{number} is no result: {error}") from error
    if not samples:
        raise BenchUsageError(f"{path} holds no results")
    return samples


def series(samples: Iterable[Sample]) -> dict[Key, list[Sample]]:
    """The samples of each series, in their order."""
    found: dict[Key, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.key, []).append(sample)
    return found


def dimensions_text(dimensions: Mapping[str, Dimension]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(dimensions.items()))


def number_text(value: float) -> str:
    """Four digits, and no exponent where a person would write none."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


@functools.cache
def machine() -> str:
    """What makes figures of this machine comparable with each other and not with another's."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = " ".join(line.partition(":")[2].split())
            break
    cores = len(os.sched_getaffinity(0))
    kernel = platform.release().partition("-")[0]
    return f"{model}, {cores} cores, Linux {kernel}, Python {platform.python_version()}"


@functools.cache
def revision() -> str:
    """The commit of this checkout, or the installed version where there is no checkout."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("vfio-ferry")
    return done.stdout.strip()
