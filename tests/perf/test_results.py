"""The result format: what is written is read again, and what is not a result is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.errors import BenchUsageError
from perf.results import Sample, machine, number_text, read, revision, series
from tests.perf.conftest import MakeSamples

texts = st.text(max_size=20)
numbers = st.one_of(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
any_sample = st.builds(
    Sample,
    benchmark=texts,
    metric=texts,
    value=numbers,
    unit=texts,
    better=st.sampled_from(["higher", "lower", "neither"]),
    dimensions=st.dictionaries(texts, st.one_of(texts, numbers), max_size=4),
    machine=texts,
    revision=texts,
)


@given(any_sample)
def test_a_line_gives_the_sample_back(sample: Sample) -> None:
    line = sample.to_line()
    assert "\n" not in line
    assert Sample.from_line(line) == sample


@given(st.text())
def test_arbitrary_lines_are_refused_with_a_reason(line: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        Sample.from_line(line)


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": "1"},
        {"value": float("nan")},
        {"value": True},
        {"better": "larger"},
        {"dimensions": {"x": [1]}},
        {"dimensions": []},
        {"unit": None},
        {"more": 1},
    ],
)
def test_a_field_of_another_type_is_refused(samples: MakeSamples, wrong: dict[str, object]) -> None:
    line = json.dumps({**json.loads(samples(1.0)[0].to_line()), **wrong})
    with pytest.raises(ValueError, match=r"\S"):
        Sample.from_line(line)


def test_a_file_names_its_bad_line(
    samples: MakeSamples, write: Callable[[str, list[Sample]], Path], tmp_path: Path
) -> None:
    path = write("good", samples(1.0, 2.0))
    assert [each.value for each in read(path)] == [1.0, 2.0]
    path.write_text(path.read_text() + "no\n")
    with pytest.raises(BenchUsageError, match=r"good:3 is no result"):
        read(path)
    with pytest.raises(BenchUsageError, match="holds no results"):
        read(write("empty", []))
    with pytest.raises(BenchUsageError, match="cannot read"):
        read(tmp_path / "none")


def test_series_are_told_apart_by_metric_and_dimensions(samples: MakeSamples) -> None:
    found = series(
        [*samples(1, x=1), *samples(2, x=2), *samples(3, x=1), *samples(4, x=1, metric="cpu")]
    )
    assert [[each.value for each in several] for several in found.values()] == [[1, 3], [2], [4]]


def test_where_and_what_was_measured_is_known() -> None:
    assert "cores" in machine()
    assert revision()


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (1234.6, "1,235"), (0, "0"), (65.5, "65.5")]
)
def test_numbers_are_written_as_a_person_would(value: float, text: str) -> None:
    assert number_text(value) == text
