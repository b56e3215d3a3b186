"""The table of requests against what it has to say, written down once more; and both ends of it.

What a field may hold and who may ask for what stands here in other words, so that a bound or a
right that is lost from the table is missed.
"""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.gateway.control import requests
from sync.gateway.control.requests import REQUESTS, VERSION, Request
from sync.gateway.control.server import ControlServer
from sync.gateway.control.shapes import ShapeError, pack, unpack
from sync.gateway.control.wire import ControlDecoder, ControlMessage, encode
from sync.gateway.engine.core import Core, Limits
from sync.gateway.engine.custody import ClientRole, CustodyState
from sync.gateway.engine.records import Terms
from sync.vfio_user.protocol import MigrationState

SOURCE, TARGET, BOTH = "source", "target", "source target"
ANYWHERE = "passthrough mediated stopped released standby"
AT_DEVICE = "mediated stopped standby"

RULES = {
    "hello": ("", ANYWHERE),
    "upgrade": ("", ANYWHERE),
    "status": ("observer source target", ANYWHERE),
    "memory": ("observer source target", ANYWHERE),
    "arm_recovery": (SOURCE, ANYWHERE),
    "disarm_recovery": (SOURCE, ANYWHERE),
    "mediate": (SOURCE, "passthrough"),
    "dirty": (SOURCE, "mediated stopped"),
    "journal": (SOURCE, "mediated stopped"),
    "recapture": (SOURCE, "mediated"),
    "batch": (BOTH, "passthrough released " + AT_DEVICE),
    "stop": (SOURCE, "mediated"),
    "mig_state": (BOTH, AT_DEVICE),
    "mig_size": (BOTH, "passthrough released " + AT_DEVICE),
    "mig_read": (BOTH, AT_DEVICE),
    "mig_write": (BOTH, AT_DEVICE),
    "reset_device": (BOTH, "stopped standby"),
    "passthrough": (SOURCE, "passthrough mediated stopped"),
    "release": (SOURCE, "stopped released"),
    "reclaim": (SOURCE, "released"),
    "vouch": (SOURCE, "released"),
    "moved": (SOURCE, ANYWHERE),
    "verdict": ("observer source target", ANYWHERE),
    "prepare_device": (SOURCE, "passthrough"),
    "switch_device": (SOURCE, "passthrough"),
    "standby": (TARGET, "passthrough released"),
    "own": (TARGET, "standby"),
    "start": (TARGET, "standby"),
    "running": (TARGET, ANYWHERE),
    "fence": (TARGET, ANYWHERE),
    "abandon": (TARGET, "passthrough standby"),
}
"""Roles, states."""
AT_ONCE = {"status", "memory", "verdict", "fence"}
AFTER_LOSS = {
    *("passthrough", "arm_recovery", "disarm_recovery"),
    *("moved", "running"),
}
TAKES = {"dirty", "journal", "recapture", "mig_read"}

NO_NUMBERS: list[Any] = [None, "1", True, 1.0, [], {}]
NO_TEXTS: list[Any] = [None, 1, True, [], {}, "a\0b"]
NO_SESSIONS = [*NO_TEXTS, "", "a b", "x" * 65, "a\n", "\u00e9"]
PROOFS = st.text(st.characters(exclude_characters="\0"), max_size=256)
TERMS = st.builds(Terms, st.booleans(), st.text(max_size=9), st.text(max_size=9))
NO_TERMS: list[Any] = [
    None,
    1,
    [],
    {"decides": 1},
    {"fenced": 1},
    {"committed": None},
    {"more": ""},
]
SESSIONS = st.from_regex(r"[0-9A-Za-z_-]{1,64}", fullmatch=True)

FIELDS: dict[tuple[str, str], tuple[st.SearchStrategy[Any], list[Any]]] = {
    ("hello", "version"): (st.just(VERSION), [*NO_NUMBERS, VERSION - 1, VERSION + 1]),
    ("hello", "role"): (st.sampled_from(ClientRole), [None, "", "owner", 1, []]),
    ("hello", "session"): (SESSIONS | st.just(""), [*NO_TEXTS, "a b", "x" * 65, "a\n"]),
    ("memory", "start"): (st.integers(0, 1 << 32), [*NO_NUMBERS, -1, (1 << 32) + 1]),
    ("memory", "generation"): (st.none() | st.integers(), ["1", True, 1.0, []]),
    ("arm_recovery", "qmp_path"): (
        st.text(st.characters(exclude_characters="\0"), max_size=4096),
        [*NO_TEXTS, "x" * 4097],
    ),
    ("arm_recovery", "deadline_s"): (
        st.floats(0.01, 600) | st.integers(1, 600),
        [None, "1", True, [], 0, 0.009, 600.1, 601, 1 << 70, math.nan, math.inf],
    ),
    ("arm_recovery", "silence_s"): (
        st.floats(0.01, 600) | st.integers(1, 600),
        [None, "1", True, [], 0, 0.009, 600.1, 601, 1 << 70, math.nan, math.inf],
    ),
    ("arm_recovery", "may_end_holder"): (st.booleans(), [None, 0, 1, "true", []]),
    ("arm_recovery", "put_back"): (
        st.text(st.characters(exclude_characters="\0"), max_size=4096),
        [*NO_TEXTS, "x" * 4097],
    ),
    ("arm_recovery", "companions"): (
        st.lists(st.text(max_size=9), max_size=3).map(tuple),
        [None, "a", 1, [1], ["a"] * 65],
    ),
    ("prepare_device", "path"): (
        st.text(st.characters(exclude_characters="\0"), max_size=4096),
        [*NO_TEXTS, "x" * 4097],
    ),
    ("mediate", "terms"): (TERMS, NO_TERMS),
    ("mediate", "tracker"): (
        st.sampled_from(["logging", "message", "none"]),
        [None, 1, "", "magic", []],
    ),
    ("mediate", "page_size"): (
        st.integers(0, 30).map(lambda power: 1 << power),
        [*NO_NUMBERS, 0, -1, 3, 4095, 1 << 31],
    ),
    ("arm_recovery", "ran"): (st.booleans(), [None, 0, 1, "true", []]),
    ("mediate", "capture"): (st.booleans(), [None, 0, 1, "true", []]),
    ("journal", "max_records"): (st.integers(0, 131072), [*NO_NUMBERS, -1, 131073]),
    ("stop", "fence"): (st.booleans(), [None, 0, 1, "true", []]),
    ("mig_state", "state"): (
        st.sampled_from(MigrationState),
        [*NO_NUMBERS, -1, 5, 7, 8, "RUNNING"],
    ),
    ("mig_read", "max_bytes"): (st.integers(1, 4 << 20), [*NO_NUMBERS, 0, (4 << 20) + 1]),
    ("release", "session"): (SESSIONS, NO_SESSIONS),
    ("reclaim", "session"): (SESSIONS, NO_SESSIONS),
    ("reclaim", "proof"): (PROOFS, [*NO_TEXTS, "x" * 257]),
    ("vouch", "session"): (SESSIONS, NO_SESSIONS),
    ("moved", "session"): (SESSIONS, NO_SESSIONS),
    ("moved", "proof"): (PROOFS, [*NO_TEXTS, "x" * 257]),
    ("verdict", "session"): (SESSIONS | st.just(""), [*NO_TEXTS, "a b", "x" * 65, "a\n"]),
    ("standby", "session"): (SESSIONS, NO_SESSIONS),
    ("standby", "terms"): (TERMS, NO_TERMS),
    ("running", "session"): (SESSIONS, NO_SESSIONS),
    ("own", "session"): (SESSIONS, NO_SESSIONS),
    ("own", "ran"): (st.booleans(), [None, 0, 1, "true", []]),
    ("fence", "session"): (SESSIONS, NO_SESSIONS),
}
"""What a field of the JSON object may be, and what it may not."""
BLOBS = {
    "mediate": "snapshot",
    "recapture": "snapshot",
    "batch": "records",
    "stop": "resume",
    "mig_write": "data",
    "own": "records",
    "start": "records",
}
OPTIONAL = {
    *(("hello", "session"), ("memory", "generation"), ("verdict", "session")),
    *(("mediate", "terms"), ("standby", "terms"), ("arm_recovery", "companions")),
    ("arm_recovery", "put_back"),
    ("arm_recovery", "silence_s"),
    ("arm_recovery", "may_end_holder"),
    *(("reclaim", "proof"), ("moved", "proof")),
}


def fields_of(op: str) -> list[str]:
    return [field for each, field in FIELDS if each == op]


@st.composite
def any_request(draw: Any) -> Request[Any]:
    op = draw(st.sampled_from(sorted(REQUESTS)))
    values = {field: draw(FIELDS[op, field][0]) for field in fields_of(op)}
    if op in BLOBS:
        values[BLOBS[op]] = draw(st.binary(max_size=100))
    return REQUESTS[op](**values)


class Caller:
    """A client with every right; the answers are kept."""

    def __init__(self) -> None:
        self.role: ClientRole | None = None
        self.session = ""
        self.busy = False
        self.closed = False
        self.replies: list[dict[str, Any]] = []

    def reply(self, fields: dict[str, Any], blob: bytes, descriptors: Any) -> None:
        self.replies.append(fields)


class Server(ControlServer):
    """It only notes what would be executed, and asks nobody for rights."""

    def __init__(self) -> None:
        super().__init__(Core(Limits(), lambda: 0.0, lambda *_, **__: None, lambda *_: None))
        self.executed: list[Request[Any]] = []
        self._handlers = dict.fromkeys(
            self._handlers, lambda _, request: self.executed.append(request)
        )

    def _check(self, client: Any, request: Request[Any]) -> None:
        pass


def crossed(message: ControlMessage) -> ControlMessage:
    """The message as the other end gets it."""
    decoder = ControlDecoder(0)
    decoder.feed(encode(message.fields, message.blob), [])
    received = decoder.next_message()
    assert received is not None
    return received


def test_the_table_says_who_may_ask_for_what_and_when() -> None:
    words = {op: (set(request.roles), set(request.states)) for op, request in REQUESTS.items()}
    assert words == {op: (set(r.split()), set(s.split())) for op, (r, s) in RULES.items()}
    assert {op for op, request in REQUESTS.items() if request.at_once} == AT_ONCE
    assert {op for op, request in REQUESTS.items() if request.after_loss} == AFTER_LOSS
    assert {op for op, request in REQUESTS.items() if request.takes} == TAKES
    assert all(op == request.op for op, request in REQUESTS.items())


def test_every_field_of_every_request_is_bounded_here() -> None:
    fields = {
        (op, field.name)
        for op, request in REQUESTS.items()
        for field in dataclasses.fields(request)  # type: ignore[arg-type]
    }
    assert fields == set(FIELDS) | set(BLOBS.items())


def test_every_request_is_executed_by_somebody() -> None:
    core = Core(Limits(), lambda: 0.0, lambda *_, **__: None, lambda *_: None)
    assert set(ControlServer(core)._handlers) == set(REQUESTS.values())


@given(any_request())
@settings(deadline=None, max_examples=300)
def test_the_server_executes_what_the_client_asked_for(request: Request[Any]) -> None:
    server = Server()
    server.handle(Caller(), crossed(pack(request, op=request.op)))
    assert server.executed == [request]


@given(any_request(), st.data())
@settings(deadline=None, max_examples=500)
def test_i9_a_request_that_is_not_as_it_should_be_is_refused_and_not_executed(
    request: Request[Any], data: st.DataObject
) -> None:
    """One field out of its bounds, missing or unknown, or a blob where none belongs."""
    message = crossed(pack(request, op=request.op))
    op = request.op
    wrongs = ["unknown"]
    wrongs += ["value", "missing"] if fields_of(op) else []
    wrongs += [] if op in BLOBS else ["blob"]
    wrong = data.draw(st.sampled_from(wrongs))
    if wrong == "unknown":
        message.fields["surprise"] = 1
    elif wrong == "blob":
        message = message._replace(blob=b"x")
    else:
        field = data.draw(st.sampled_from(fields_of(op)))
        del message.fields[field]
        if wrong == "value" or (op, field) in OPTIONAL:
            message.fields[field] = data.draw(st.sampled_from(FIELDS[op, field][1]))
    server, caller = Server(), Caller()
    server.handle(caller, crossed(message))
    assert server.executed == []
    (reply,) = caller.replies
    assert reply["error"] in ("bad-request", "version")


@pytest.mark.parametrize(("op", "field"), sorted(FIELDS))
def test_i9_no_value_outside_of_its_bounds_is_let_through(op: str, field: str) -> None:
    for value in FIELDS[op, field][1]:
        fields = {each: good(op, each) for each in fields_of(op)} | {field: value}
        server, caller = Server(), Caller()
        server.handle(caller, ControlMessage({"op": op, **fields}, b"", []))
        assert server.executed == [], value
        assert caller.replies[0]["error"] in ("bad-request", "version")


def good(op: str, field: str) -> Any:
    values = {
        "version": VERSION,
        "role": "source",
        "generation": None,
        "qmp_path": "/q",
        "path": "/d",
        "put_back": "",
        "silence_s": 1,
        "may_end_holder": False,
        "deadline_s": 1,
        "ran": True,
        "tracker": "none",
        "page_size": 4096,
        "capture": True,
        "fence": True,
        "session": "s",
        "companions": ["/c"],
        "proof": "",
        "terms": {"decides": False},
    }
    return values.get(field, 1)


@pytest.mark.parametrize("op", sorted(REQUESTS))
def test_a_client_without_the_role_is_refused(op: str) -> None:
    core = Core(Limits(), lambda: 0.0, lambda *_, **__: None, lambda *_: None)
    server = ControlServer(core)
    fields = {each: good(op, each) for each in fields_of(op)}
    message = crossed(ControlMessage({"op": op, **fields}, b"", []))
    for role in [None, *ClientRole]:
        if op in ("hello", "upgrade") or (role and role in RULES[op][0].split()):
            continue
        caller = Caller()
        caller.role = role
        server.handle(caller, message)
        assert caller.replies[0]["error"] == "lease-required"
        assert core.custody.state is CustodyState.PASSTHROUGH


def test_two_ends_of_different_versions_part_at_once() -> None:
    server, caller = Server(), Caller()
    message = {"op": "hello", "version": VERSION + 1, "role": "owner", "new": 1}
    server.handle(caller, ControlMessage(message, b"", []))
    assert caller.replies[0]["error"] == "version"
    assert server.executed == []


@pytest.mark.parametrize(
    ("reply", "fields"),
    [
        (requests.MemoryPart, {"regions": [[0, 1, 2]], "generation": 1, "total": 1}),
        (requests.MemoryPart, {"regions": [[0, 1, 2, 3]], "generation": 1, "total": 1}),
        (requests.MemoryPart, {"regions": {}, "generation": 1, "total": 1}),
        (requests.DirtyHalf, {"half": 0, "layout_generation": 1}),
        (requests.DirtyHalf, {"half": 0, "layout_generation": 1, "complete": 1}),
        (requests.StateSize, {"bytes": "5"}),
        (requests.Status.reply(), {"state": "passthrough"}),
        (requests.Done, {"surprise": 1}),
    ],
)
def test_a_reply_of_another_shape_is_refused(reply: type, fields: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        unpack(reply, ControlMessage(fields, b"", []))
