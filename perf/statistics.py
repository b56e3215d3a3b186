"""Median, quartiles, and whether two sets of samples differ: a two-sided permutation test.

The test asks: had the labels "A" and "B" nothing to do with the values, how often would dealing
them out anew make the two sets differ by at least as much as they do? It assumes no distribution
(Fisher; Ernst, "Permutation Methods: A Basis for Exact Inference", 2004).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Statistic = Literal["mean", "median"]

MAX_EXACT = 20_000
"""Up to so many ways to deal the labels, all are tried; C(16, 8) is 12,870."""
RESAMPLES = 9_999
_BATCH = 1_000
_TIE = 1e-9
"""Sums in another order differ in their last bits; relative to the spread of all samples."""


@dataclass(frozen=True)
class Summary:
    """Median and quartiles, by linear interpolation."""

    n: int
    median: float
    lower: float
    upper: float


def summarize(values: Sequence[float]) -> Summary:
    lower, median, upper = (quantile(values, q) for q in (0.25, 0.5, 0.75))
    return Summary(len(values), median, lower, upper)


def quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(np.asarray(values, np.float64), q))


def center(values: Sequence[float], statistic: Statistic) -> float:
    return float(_centers(np.asarray(values, np.float64)[np.newaxis], statistic)[0])


def permutation_test(
    a: Sequence[float], b: Sequence[float], statistic: Statistic = "mean", seed: int = 0
) -> float:
    """The two-sided p value of the difference between the centers of `a` and `b`.

    Exact while there are at most `MAX_EXACT` ways to choose; else from `RESAMPLES` random ones,
    the observed one counted among them, so that p is never 0. ValueError: an empty set.
    """
    if not a or not b:
        raise ValueError("an empty set of samples")
    pooled = np.asarray([*a, *b], np.float64)
    observed = abs(_differences(pooled[np.newaxis], len(a), statistic)[0])
    least = observed - _TIE * float(np.ptp(pooled))
    if math.comb(pooled.size, len(a)) <= MAX_EXACT:
        deals = _all_deals(pooled.size, len(a))
        return float(np.mean(np.abs(_differences(pooled[deals], len(a), statistic)) >= least))
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, RESAMPLES, _BATCH):
        rows = min(_BATCH, RESAMPLES - start)
        shuffled = rng.permuted(np.tile(pooled, (rows, 1)), axis=1)
        extreme += int(np.sum(np.abs(_differences(shuffled, len(a), statistic)) >= least))
    return (extreme + 1) / (RESAMPLES + 1)


def _all_deals(n: int, k: int) -> npt.NDArray[np.intp]:
    """Every choice of `k` out of `n` positions, each followed by the positions left."""
    chosen = np.array(list(itertools.combinations(range(n), k)), np.intp)
    free = np.ones((len(chosen), n), np.bool_)
    np.put_along_axis(free, chosen, False, axis=1)
    left = np.nonzero(free)[1].reshape(len(chosen), n - k)
    return np.concatenate((chosen, left), axis=1)


def _differences(
    rows: npt.NDArray[np.float64], n_a: int, statistic: Statistic
) -> npt.NDArray[np.float64]:
    """For each row, the center of its values from `n_a` on, less that of the first `n_a`."""
    return _centers(rows[:, n_a:], statistic) - _centers(rows[:, :n_a], statistic)


def _centers(rows: npt.NDArray[np.float64], statistic: Statistic) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64]
    found = rows.mean(axis=1) if statistic == "mean" else np.median(rows, axis=1)
    return found
