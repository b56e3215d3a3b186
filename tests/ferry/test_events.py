"""The schema of events: what it takes and what not, and that the documents and it agree."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from ferry.progress import Reporter
from sync.gateway.log import MEANING, SCHEMA

DOCS = Path(__file__).parents[2] / "docs"
jsonschema = pytest.importorskip("jsonschema")


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "events.schema.json").read_text())
    return found


def printed(name: str, **values: Any) -> dict[str, Any]:
    stream = StringIO()
    Reporter("send", as_json=True, stream=stream).event(name, **values)
    line: dict[str, Any] = json.loads(stream.getvalue())
    return line


def test_it_is_a_schema_and_of_the_version_that_is_printed() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["properties"]["schema"]["const"] == SCHEMA


def test_every_event_of_it_is_in_the_documents() -> None:
    section = (DOCS / "operations.md").read_text().partition("\n## Events\n")[2]
    commands = section.partition("| event of the gateway |")[0]
    listed = re.findall(r"^\| `([a-z-]+)` \|", commands, re.MULTILINE)
    assert set(schema()["$defs"]) - {"key", "range"} == set(listed)


def test_every_event_of_a_gateway_that_is_explained_is_in_the_documents() -> None:
    section = (DOCS / "operations.md").read_text().partition("| event of the gateway |")[2]
    assert set(MEANING) <= set(re.findall(r"`([a-z-]+)`", section))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("phase", {}),
        ("phase", {"phase": 3}),
        ("message", {"text": "x", "a key": 1}),
        ("report", {}),
        ("Not a name", {}),
    ],
)
def test_what_does_not_fit_is_refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(printed(name, **values), schema())


def test_what_fits_is_taken() -> None:
    jsonschema.validate(printed("phase", phase="precopy", detail=""), schema())
    jsonschema.validate(printed("something-new", value=1), schema())
