"""The form of a saved device state: sections that are checked before anything in them is used.

     0        4         6      8        12      16
    +--------+---------+------+--------+-------+-- - -
    | "VFST" | version | kind | length | crc32 | body
    +--------+---------+------+--------+-------+-- - -

Little-endian; `length` counts the body in bytes, `crc32` covers version, kind, length and body. A
stream is an IDENTITY, which can be compared before the device stops, and a STATE.
"""

import struct
import zlib
from enum import IntEnum

from lab.devices.errors import StateStreamError

VERSION = 1
MAX_STREAM_BYTES = 1 << 20
"""What is accepted from a client. A device with 64 full queues has a state of some 40 KiB."""

_MAGIC = b"VFST"
_HEADER = struct.Struct("<4sHHII")
_CHECKED = slice(4, 12)


class Section(IntEnum):
    """What a section of a device's state holds."""

    IDENTITY = 1
    STATE = 2


def pack_section(kind: Section, body: bytes) -> bytes:
    """One section, header and body."""
    header = _HEADER.pack(_MAGIC, VERSION, kind, len(body), 0)
    return header[:12] + struct.pack("<I", _checksum(header, body)) + body


def unpack_stream(data: bytes) -> tuple[bytes, bytes]:
    """The bodies of IDENTITY and STATE. Raises `StateStreamError` for anything but the two."""
    bodies = []
    for kind in (Section.IDENTITY, Section.STATE):
        body, data = _unpack_section(kind, data)
        bodies.append(body)
    if data:
        raise StateStreamError(f"{len(data)} bytes behind the end of the state")
    return bodies[0], bodies[1]


def _unpack_section(expected: Section, data: bytes) -> tuple[bytes, bytes]:
    if len(data) < _HEADER.size:
        raise StateStreamError(f"the stream ends in front of its section {expected.name}")
    magic, version, kind, length, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise StateStreamError("this is no device state")
    if version != VERSION:
        raise StateStreamError(f"the state has version {version}, this device reads {VERSION}")
    if kind != expected:
        raise StateStreamError(f"section {kind} where {expected.name} should be")
    end = _HEADER.size + length
    if end > len(data):
        raise StateStreamError(f"section {expected.name} is truncated")
    body = data[_HEADER.size : end]
    if _checksum(data, body) != checksum:
        raise StateStreamError(f"section {expected.name} is corrupted")
    return body, data[end:]


def _checksum(header: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(header[_CHECKED]))
