"""`bench compare`: whether two result files differ, series by series.

A difference counts when chance does not explain it (permutation test, p at most `alpha`) and when
it is large enough to matter (`relevant`). Both are needed: with many samples the smallest shift of
a busy machine is significant, and with few a large one is not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from perf.errors import BenchUsageError
from perf.results import Key, Sample, dimensions_text, number_text, series
from perf.statistics import Statistic, center, permutation_test

Verdict = Literal["better", "worse", "differs", "same", "unclear", "too few samples"]


@dataclass(frozen=True)
class Criteria:
    """When a difference counts."""

    alpha: float = 0.01
    """Greatest p value."""
    relevant: float = 0.05
    """Least change of the center, as a share of that of A."""
    statistic: Statistic = "mean"


@dataclass(frozen=True)
class Comparison:
    """What became of one series from A to B."""

    name: str
    unit: str
    n: tuple[int, int]
    centers: tuple[float, float]
    p: float
    verdict: Verdict

    @property
    def change(self) -> float:
        """How far the center moved from A to B, as a share of that of A."""
        a, b = self.centers
        if a == b:
            return 0.0
        return (b - a) / abs(a) if a else math.copysign(math.inf, b - a)

    def text(self) -> str:
        a, b = self.centers
        return (
            f"{self.verdict:<16} {self.name}: {number_text(a)} -> {number_text(b)} {self.unit} "
            f"({self.change:+.1%}, p={self.p:.4f}, n={self.n[0]}+{self.n[1]})"
        )


def compare(a: Sequence[Sample], b: Sequence[Sample], criteria: Criteria) -> list[Comparison]:
    """Compares every series that both hold. Raises `BenchUsageError` if there is none."""
    apart = differing_settings(a, b)
    of_a, of_b = (_series_without(samples, apart) for samples in (a, b))
    common = [key for key in of_a if key in of_b]
    if not common:
        raise BenchUsageError("the two files have no series in common")
    return [_compare(key, of_a[key], of_b[key], criteria) for key in common]


def differing_settings(a: Sequence[Sample], b: Sequence[Sample]) -> dict[str, set[str]]:
    """Of each benchmark, the dimensions that have one value in all of A and another in all of B:
    what the two files are to be compared by."""
    found: dict[str, set[str]] = {}
    for benchmark in {sample.benchmark for sample in a}:
        ours = [sample.dimensions for sample in a if sample.benchmark == benchmark]
        others = [sample.dimensions for sample in b if sample.benchmark == benchmark]
        for name in ours[0]:
            values = [{each.get(name) for each in side} for side in (ours, others)]
            if all(len(side) == 1 for side in values) and values[0] != values[1]:
                found.setdefault(benchmark, set()).add(name)
    return found


def _series_without(
    samples: Sequence[Sample], apart: dict[str, set[str]]
) -> dict[Key, list[Sample]]:
    found: dict[Key, list[Sample]] = {}
    for (benchmark, metric, dimensions), several in series(samples).items():
        left = tuple(item for item in dimensions if item[0] not in apart.get(benchmark, ()))
        found.setdefault((benchmark, metric, left), []).extend(several)
    return found


def _compare(key: Key, a: list[Sample], b: list[Sample], criteria: Criteria) -> Comparison:
    benchmark, metric, dimensions = key
    values_a, values_b = ([sample.value for sample in side] for side in (a, b))
    p = permutation_test(values_a, values_b, criteria.statistic)
    name = f"{benchmark}/{metric} {dimensions_text(dict(dimensions))}".strip()
    centers = center(values_a, criteria.statistic), center(values_b, criteria.statistic)
    n = len(a), len(b)
    found = Comparison(name, a[0].unit, n, centers, p, "same")
    return Comparison(name, a[0].unit, n, centers, p, _verdict(found, a[0].better, criteria))


def _verdict(found: Comparison, better: str, criteria: Criteria) -> Verdict:
    if abs(found.change) < criteria.relevant:
        return "same"
    if found.p > criteria.alpha:
        return "too few samples" if least_p(*found.n) > criteria.alpha else "unclear"
    if better == "neither":
        return "differs"
    return "better" if (found.change > 0) == (better == "higher") else "worse"


def least_p(n_a: int, n_b: int) -> float:
    """The smallest p value that so many samples can have, when A and B do not overlap."""
    return (2 if n_a == n_b else 1) / math.comb(n_a + n_b, n_a)


def lines(a: Sequence[Sample], b: Sequence[Sample], found: list[Comparison]) -> Iterator[str]:
    """What is compared, and a line for each series."""
    for label, side in (("A", a), ("B", b)):
        revisions = ", ".join(sorted({sample.revision for sample in side}))
        yield f"{label}: {revisions} on {'; '.join(sorted({sample.machine for sample in side}))}"
    for benchmark, names in sorted(differing_settings(a, b).items()):
        for name in sorted(names):
            of_a, of_b = (
                next(s.dimensions.get(name) for s in side if s.benchmark == benchmark)
                for side in (a, b)
            )
            yield f"{benchmark}: {name}={of_a} in A, {of_b} in B"
    if {sample.machine for sample in a} != {sample.machine for sample in b}:
        yield "two machines: only ratios to something measured beside them say anything"
    for each in found:
        yield each.text()
