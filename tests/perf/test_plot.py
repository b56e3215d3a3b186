"""Plots are PNG files that show what was recorded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ferry.cli import main
from ferry.errors import Exit
from perf import plot
from perf.results import Sample
from tests.perf.conftest import MakeSamples

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = ("zero", "same", "delta", "copy", "lz4", "raw")


def recorded_events() -> list[dict[str, object]]:
    """Two rounds, of which the last one's remainder is not known, and a report."""
    both = {"role": "send", "predicted_downtime_ms": None, "vmm_remaining_bytes": None}
    rounds: list[dict[str, object]] = [
        {
            **both,
            "event": "round",
            "time": 100.5 + number,
            "duration_ms": 300.0,
            "throughput_bytes_per_s": 5e6,
            "remaining_pages": remaining,
            "dirty_pages_per_s": rate,
            **dict.fromkeys(KINDS, 10),
        }
        for number, (remaining, rate) in enumerate([(20, 40.0), (None, None)])
    ]
    phases: list[dict[str, object]] = [
        {"event": "phase", "time": 100.0 + at, "role": role, "phase": phase}
        for at, role, phase in [(0, "send", "preparing"), (1, "receive", "x"), (1.6, "send", "y")]
    ]
    report: dict[str, object] = {
        "event": "report",
        "time": 102.0,
        "role": "demo",
        "downtime_ms": {"pause": 3.0},
    }
    return [*phases, *rounds, report]


def write_events(path: Path, events: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(path)


@pytest.mark.parametrize("with_report", [True, False])
def test_a_timeline(tmp_path: Path, with_report: bool) -> None:
    events = recorded_events()[: None if with_report else -1]
    file, out = write_events(tmp_path / "events", events), tmp_path / "out.png"
    assert main(["bench", "plot", file, "--out", str(out)]) == Exit.OK
    assert out.read_bytes().startswith(PNG)


def test_only_the_senders_events_are_drawn(tmp_path: Path) -> None:
    file = Path(write_events(tmp_path / "events", recorded_events()))
    kinds = [(event["role"], event["event"]) for event in plot.read_events(file)]
    assert kinds == [("send", "phase")] * 2 + [("send", "round")] * 2 + [("demo", "report")]


def test_a_sweep(
    samples: MakeSamples,
    write: Callable[[str, list[Sample]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    made = plot._figure

    def keep(*arguments: Any) -> Any:
        drawn.append(made(*arguments))
        return drawn[-1]

    monkeypatch.setattr(plot, "_figure", keep)
    file = write(
        "results",
        [
            *samples(1.0, 2.0, 3.0, lanes=1, case="zero"),
            *samples(5.0, lanes=2, case="zero"),
            *samples(7.0, lanes=1, case="text"),
            *samples(9.0, lanes=1, metric="other"),
        ],
    )
    out = tmp_path / "out.png"
    arguments = ["bench", "plot", str(file), "--out", str(out), "--metric", "rate"]
    assert main([*arguments, "--over", "lanes"]) == Exit.OK
    assert out.read_bytes().startswith(PNG)
    [(_, [axes])] = drawn
    lines = {text.get_text() for text in axes.get_legend().get_texts()}
    assert lines == {"case=zero", "case=text"}
    assert [list(c.lines[0].get_xydata().ravel()) for c in axes.containers] == [
        [1, 7],
        [1, 2, 2, 5],
    ]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "needs --metric and --over"),
        (["--metric", "rate", "--over", "none"], "these metrics have it: none"),
        (["--metric", "none", "--over", "lanes"], "these metrics have it: rate"),
    ],
)
def test_a_sweep_of_nothing(
    samples: MakeSamples,
    write: Callable[[str, list[Sample]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    says: str,
) -> None:
    file = write("results", samples(1.0, lanes=1))
    code = main(["bench", "plot", str(file), "--out", str(tmp_path / "x.png"), *more])
    assert code == Exit.USAGE
    assert says in capsys.readouterr().err


def test_files_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.png")
    no_rounds = write_events(tmp_path / "events", recorded_events()[:1])
    for file, says in [
        (no_rounds, "no round of a migration"),
        (str(tmp_path / "none"), "neither events nor results"),
    ]:
        assert main(["bench", "plot", file, "--out", out]) == Exit.USAGE
        assert says in capsys.readouterr().err
