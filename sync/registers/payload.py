"""How register state crosses to the other host: typed, versioned, bounded payloads.

Owns the encoding, not its meaning (`capture`, `v2`), and no transport.

     0       4         5      6      8        12
    +-------+---------+------+------+--------+------------------+
    | VFRS  | version | kind | more | length | body             |
    | 4 B   | u8      | u8   | u16  | u32    | length bytes     |
    +-------+---------+------+------+--------+------------------+

Little-endian. A body that does not fit is split: all parts but the last say `more` = 1. Payloads
of one device arrive in the order in which they were made.
"""

import json
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from sync.registers.errors import PayloadError

_HEADER = struct.Struct("<4sBBHI")
_MAGIC = b"VFRS"
VERSION = 2
MAX_BODY_BYTES = 256 << 10
"""A payload's body has at most so many: it fits a message of the transport with room to spare."""
MAX_WHOLE_BYTES = 4 << 20
"""A body that is put together has at most so many: the receiver keeps them in memory."""


class PayloadKind(IntEnum):
    OFFER = 1
    """JSON: the method, the device and the profile, for the target to judge."""
    SNAPSHOT = 2
    """u64 number of the journal's first record, then the executed records of the snapshot."""
    JOURNAL = 3
    """Records, whole accesses, numbered on from the last ones."""
    FINAL = 4
    """The executed records of the last reading, for the comparison."""
    STATE = 5
    """u64 position in the device's state stream, then bytes of it."""
    DEFERRED = 7
    """The executed records of what was in read-to-clear registers at the end."""
    END = 6
    """u64: the number that the journal's next record would have, or the length of the stream."""


def split(kind: PayloadKind, body: bytes) -> Iterator[bytes]:
    """`body` as payloads; at least one."""
    for start in range(0, max(len(body), 1), MAX_BODY_BYTES):
        part = body[start : start + MAX_BODY_BYTES]
        more = start + len(part) < len(body)
        yield _HEADER.pack(_MAGIC, VERSION, kind, more, len(part)) + part


class Assembler:
    """Puts split bodies together again."""

    def __init__(self) -> None:
        self._kind: PayloadKind | None = None
        self._body = bytearray()

    def add(self, payload: bytes) -> tuple[PayloadKind, bytes] | None:
        """The whole body once `payload` completes it. Raises `PayloadError`."""
        if len(payload) < _HEADER.size:
            raise PayloadError("register state arrived without a header")
        magic, version, number, more, length = _HEADER.unpack_from(payload)
        if magic != _MAGIC or more > 1 or length != len(payload) - _HEADER.size:
            raise PayloadError("register state arrived with a malformed header")
        if version != VERSION:
            raise PayloadError(
                f"register state has version {version}, this program reads {VERSION}: "
                "run the same release on both hosts"
            )
        if length > MAX_BODY_BYTES or len(self._body) + length > MAX_WHOLE_BYTES:
            raise PayloadError("register state is larger than allowed")
        try:
            kind = PayloadKind(number)
        except ValueError as error:
            raise PayloadError(f"register state of kind {number} does not exist") from error
        if self._kind not in (None, kind):
            raise PayloadError(f"{kind.name} arrived in the middle of another body")
        self._kind = kind
        self._body += payload[_HEADER.size :]
        if more:
            return None
        body = bytes(self._body)
        self._kind, self._body = None, bytearray()
        return kind, body


def encode_json(kind: PayloadKind, document: dict[str, Any]) -> bytes:
    """One payload. The document has to fit (it is ours: names, numbers, a profile's constants)."""
    (payload,) = split(kind, json.dumps(document, separators=(",", ":")).encode())
    return payload


def decode_json(kind: PayloadKind, payload: bytes) -> dict[str, Any]:
    """The document in a single payload of this kind. Raises `PayloadError`."""
    whole = Assembler().add(payload)
    if whole is None or whole[0] is not kind:
        raise PayloadError(f"a single {kind.name} was expected")
    try:
        document = json.loads(whole[1])
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"{kind.name} is not valid JSON") from error
    if not isinstance(document, dict):
        raise PayloadError(f"{kind.name} is no JSON object")
    return document


_NUMBER = struct.Struct("<Q")


def with_number(number: int, data: bytes = b"") -> bytes:
    """A body of a u64 and bytes."""
    return _NUMBER.pack(number) + data


def take_number(body: bytes) -> tuple[int, bytes]:
    """The u64 and the bytes of a body. Raises `PayloadError`."""
    if len(body) < _NUMBER.size:
        raise PayloadError("register state is cut short")
    return _NUMBER.unpack_from(body)[0], body[_NUMBER.size :]
