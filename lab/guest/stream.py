"""The guest's migration stream, without a socket: records in, bytes out, and the way back.

    +------+--------+--------+---------------------+
    | kind | length | digest | payload             |
    | u32  | u32    | u64    | `length` bytes      |
    +------+--------+--------+---------------------+

Little-endian. The digest is XXH3 of the payload, seeded with the record's number and kind, so that
a record that is lost, doubled or out of place is found as well as one that is damaged.

    kind    payload
    HELLO   magic, version u32, JSON object: the guest's geometry. First record.
    PAGES   count u32, page numbers u32[count], the pages
    ZEROS   count u32, page numbers u32[count]
    STATE   JSON object: what the VM is, beside its RAM. Once.
    END     empty. Last record, after STATE.
"""

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from lab.guest.errors import StreamError
from lab.guest.ram import Pages
from sync.memory import PAGE_BYTES

MAGIC = b"FERRYVM\0"
VERSION = 1
CHUNK_PAGES = 256
"""Pages in one record: a megabyte."""
MAX_JSON_BYTES = 1 << 20

_HEADER = struct.Struct("<IIQ")
_COUNT = struct.Struct("<I")
_HELLO = struct.Struct("<8sI")


class Kind(IntEnum):
    """What a record is."""

    HELLO = 1
    PAGES = 2
    ZEROS = 3
    STATE = 4
    END = 5


_LIMITS = {
    Kind.HELLO: _HELLO.size + MAX_JSON_BYTES,
    Kind.PAGES: _COUNT.size + CHUNK_PAGES * (4 + PAGE_BYTES),
    Kind.ZEROS: _COUNT.size + CHUNK_PAGES * 4,
    Kind.STATE: MAX_JSON_BYTES,
    Kind.END: 0,
}


@dataclass(frozen=True, slots=True)
class Hello:
    """The first record: what the guest is made of, which the target has to be made of, too."""

    geometry: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PageData:
    """Pages of RAM as they are."""

    pages: Pages
    data: npt.NDArray[np.uint8]
    """uint8 [len(pages), PAGE_BYTES]."""


@dataclass(frozen=True, slots=True)
class ZeroPages:
    """Pages of RAM that hold nothing but zeros."""

    pages: Pages


@dataclass(frozen=True, slots=True)
class VmState:
    """What the guest is beside its RAM."""

    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class End:
    """The last record."""


Record = Hello | PageData | ZeroPages | VmState | End


class StreamWriter:
    """Encodes records in order."""

    def __init__(self) -> None:
        self._number = 0

    def hello(self, geometry: dict[str, Any]) -> bytes:
        return self._record(Kind.HELLO, _HELLO.pack(MAGIC, VERSION) + json.dumps(geometry).encode())

    def pages(self, pages: Pages, data: npt.NDArray[np.uint8]) -> tuple[bytes, int]:
        """Up to `CHUNK_PAGES` pages as one or two records, and how many were not all zeros.

        `data`: uint8 [len(pages), PAGE_BYTES], private to the caller.
        """
        words = data.reshape(-1).view(np.uint64).reshape(len(pages), -1)
        filled = words.any(axis=1)
        out = b""
        if not filled.all():
            out += self._record(Kind.ZEROS, _numbers(pages[~filled]))
        if filled.any():
            out += self._record(Kind.PAGES, _numbers(pages[filled]) + data[filled].tobytes())
        return out, int(np.count_nonzero(filled))

    def state(self, state: dict[str, Any]) -> bytes:
        return self._record(Kind.STATE, json.dumps(state).encode())

    def end(self) -> bytes:
        return self._record(Kind.END, b"")

    def _record(self, kind: Kind, payload: bytes) -> bytes:
        digest = xxh3_64_intdigest(payload, _seed(self._number, kind))
        self._number += 1
        return _HEADER.pack(kind, len(payload), digest) + payload


class StreamReader:
    """Decodes a stream that may be anything. `feed`, then `next_record` until it returns None."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._number = 0
        self._last: Kind | None = None

    @property
    def ended(self) -> bool:
        """Whether END has come."""
        return self._last is Kind.END

    def feed(self, data: bytes | memoryview) -> None:
        self._buffer += data

    def next_record(self) -> Record | None:
        """The next record, or None if more bytes are needed. Raises `StreamError`."""
        if len(self._buffer) < _HEADER.size:
            return None
        number, length, digest = _HEADER.unpack_from(self._buffer)
        try:
            kind = Kind(number)
        except ValueError:
            raise StreamError(f"a record of unknown kind {number}") from None
        if length > _LIMITS[kind]:
            raise StreamError(f"a {kind.name} record of {length} bytes")
        self._check_order(kind)
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        if xxh3_64_intdigest(payload, _seed(self._number, kind)) != digest:
            raise StreamError(f"record {self._number} ({kind.name}) is damaged")
        self._number += 1
        self._last = kind
        return _parse(kind, payload)

    def _check_order(self, kind: Kind) -> None:
        if (kind is Kind.HELLO) != (self._last is None):
            raise StreamError("HELLO has to be the first record and no other")
        if self._last is Kind.END or (self._last is Kind.STATE) != (kind is Kind.END):
            raise StreamError(f"{kind.name} after {self._last.name if self._last else 'nothing'}")


def _parse(kind: Kind, payload: bytes) -> Record:
    if kind is Kind.HELLO:
        if len(payload) < _HELLO.size:
            raise StreamError("HELLO is too short")
        magic, version = _HELLO.unpack_from(payload)
        if magic != MAGIC:
            raise StreamError("this is no migration of our guest")
        if version != VERSION:
            raise StreamError(f"the stream has version {version}, this is {VERSION}")
        return Hello(_object(payload[_HELLO.size :], "HELLO"))
    if kind is Kind.STATE:
        return VmState(_object(payload, "STATE"))
    if kind is Kind.END:
        return End()
    if len(payload) < _COUNT.size:
        raise StreamError(f"{kind.name} is too short")
    (count,) = _COUNT.unpack_from(payload)
    page_bytes = PAGE_BYTES if kind is Kind.PAGES else 0
    if not count or len(payload) != _COUNT.size + count * (4 + page_bytes):
        raise StreamError(f"{kind.name} of {count} pages in {len(payload)} bytes")
    pages = np.frombuffer(payload, np.uint32, count, _COUNT.size)
    if kind is Kind.ZEROS:
        return ZeroPages(pages)
    data = np.frombuffer(payload, np.uint8, count * PAGE_BYTES, _COUNT.size + 4 * count)
    return PageData(pages, data.reshape(count, PAGE_BYTES))


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StreamError(f"{what} is no JSON") from error
    if not isinstance(value, dict):
        raise StreamError(f"{what} is no JSON object")
    return value


def _numbers(pages: Pages) -> bytes:
    return _COUNT.pack(len(pages)) + pages.astype("<u4").tobytes()


def _seed(number: int, kind: Kind) -> int:
    return (number << 8 | kind) & 0xFFFF_FFFF_FFFF_FFFF
