"""The client's half of QMP without a socket: bytes in, messages out; commands in, bytes out.

Source: QEMU's docs/interop/qmp-spec.rst. The VMM is not trusted: a line is bounded, and whatever
is not the message that the state allows ends the connection with `QmpProtocolError`.

    state        server's message            client's command
    GREETING     greeting -> NEGOTIATING     none
    NEGOTIATING  reply to it -> READY        qmp_capabilities
    READY        reply, error                all
    BROKEN       none                        none

Events come at any time, in front of the greeting, too: QEMU sends one that happens between the
client's connection and its own notice of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import Any

from sync.vmm.errors import QmpProtocolError

MAX_LINE_BYTES = 1 << 20
"""Far above the longest reply that a migration needs (`query-migrate`: a few KiB)."""
MAX_IN_FLIGHT = 64

JsonObject = dict[str, Any]


class QmpState(Enum):
    GREETING = auto()
    NEGOTIATING = auto()
    READY = auto()
    BROKEN = auto()


@dataclass(frozen=True, slots=True)
class QmpGreeting:
    version: JsonObject


@dataclass(frozen=True, slots=True)
class QmpReply:
    request_id: int
    result: Any


@dataclass(frozen=True, slots=True)
class QmpFailure:
    request_id: int
    error_class: str
    description: str


@dataclass(frozen=True, slots=True)
class QmpEvent:
    name: str
    data: JsonObject
    timestamp: float
    """Seconds since the epoch by the VMM's clock; 0 when the VMM could not tell."""


QmpMessage = QmpGreeting | QmpReply | QmpFailure | QmpEvent


class LineSplitter:
    """Cuts a byte stream into JSON objects, one in each line. Used by both ends of QMP."""

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_line_bytes = max_line_bytes
        self._buffer = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_object(self) -> JsonObject | None:
        """The next object, or None if more bytes are needed. Raises `QmpProtocolError`."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._buffer)
            if (end if end >= 0 else len(self._buffer)) > self._max_line_bytes:
                raise QmpProtocolError(f"a line is longer than {self._max_line_bytes} bytes")
            if end < 0:
                return None
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._searched = 0
            if line:
                return _parse_object(line)


class QmpCore:
    """One QMP connection. After a `QmpProtocolError` it stays broken."""

    def __init__(self) -> None:
        self.state = QmpState.GREETING
        self._lines = LineSplitter()
        self._ids = count(1)
        self._in_flight: dict[int, str] = {}

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """The bytes of a command, and the id that its reply will bear."""
        if name == "qmp_capabilities":
            allowed = QmpState.NEGOTIATING
        else:
            allowed = QmpState.READY
        if self.state is not allowed:
            raise QmpProtocolError(f"{name} cannot be sent in state {self.state.name}")
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise QmpProtocolError(f"{MAX_IN_FLIGHT} commands are waiting for a reply already")
        request_id = next(self._ids)
        self._in_flight[request_id] = name
        message: JsonObject = {"execute": name, "id": request_id}
        if arguments:
            message["arguments"] = dict(arguments)
        return request_id, json.dumps(message).encode() + b"\n"

    def feed(self, data: bytes) -> None:
        """Takes what the socket gave. `next_message` tells what it meant."""
        self._lines.feed(data)

    def next_message(self) -> QmpMessage | None:
        """The next message, or None if more bytes are needed. Raises `QmpProtocolError`."""
        if self.state is QmpState.BROKEN:
            raise QmpProtocolError("the connection broke the protocol before")
        try:
            message = self._lines.next_object()
            return None if message is None else self._interpret(message)
        except QmpProtocolError:
            self.state = QmpState.BROKEN
            raise

    def _interpret(self, message: JsonObject) -> QmpMessage:
        if "event" in message:
            return _event(message)
        if self.state is QmpState.GREETING:
            greeting = message.get("QMP")
            if not isinstance(greeting, dict) or not isinstance(greeting.get("version"), dict):
                raise QmpProtocolError("the first message is no greeting")
            self.state = QmpState.NEGOTIATING
            return QmpGreeting(greeting["version"])
        if "return" in message or "error" in message:
            return self._reply(message)
        raise QmpProtocolError(f"no greeting, event, return or error: {sorted(message)[:8]}")

    def _reply(self, message: JsonObject) -> QmpReply | QmpFailure:
        request_id = message.get("id")
        if type(request_id) is not int or request_id not in self._in_flight:
            raise QmpProtocolError("a reply to a command that was not sent")
        name = self._in_flight.pop(request_id)
        if "return" in message:
            if name == "qmp_capabilities":
                self.state = QmpState.READY
            return QmpReply(request_id, message["return"])
        error = message["error"]
        if not isinstance(error, dict):
            raise QmpProtocolError("an error without a reason")
        return QmpFailure(
            request_id, str(error.get("class", "GenericError")), str(error.get("desc", ""))
        )


def _event(message: JsonObject) -> QmpEvent:
    name, data, timestamp = message["event"], message.get("data", {}), message.get("timestamp")
    if not isinstance(name, str) or not isinstance(data, dict) or not isinstance(timestamp, dict):
        raise QmpProtocolError("a malformed event")
    seconds, microseconds = timestamp.get("seconds"), timestamp.get("microseconds")
    if type(seconds) is not int or type(microseconds) is not int:
        raise QmpProtocolError("an event with a malformed timestamp")
    if not (-1 <= seconds < 1 << 48 and -1 <= microseconds < 1_000_000):
        raise QmpProtocolError("an event with an impossible timestamp")
    known = seconds >= 0 and microseconds >= 0
    return QmpEvent(name, data, seconds + microseconds / 1e6 if known else 0.0)


def _parse_object(line: bytes) -> JsonObject:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QmpProtocolError(f"a line is no JSON: {line[:60]!r}") from error
    if not isinstance(parsed, dict):
        raise QmpProtocolError(f"a line is no JSON object: {line[:60]!r}")
    return parsed
