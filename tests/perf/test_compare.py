"""What `compare` says of two files, and its exit code."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ferry.cli import main
from ferry.errors import Exit
from perf.compare import Criteria, compare, least_p
from perf.errors import BenchUsageError
from perf.results import Sample
from tests.perf.conftest import MakeSamples

HIGH = (10.0, 10.1, 10.2, 9.9, 9.8, 10.05)
LOW = (8.0, 8.1, 8.2, 7.9, 7.8, 8.05)
WIDE = (5.0, 15.0, 9.0, 12.0, 7.0, 11.0)
OTHER_WIDE = (6.0, 16.0, 12.0, 13.0, 9.0, 11.0)


@pytest.mark.parametrize(
    ("a", "b", "better", "verdict"),
    [
        (HIGH, LOW, "higher", "worse"),
        (HIGH, LOW, "lower", "better"),
        (LOW, HIGH, "higher", "better"),
        (LOW, HIGH, "lower", "worse"),
        (HIGH, LOW, "neither", "differs"),
        (HIGH, HIGH, "higher", "same"),
        (WIDE, OTHER_WIDE, "higher", "unclear"),
        (HIGH[:2], LOW[:2], "higher", "too few samples"),
        # Certain, and too small to matter.
        (HIGH, [value * 0.97 for value in HIGH], "higher", "same"),
    ],
)
def test_verdicts(
    samples: MakeSamples,
    a: tuple[float, ...],
    b: list[float] | tuple[float, ...],
    better: str,
    verdict: str,
) -> None:
    [found] = compare(samples(*a, better=better), samples(*b, better=better), Criteria())
    assert found.verdict == verdict


def test_effect_and_criteria(samples: MakeSamples) -> None:
    a, b = samples(*HIGH), samples(*(value * 0.97 for value in HIGH))
    [found] = compare(a, b, Criteria(alpha=0.05, relevant=0.02))
    assert found.verdict == "worse"
    assert found.change == pytest.approx(-0.03)
    assert "(-3.0%, p=" in found.text()
    [found] = compare(samples(0.0), samples(1.0), Criteria())
    assert found.change == float("inf")


def test_the_least_p_is_that_of_sets_that_do_not_overlap(samples: MakeSamples) -> None:
    for n_a, n_b in ((4, 4), (3, 6), (5, 2)):
        a, b = samples(*range(n_a)), samples(*range(100, 100 + n_b))
        [found] = compare(a, b, Criteria())
        assert found.p == pytest.approx(least_p(n_a, n_b))


def test_two_settings_are_compared_where_they_differ_throughout(samples: MakeSamples) -> None:
    a = [*samples(*HIGH, lanes=1, case="zero"), *samples(*HIGH, lanes=1, case="text")]
    b = [*samples(*LOW, lanes=2, case="zero"), *samples(*HIGH, lanes=2, case="text")]
    found = {each.name: each.verdict for each in compare(a, b, Criteria())}
    assert found == {"link/rate case=zero": "worse", "link/rate case=text": "same"}


def test_a_sweep_on_both_sides_is_compared_point_by_point(samples: MakeSamples) -> None:
    a = [*samples(*HIGH, lanes=1), *samples(*LOW, lanes=2)]
    found = compare(a, a, Criteria())
    assert [(each.name, each.verdict) for each in found] == [
        ("link/rate lanes=1", "same"),
        ("link/rate lanes=2", "same"),
    ]


def test_nothing_in_common(samples: MakeSamples) -> None:
    with pytest.raises(BenchUsageError, match="no series in common"):
        compare(samples(1.0), samples(1.0, benchmark="pages"), Criteria())


def test_the_exit_code_says_whether_something_got_worse(
    samples: MakeSamples,
    write: Callable[[str, list[Sample]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = write("a", samples(*HIGH, lanes=1)), write("b", samples(*LOW, lanes=2))
    assert main(["bench", "compare", str(a), str(b)]) == Exit.REGRESSED
    said = capsys.readouterr().out
    assert "link: lanes=1 in A, 2 in B" in said
    assert "worse            link/rate: 10.01 -> 8.008 GiB/s (-20.0%, p=0.0022, n=6+6)" in said
    assert main(["bench", "compare", str(b), str(a)]) == Exit.OK
    assert main(["bench", "compare", str(a), str(b), "--relevant", "0.5"]) == Exit.OK
    assert main(["bench", "compare", str(a), str(b), "--alpha", "0.001"]) == Exit.OK


def test_two_machines_are_pointed_out(
    samples: MakeSamples,
    write: Callable[[str, list[Sample]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = write("a", samples(1.0)), write("b", samples(1.0, machine="another"))
    assert main(["bench", "compare", str(a), str(b)]) == Exit.OK
    assert "two machines" in capsys.readouterr().out


def test_a_file_that_is_none(
    samples: MakeSamples,
    write: Callable[[str, list[Sample]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    a = write("a", samples(1.0))
    assert main(["bench", "compare", str(a), "/none"]) == Exit.USAGE
    assert "cannot read /none" in capsys.readouterr().err
