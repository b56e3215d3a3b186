"""The QMP core: what QEMU says is understood, whatever else comes is refused."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.vmm.errors import QmpProtocolError
from sync.vmm.qmp import (
    MAX_IN_FLIGHT,
    MAX_LINE_BYTES,
    QmpCore,
    QmpEvent,
    QmpFailure,
    QmpGreeting,
    QmpReply,
    QmpState,
)

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, '
    b'"capabilities": ["oob"]}}\r\n'
)
CONVERSATION = (
    b'{"return": {}, "id": 1}\r\n'
    b"\r\n"
    b'{"timestamp": {"seconds": 1700000000, "microseconds": 500000}, "event": "STOP"}\r\n'
    b'{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "MIGRATION", '
    b'"data": {"status": "active"}}\r\n'
    b'{"id": 3, "error": {"class": "CommandNotFound", "desc": "nope"}}\r\n'
    b'{"return": {"status": "running", "running": true}, "id": 2}\r\n'
)
EXPECTED = [
    QmpGreeting({"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}),
    QmpReply(1, {}),
    QmpEvent("STOP", {}, 1700000000.5),
    QmpEvent("MIGRATION", {"status": "active"}, 0.0),
    QmpFailure(3, "CommandNotFound", "nope"),
    QmpReply(2, {"status": "running", "running": True}),
]


def ready() -> QmpCore:
    """A core that has negotiated and has two commands under way, 2 and 3."""
    core = QmpCore()
    core.feed(GREETING)
    core.next_message()
    core.command("qmp_capabilities")
    core.feed(b'{"return": {}, "id": 1}\n')
    core.next_message()
    core.command("query-status")
    core.command("nonsense")
    return core


def converse(pieces: list[bytes]) -> list[Any]:
    core = QmpCore()
    messages: list[Any] = []
    for piece in pieces:
        core.feed(piece)
        while (message := core.next_message()) is not None:
            messages.append(message)
            if isinstance(message, QmpGreeting):
                assert core.command("qmp_capabilities")[0] == 1
            elif message == QmpReply(1, {}):
                assert core.command("query-status")[0] == 2
                assert core.command("nonsense")[0] == 3
    assert core.state is QmpState.READY
    return messages


def test_a_recorded_conversation() -> None:
    assert converse([GREETING + CONVERSATION]) == EXPECTED


def test_an_event_may_come_in_front_of_the_greeting() -> None:
    event = b'{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "RESUME"}\r\n'
    assert converse([event + GREETING + CONVERSATION]) == [QmpEvent("RESUME", {}, 1.0), *EXPECTED]


def test_byte_by_byte_is_the_same_as_whole() -> None:
    data = GREETING + CONVERSATION
    assert converse([data[at : at + 1] for at in range(len(data))]) == EXPECTED


@given(st.lists(st.integers(0, len(GREETING + CONVERSATION)), max_size=8))
def test_any_pieces_are_the_same_as_whole(cuts: list[int]) -> None:
    data = GREETING + CONVERSATION
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert converse(pieces) == EXPECTED


def test_commands_are_lines_of_json_with_an_id() -> None:
    core = ready()
    request_id, data = core.command("migrate", {"uri": "unix:/some\n/path"})
    assert data.endswith(b"\n") and data.count(b"\n") == 1
    assert json.loads(data) == {
        "execute": "migrate",
        "arguments": {"uri": "unix:/some\n/path"},
        "id": request_id,
    }


def test_commands_before_their_time_are_refused() -> None:
    core = QmpCore()
    with pytest.raises(QmpProtocolError):
        core.command("qmp_capabilities")
    core.feed(GREETING)
    core.next_message()
    with pytest.raises(QmpProtocolError):
        core.command("query-status")
    core.command("qmp_capabilities")


def test_commands_in_flight_are_bounded() -> None:
    core = ready()
    for _ in range(MAX_IN_FLIGHT - 2):
        core.command("query-status")
    with pytest.raises(QmpProtocolError):
        core.command("query-status")


HOSTILE = [
    b"hello\n",
    b"[]\n",
    b"null\n",
    b'"QMP"\n',
    b"{}\n",
    b'{"QMP": {}}\n',
    b'{"return": {}}\n',
    b'{"return": {}, "id": 99}\n',
    b'{"return": {}, "id": "2"}\n',
    b'{"return": {}, "id": 2.0}\n',
    b'{"return": {}, "id": true}\n',
    b'{"return": {}, "id": 2}\n{"return": {}, "id": 2}\n',
    b'{"error": {"class": "GenericError", "desc": "x"}}\n',
    b'{"error": "x", "id": 2}\n',
    b'{"event": 1, "timestamp": {"seconds": 1, "microseconds": 1}}\n',
    b'{"event": "STOP"}\n',
    b'{"event": "STOP", "timestamp": {"seconds": "1", "microseconds": 1}}\n',
    b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 1000000}}\n',
    b'{"event": "STOP", "timestamp": {"seconds": 1e9, "microseconds": 1}}\n',
    b'{"event": "STOP", "timestamp": {"seconds": ' + b"9" * 400 + b', "microseconds": 1}}\n',
    b'{"event": "STOP", "data": [], "timestamp": {"seconds": 1, "microseconds": 1}}\n',
    b'{"x": ' + b"9" * 9000 + b"}\n",
    b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
    b"\xff\xfe\n",
    b"{" + b" " * MAX_LINE_BYTES,
    b"\x00" * 64 + b"\n",
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_i9_a_hostile_vmm_ends_in_a_typed_error(data: bytes) -> None:
    core = ready()
    core.feed(data)
    with pytest.raises(QmpProtocolError):
        while core.next_message() is not None:
            pass
    assert core.state is QmpState.BROKEN
    core.feed(CONVERSATION)
    with pytest.raises(QmpProtocolError):
        core.next_message()
    with pytest.raises(QmpProtocolError):
        core.command("query-status")


@pytest.mark.parametrize("data", [*HOSTILE[:3], b'{"QMP": {"version": 1}}\n', CONVERSATION])
def test_i9_what_is_no_greeting_is_refused(data: bytes) -> None:
    core = QmpCore()
    core.feed(data)
    with pytest.raises(QmpProtocolError):
        core.next_message()


def test_messages_before_the_nonsense_are_not_lost() -> None:
    core = ready()
    core.feed(b'{"return": 7, "id": 2}\nnonsense\n')
    assert core.next_message() == QmpReply(2, 7)
    with pytest.raises(QmpProtocolError):
        core.next_message()


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_i9_random_bytes_end_in_a_typed_error_or_in_waiting(data: bytes) -> None:
    core = ready()
    core.feed(data)
    try:
        while core.next_message() is not None:
            pass
    except QmpProtocolError:
        assert core.state is QmpState.BROKEN
