"""What every process of these tests prints is held against the schema of events."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.testbed import Process

SCHEMA = Path(__file__).parents[2] / "docs" / "events.schema.json"


@pytest.fixture(autouse=True)
def events_fit_the_schema(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    started: list[Process] = []
    start = Process.__init__

    def note(self: Process, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        started.append(self)

    monkeypatch.setattr(Process, "__init__", note)
    yield
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    for process in started:
        words = process.name.split()[0]
        if words in ("send", "receive", "resolve", "gateway", "status", "replace", "doctor"):
            for event in process.events:
                if event["event"] != "text":
                    validator.validate(event)
