"""The permutation test against plain enumeration, and what it must say of clear cases."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perf.statistics import MAX_EXACT, Statistic, center, permutation_test, quantile, summarize

CENTERS: dict[str, Callable[[Sequence[int]], Fraction]] = {
    "mean": lambda values: Fraction(sum(values), len(values)),
    "median": lambda values: Fraction(statistics.median(map(Fraction, values))),
}

samples = st.lists(st.integers(-50, 50), min_size=1, max_size=5)


def enumerated_p(a: list[int], b: list[int], statistic: Statistic) -> Fraction | float:
    """By the definition, in exact arithmetic: every choice of the places that are called A."""
    pooled, of = [*a, *b], CENTERS[statistic]
    observed = abs(of(b) - of(a))
    extreme = total = 0
    for chosen in itertools.combinations(range(len(pooled)), len(a)):
        dealt_a = [pooled[i] for i in chosen]
        dealt_b = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        extreme += abs(of(dealt_b) - of(dealt_a)) >= observed
        total += 1
    return extreme / total


@pytest.mark.parametrize("statistic", ["mean", "median"])
@given(a=samples, b=samples)
@settings(max_examples=60)
def test_exact_p_is_that_of_plain_enumeration(
    statistic: Statistic, a: list[int], b: list[int]
) -> None:
    assert permutation_test(a, b, statistic) == pytest.approx(enumerated_p(a, b, statistic))


@given(a=samples, b=samples, shift=st.integers(-9, 9), scale=st.sampled_from([0.1, 3.0, 1e6]))
def test_p_depends_on_neither_unit_nor_zero_nor_order(
    a: list[int], b: list[int], shift: int, scale: float
) -> None:
    p = permutation_test(a, b)
    assert permutation_test(b, a) == pytest.approx(p)
    moved = [[(value + shift) * scale for value in side] for side in (a, b)]
    assert permutation_test(moved[0], moved[1]) == pytest.approx(p)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_resampling_agrees_with_enumeration(
    statistic: Statistic, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = [3, 5, 8, 1, 9], [7, 12, 6, 11, 8]
    exact = permutation_test(a, b, statistic)
    monkeypatch.setattr("perf.statistics.MAX_EXACT", 0)
    # Standard error of 9,999 draws at this p: below 0.003; the seed is fixed.
    assert permutation_test(a, b, statistic) == pytest.approx(exact, abs=0.015)


def test_large_sets() -> None:
    low, high = list(range(100)), list(range(100, 200))
    assert permutation_test(low, high) == pytest.approx(1 / 10_000)
    assert permutation_test(low, low) == 1.0
    assert MAX_EXACT < 10**58


def test_equal_values_do_not_differ() -> None:
    assert permutation_test([0.1] * 5, [0.1] * 5) == 1.0
    # 0.1 + 0.2 is not 0.3 in binary: ties have to be seen as such.
    assert permutation_test([0.1, 0.2], [0.3, 0.0]) == 1.0


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        permutation_test([], [1.0])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_quartiles_are_those_of_the_standard_library(values: list[float]) -> None:
    assume(len(set(values)) > 1)
    found = summarize(values)
    expected = statistics.quantiles(values, n=4, method="inclusive")
    assert [found.lower, found.median, found.upper] == pytest.approx(expected)
    assert found.n == len(values)
    assert center(values, "median") == pytest.approx(statistics.median(values))


def test_a_single_sample_is_its_own_summary() -> None:
    assert quantile([7.0], 0.99) == 7.0
    assert summarize([7.0]).median == 7.0
