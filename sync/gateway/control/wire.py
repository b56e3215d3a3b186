"""The control protocol's wire format and its limits, without a socket.

Owned here: how one message looks, how a stream of bytes becomes messages, and how a field of a
request is checked. Not owned: what the requests mean (`jobs`, `server`), and who may ask (`lease`).

     0           4           8              8+J             8+J+B
    +-----------+-----------+--------------+---------------+
    | J u32     | B u32     | JSON object  | blob          |
    +-----------+-----------+--------------+---------------+

Little-endian; descriptors travel by SCM_RIGHTS with the message's first byte. A request is
`{"op": name, ...}`; its reply is `{"ok": true, ...}` or `{"ok": false, "error": code,
"message": text}`. Replies come in the order of the requests.
"""

import json
import os
import re
import struct
from collections import deque
from typing import Any, NamedTuple

from sync.gateway.errors import BadRequest, ControlProtocolError

HEADER = struct.Struct("<II")
MAX_JSON_BYTES = 64 << 10
"""A status with every region and interrupt of a device takes a few kilobytes."""
MAX_BLOB_BYTES = 4 << 20
"""131072 register operations, or four reads of migration data at the usual transfer size."""
MAX_DESCRIPTORS = 64
"""In one message; the kernel's limit is 253. A longer memory map is handed out in parts."""
SESSION_PATTERN = re.compile(r"[0-9A-Za-z_-]{1,64}")

Fields = dict[str, Any]


class ControlMessage(NamedTuple):
    """One message. Whoever takes it owns its descriptors."""

    fields: Fields
    blob: bytes
    descriptors: list[int]


def encode(fields: Fields, blob: bytes = b"") -> bytes:
    """One message as bytes. Raises `ControlProtocolError` when it is over the limits."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES or len(blob) > MAX_BLOB_BYTES:
        raise ControlProtocolError(
            f"a message of {len(text)} bytes of JSON and a blob of {len(blob)} bytes is too large"
        )
    return HEADER.pack(len(text), len(blob)) + text + blob


class ControlDecoder:
    """Turns chunks of a control stream into messages.

    Descriptors that come with a chunk belong to the last message that begins in it (the kernel
    ends a chunk behind the bytes that they were sent with). Unclaimed ones are closed by `close`.
    """

    def __init__(self, max_descriptors: int) -> None:
        self._max_descriptors = max_descriptors
        self._buffer = bytearray()
        self._ready: deque[ControlMessage] = deque()
        self._descriptors: list[int] = []

    def feed(self, data: bytes, descriptors: list[int]) -> None:
        """Takes a chunk. Raises `ControlProtocolError`; the stream is then of no further use."""
        self._descriptors += descriptors
        if len(self._descriptors) > self._max_descriptors:
            raise ControlProtocolError(
                f"{len(self._descriptors)} descriptors came, {self._max_descriptors} are allowed"
            )
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            json_bytes, blob_bytes = HEADER.unpack_from(self._buffer)
            if json_bytes > MAX_JSON_BYTES or blob_bytes > MAX_BLOB_BYTES:
                raise ControlProtocolError(
                    f"a message announces {json_bytes} bytes of JSON and a blob of {blob_bytes}"
                )
            end = HEADER.size + json_bytes + blob_bytes
            if len(self._buffer) < end:
                return
            blob_start = HEADER.size + json_bytes
            fields = _parse(bytes(self._buffer[HEADER.size : blob_start]))
            blob = bytes(self._buffer[blob_start:end])
            del self._buffer[:end]
            mine: list[int] = []
            if not self._buffer:
                mine, self._descriptors = self._descriptors, mine
            self._ready.append(ControlMessage(fields, blob, mine))

    def next_message(self) -> ControlMessage | None:
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """Closes every descriptor that nobody took."""
        for message in self._ready:
            self._descriptors += message.descriptors
        self._ready.clear()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _parse(text: bytes) -> Fields:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ControlProtocolError("a message's JSON does not parse") from error
    if not isinstance(fields, dict):
        raise ControlProtocolError("a message's JSON is no object")
    return fields


def integer(fields: Fields, name: str, low: int, high: int) -> int:
    """The field `name` as an integer in `low..high`. Raises `BadRequest`."""
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{name!r} has to be a whole number from {low} to {high}")
    return value


def number(fields: Fields, name: str, low: float, high: float) -> float:
    """The field `name` as a number in `low..high`. Raises `BadRequest`."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name!r} has to be a number from {low} to {high}")
    return float(value)


def boolean(fields: Fields, name: str) -> bool:
    """The field `name` as a truth value. Raises `BadRequest`."""
    value = fields.get(name)
    if type(value) is not bool:
        raise BadRequest(f"{name!r} has to be true or false")
    return value


def text(fields: Fields, name: str, max_characters: int) -> str:
    """The field `name` as text. Raises `BadRequest`."""
    value = fields.get(name)
    if type(value) is not str or len(value) > max_characters or "\0" in value:
        raise BadRequest(f"{name!r} has to be text of at most {max_characters} characters")
    return value


def session(fields: Fields) -> str:
    """The field `session`: 1 to 64 letters, digits, `-` and `_`. Raises `BadRequest`."""
    value = fields.get("session")
    if type(value) is not str or SESSION_PATTERN.fullmatch(value) is None:
        raise BadRequest("'session' has to be 1 to 64 letters, digits, '-' and '_'")
    return value
