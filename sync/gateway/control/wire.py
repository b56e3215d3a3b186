"""The control protocol's wire format and its limits, without a socket.

Owned here: how one message looks, and how a stream of bytes becomes messages. Not owned: what the
fields of a request are (`requests`, `shapes`).

     0           4           8              8+J             8+J+B
    +-----------+-----------+--------------+---------------+
    | J u32     | B u32     | JSON object  | blob          |
    +-----------+-----------+--------------+---------------+

Little-endian; descriptors travel by SCM_RIGHTS with the message's first byte. A request is
`{"op": name, ...}`; its reply is `{"ok": true, ...}` or `{"ok": false, "error": code,
"message": text}`. Replies come in the order of the requests.
"""

import dataclasses
import json
import os
import struct
from collections import deque
from typing import Any, NamedTuple

from sync.gateway.errors import ControlProtocolError

HEADER = struct.Struct("<II")
MAX_JSON_BYTES = 64 << 10
"""A status with every region and interrupt of a device takes a few kilobytes."""
MAX_BLOB_BYTES = 4 << 20
"""131072 register operations, or four reads of migration data at the usual transfer size."""
MAX_DESCRIPTORS = 64
"""In one message; the kernel's limit is 253. A longer memory map is handed out in parts."""

Fields = dict[str, Any]


class ControlMessage(NamedTuple):
    """One message. Whoever takes it owns its descriptors."""

    fields: Fields
    blob: bytes
    descriptors: list[int]


def encode(fields: Fields, blob: bytes = b"") -> bytes:
    """One message as bytes; fields may hold dataclasses and bytes.

    Raises `ControlProtocolError` when it is over the limits.
    """
    text = encode_plain(fields)
    if len(text) > MAX_JSON_BYTES or len(blob) > MAX_BLOB_BYTES:
        raise ControlProtocolError(
            f"a message of {len(text)} bytes of JSON and a blob of {len(blob)} bytes is too large"
        )
    return HEADER.pack(len(text), len(blob)) + text + blob


def encode_plain(fields: Fields) -> bytes:
    """Fields as JSON; they may hold dataclasses and bytes."""
    return json.dumps(fields, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    """What JSON has no form for: bytes are written in hexadecimal, a dataclass as an object."""
    if isinstance(value, bytes):
        return value.hex()
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


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
            fields = decode_plain(bytes(self._buffer[HEADER.size : blob_start]))
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


def decode_plain(text: bytes) -> Fields:
    """Fields from JSON. Raises `ControlProtocolError`."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ControlProtocolError("a message's JSON does not parse") from error
    if not isinstance(fields, dict):
        raise ControlProtocolError("a message's JSON is no object")
    return fields
