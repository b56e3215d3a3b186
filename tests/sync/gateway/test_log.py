"""What a person reads of a gateway: events with what they mean. Programs get the bare names."""

import json
import os

import pytest

from sync.gateway.log import MEANING, Log


def line_of(event: str, *, as_json: bool) -> str:
    ours, theirs = os.pipe()
    Log(theirs, as_json=as_json)(event, state="passthrough")
    os.close(theirs)
    with os.fdopen(ours) as lines:
        return lines.read().strip()


@pytest.mark.parametrize("event", ["lease-lost", "listening"])
def test_an_event_is_explained_to_people_alone(event: str) -> None:
    assert json.loads(line_of(event, as_json=True))["event"] == event
    meaning = f" ({MEANING[event]})" if event in MEANING else ""
    assert line_of(event, as_json=False) == f'gateway: {event}{meaning} state="passthrough"'
