"""The 16-byte message header, the commands and the checks that every message body goes through.

Knows no message body: those stand in `version`, `information`, `access` and `features`.
Source: vfio-user specification, sections "Commands" and "Header". The protocol uses the byte order
of the host; this implementation supports little-endian hosts only.
"""

import struct
from enum import IntEnum
from typing import Any, Final, NamedTuple

from sync.vfio_user.errors import ProtocolError

HEADER: Final = struct.Struct("<HHIII")
HEADER_BYTES: Final = HEADER.size

FLAG_TYPE_MASK: Final = 0xF
FLAG_REPLY: Final = 0x1
FLAG_NO_REPLY: Final = 0x10
FLAG_ERROR: Final = 0x20

DEFAULT_MAX_DATA_XFER_BYTES: Final = 1 << 20
"""`max_data_xfer_size` of a peer that does not announce one."""

SMALLEST_MESSAGE_LIMIT_BYTES: Final = 1 << 16
"""Room that messages other than data transfers (version, SET_IRQS, capabilities) always get."""


class Command(IntEnum):
    """What a message asks for. DMA_READ and DMA_WRITE go from server to client, all others back."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Header(NamedTuple):
    """A message header. `size` counts the whole message in bytes, this header included."""

    message_id: int
    command: int
    size: int
    flags: int
    error: int

    @property
    def wants_reply(self) -> bool:
        return not self.flags & FLAG_NO_REPLY

    def pack(self) -> bytes:
        return HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, *, max_message_bytes: int) -> "Header":
        """Read the header at the start of `data` (at least 16 bytes).

        Raises `ProtocolError` for a size below 16 or above `max_message_bytes`, for a type that is
        neither command nor reply, and for an error reply that carries a body.
        """
        header = cls._make(HEADER.unpack_from(data))
        size, flags = header.size, header.flags
        if not HEADER_BYTES <= size <= max_message_bytes:
            raise ProtocolError(f"message of {size} bytes, limits are 16 and {max_message_bytes}")
        if flags & FLAG_TYPE_MASK > FLAG_REPLY:
            raise ProtocolError(f"message type {flags & FLAG_TYPE_MASK} is unknown")
        if flags & FLAG_ERROR and flags & FLAG_REPLY and size != HEADER_BYTES:
            raise ProtocolError("error reply with a body")
        return header


def encode_message(
    message_id: int,
    command: int,
    body: bytes | bytearray | memoryview = b"",
    *,
    reply: bool = False,
    no_reply: bool = False,
    error: int = 0,
) -> bytes:
    """Return header and body as one message. `error` (an errno) makes it an error reply: no body.

    Raises ValueError for an error that is no reply or has a body.
    """
    flags = FLAG_REPLY if reply else 0
    if no_reply:
        flags |= FLAG_NO_REPLY
    if error:
        if not reply or body:
            raise ValueError("an error goes into a reply without a body")
        flags |= FLAG_ERROR
    return HEADER.pack(message_id, command, HEADER_BYTES + len(body), flags, error) + body


def message_limit_bytes(max_data_xfer_bytes: int) -> int:
    """Return the size of the largest message when transfers carry up to `max_data_xfer_bytes`.

    64 bytes cover the header and the largest fixed part (a dirty bitmap in a feature reply).
    """
    return max(max_data_xfer_bytes, SMALLEST_MESSAGE_LIMIT_BYTES) + 64


def unpack_exactly(
    layout: struct.Struct, body: bytes | bytearray | memoryview, what: str
) -> tuple[Any, ...]:
    """Unpack a body that has just this layout; `ProtocolError` if its length differs."""
    if len(body) != layout.size:
        raise ProtocolError(f"{what} of {len(body)} bytes, expected {layout.size}")
    return layout.unpack(body)


def unpack_start(
    layout: struct.Struct, body: bytes | bytearray | memoryview, what: str
) -> tuple[Any, ...]:
    """Unpack the fixed part at the start of a body; `ProtocolError` if the body is shorter."""
    if len(body) < layout.size:
        raise ProtocolError(f"{what} of {len(body)} bytes, at least {layout.size} expected")
    return layout.unpack_from(body)


def require_argsz(argsz: int, least: int, what: str) -> None:
    """Raise `ProtocolError` if `argsz` leaves no room for the fixed part of `least` bytes."""
    if argsz < least:
        raise ProtocolError(f"{what} with argsz {argsz}, at least {least} expected")
