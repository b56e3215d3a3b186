"""The page of a migration: all of it in one file, and nothing of it that a file made up."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ferry.cli import main
from ferry.errors import Exit
from ferry.html_report import page, read_events

ROUND = {
    **dict.fromkeys(("dirty_pages", "sent_pages", "zero", "same", "delta", "copy", "lz4"), 3),
    "raw": 1,
    "wire_bytes": 4096,
    "duration_ms": 1.0,
    "throughput_bytes_per_s": 4e6,
    "remaining_pages": None,
    "dirty_pages_per_s": None,
    "predicted_downtime_ms": None,
}
EVENTS: list[dict[str, Any]] = [
    {"event": "phase", "phase": "preparing"},
    {"event": "round", "round": 1, **ROUND},
    {"event": "round", "round": 2, **ROUND, "remaining_pages": 7, "dirty_pages_per_s": 70.0},
    {"event": "phase", "phase": "pausing"},
    {
        "event": "report",
        "session": "5e55",
        "methods": [{"registers": "v2", "dirty": "<b>logging"}],
        "registers": [{"compared": 12, "divergences": {}}],
        "downtime_ms": {"vmm_stop": 1.0, "verify": 30.0},
        "downtime_total_ms": 31.0,
        "downtime_vmm_ms": 1.0,
        "downtime_limit_ms": 20,
        "wire_bytes": {"pages": 9000},
        "duration_s": 3.5,
    },
    {"event": "success", "text": "The guest runs on h.", "downtime_over_limit": True},
]


def lines(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "send", "time": 1e9 + n, **each} for n, each in enumerate(events)]


class Balanced(HTMLParser):
    """Fails of tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_all_and_needs_nothing_else() -> None:
    text = page(lines(EVENTS))
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert not parser.attributes & {"src", "href", "onload"}
    assert "http" not in text and "<script" not in text
    for part in ("Migration 5e55", "The guest runs on h.", "limit 20 ms", "vmm stop", "31.0 ms"):
        assert part in text
    assert len(re.findall("<svg", text)) == 3
    assert "<b>logging" not in text and "&lt;b&gt;logging" in text


def test_a_migration_that_failed_has_a_page_too() -> None:
    events = [*EVENTS[:2], {"event": "error", "message": "no <link>"}]
    text = page(lines(events))
    assert "A migration that did not succeed" in text
    assert "no &lt;link&gt;" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in lines(EVENTS)))
    assert main(["report", str(file)]) == Exit.OK
    assert capsys.readouterr().out.strip() == str(tmp_path / "events.html")
    assert (tmp_path / "events.html").read_text() == page(lines(EVENTS))


@pytest.mark.parametrize("content", ["", "x", '{"event": "phase"}', "[]"])
def test_what_has_no_migration_in_it(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_text(content)
    assert main(["report", str(tmp_path / "f")]) == Exit.USAGE
    assert main(["report", str(tmp_path / "none")]) == Exit.USAGE
    assert main(["report"]) == Exit.USAGE
    assert "FILE is missing" in capsys.readouterr().err


def test_the_last_migration_of_a_file_counts_and_its_last_line_may_be_cut(tmp_path: Path) -> None:
    failed = json.dumps({"role": "send", "time": 1.0, "event": "error", "message": "no link"})
    written = [failed, *map(json.dumps, lines(EVENTS))]
    path = tmp_path / "send.jsonl"
    path.write_text("\n".join(written) + '\n{"event": "mess')
    events = read_events(str(path))
    assert [each["event"] for each in events] == [each["event"] for each in EVENTS]


@pytest.mark.parametrize("wrong", [{"event": "phase"}, {"event": "phase", "time": "x"}])
def test_events_of_another_form_are_refused_in_words(
    tmp_path: Path, wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "send.jsonl"
    path.write_text(json.dumps({"role": "send", **wrong}) + "\n")
    assert main(["report", str(path)]) == Exit.USAGE
    assert "events of another form" in capsys.readouterr().err
