"""Every message of a session but the page frame: its layout, and the check of what arrives.

Owns the layouts, the limits and the routing ids. Pure: bytes in, a dataclass or a `RecordError`
out. Page frames are `frames`' subject; what a message means, in which order, is `channels`',
`sender`'s and `receiver`'s.

A session is one bound ROUTER at the receiver and several DEALERs at the sender, each with a
routing id of 21 bytes: the lane (never 0, which ZeroMQ keeps for itself), the session id, and the
number of the link, which grows whenever a lost link is made anew::

     0      1                           17          21
    +------+---------------------------+-----------+
    | lane | session id, 16 random B   | link u32  |   lane: 1 control, 2 tunnel, 16 + n data lane n
    +------+---------------------------+-----------+

Every message starts with its type in one byte; integers are little-endian and unaligned::

    control lane, both directions
      HELLO          | 1 | magic 8s | version u16 | session 16s | nonce 16s | lanes u8
                     | frame_bytes u32 | payload_bytes u32 | payload
      HELLO_REPLY    | 2 | magic 8s | version u16 | verdict u8 | window_frames u8
                     | peer_timeout_ms u32 | resume_ms u32 | payload_bytes u32 | payload
      RECORD         | 3 | sequence u64 | kind u16 | payload_bytes u32 | payload
      RECORD_CREDIT  | 4 | received u64 | consumed_cost u64
      PING, PONG     | 5, 6 | stamp u64
      ATTACHED       | 7 | n_pages u64
      BYE            | 8 | reason_bytes u16 | reason (UTF-8)
      HOLD           | 11 | window_ms u64
      RESUME, RESUMED | 12, 13 | magic 8s | version u16 | link u32 | records u64 | tunnel u64
                     | tunnel_ended u8 | mac 32s
      FORGOTTEN      | 14 |
    tunnel lane, both directions; the data of TUNNEL is a message part of its own, so that it is
    not copied
      TUNNEL         | 16 | offset u64 |   + part: data
      TUNNEL_EOF     | 17 | offset u64 |
      TUNNEL_CREDIT  | 18 | received u64 | consumed u64 |
    tunnel and data lanes, towards the receiver and back, before anything else
      LANE_HELLO     | 9 | sequence u64
      LANE_WELCOME   | 10 |
    data lanes, towards the receiver (or a page frame, which starts with "v")
      COMPARE        | 33 | request u32 | block_pages u16 | n_runs u32
                     | (first u32, length u32) x n_runs
      DIGEST         | 35 | request u32 | first_page u32 | n_pages u32
    data lanes, towards the sender
      ACK            | 32 | sequence u64 | n_rejected u32 | index u32 x n_rejected
      COMPARE_REPLY  | 34 | request u32 | n_digests u32 | digest u64 x n_digests
      DIGEST_REPLY   | 36 | request u32 | digest 32s

LANE_HELLO is sent as soon as the connection is there, and again on each new one until it is
answered: from then on the receiver knows that the connection is the session's. Its number is that
of the lane's next frame; 0 on the tunnel.

HOLD says how long a lost link is to be waited for from here on; 0: not at all. RESUME and RESUMED
are the first messages on a new link's control lane. They say what their sender has got on the links
before, and prove by a MAC that it knows the session (`resume_key`); who does not know it answers
FORGOTTEN.

HELLO and HELLO_REPLY keep their first eleven bytes in every version of the protocol, so that two
versions can tell each other what they are.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt

from transport.wire.errors import RecordError, VersionMismatch
from transport.wire.frames import MAX_FRAME_PAGES

PROTOCOL_VERSION = 6
SESSION_BYTES = 16
NONCE_BYTES = 16
MAC_BYTES = 32
REGION_DIGEST_BYTES = 32

MAX_DATA_LANES = 16
"""Data lanes of a session; more than a host's cores that could be spared for it."""
MIN_ANNOUNCED_FRAME_BYTES = 16 << 10
"""A frame must hold at least one raw page, and smaller ones are all overhead."""
MAX_ANNOUNCED_FRAME_BYTES = 4 << 20
"""Longest page frame; the receiver holds up to a window of them for each lane."""
MAX_WINDOW_FRAMES = 64
"""Frames under way on a lane; one hides a round trip, a few hide jitter."""
MAX_RECORD_BYTES = 1 << 20
"""Payload of a record or a greeting; longer things are sent in pieces."""
MAX_TUNNEL_CHUNK_BYTES = 256 << 10
"""Data of one TUNNEL message: large enough that its overhead is nothing, small enough that
records and pages are not held up behind it."""
MIN_PEER_TIMEOUT_MS = 500
"""Shortest silence that may count as a loss: below it a busy host looks like a dead one, and
pings cost more than they tell."""
MAX_RESUME_MS = 3_600_000
"""Longest time that a lost link may be waited for: an hour."""
MAX_REASON_BYTES = 512
"""Text of a BYE, which a person reads."""
MAX_COMPARE_PAGES = 16384
"""Pages of one COMPARE or DIGEST: 64 MiB, which take about 10 ms to digest."""
COMPARE_BLOCK_PAGES = 256
"""Pages under one digest in the first pass of a comparison."""

CONTROL_LANE = 1
TUNNEL_LANE = 2
FIRST_DATA_LANE = 16

Buffer = bytes | bytearray | memoryview
_M = TypeVar("_M")

_MAGIC = b"vfioferr"
_VERSION = struct.Struct("<B8sH")
_HELLO = struct.Struct("<B8sH16s16sBII")
_HELLO_REPLY = struct.Struct("<B8sHBBIII")
_RECORD = struct.Struct("<BQHI")
_ONE_U64 = struct.Struct("<BQ")
_TWO_U64 = struct.Struct("<BQQ")
_BYE = struct.Struct("<BH")
_ROUTING_ID = struct.Struct("<B16sI")
_RESUME = struct.Struct("<B8sHIQQB")
_ACK = struct.Struct("<BQI")
_COMPARE = struct.Struct("<BIHI")
_COMPARE_REPLY = struct.Struct("<BII")
_DIGEST = struct.Struct("<BIII")
_DIGEST_REPLY = struct.Struct("<BI32s")

MAX_CHANNEL_MESSAGE_BYTES = MAX_RECORD_BYTES + _HELLO.size
"""Longest message of the control and tunnel lanes."""
MAX_MESSAGE_BYTES = max(MAX_ANNOUNCED_FRAME_BYTES, MAX_CHANNEL_MESSAGE_BYTES)
"""Longest part of any message: ZMQ_MAXMSGSIZE of every socket."""


class MessageType(IntEnum):
    """The first byte of a message."""

    HELLO = 1
    HELLO_REPLY = 2
    RECORD = 3
    RECORD_CREDIT = 4
    PING = 5
    PONG = 6
    ATTACHED = 7
    BYE = 8
    LANE_HELLO = 9
    LANE_WELCOME = 10
    HOLD = 11
    RESUME = 12
    RESUMED = 13
    FORGOTTEN = 14
    TUNNEL = 16
    TUNNEL_EOF = 17
    TUNNEL_CREDIT = 18
    ACK = 32
    COMPARE = 33
    COMPARE_REPLY = 34
    DIGEST = 35
    DIGEST_REPLY = 36


LANE_WELCOME = bytes((MessageType.LANE_WELCOME,))
FORGOTTEN = bytes((MessageType.FORGOTTEN,))


class Verdict(IntEnum):
    """What a receiver says to a greeting."""

    ACCEPTED = 1
    REFUSED = 2
    OTHER_VERSION = 3
    BUSY = 4


def routing_id(lane: int, session: bytes, link: int = 0) -> bytes:
    """The ZMQ_ROUTING_ID of one of a session's connections."""
    return _ROUTING_ID.pack(lane, session, link)


def split_routing_id(identity: bytes) -> tuple[int, bytes, int]:
    """Lane, session and link of a routing id. Raises RecordError for one that is none of ours."""
    if len(identity) != _ROUTING_ID.size:
        raise RecordError(f"a routing id of {len(identity)} bytes")
    lane, session, link = _ROUTING_ID.unpack(identity)
    return lane, session, link


def session_seed(session: bytes, nonce: bytes) -> int:
    """The digest seed (64 bit) that both sides derive from a greeting."""
    digest = hashlib.blake2b(session + nonce, digest_size=8, person=b"vfio-ferry seed")
    return int.from_bytes(digest.digest(), "little")


def resume_key(session: bytes, nonce: bytes) -> bytes:
    """What both ends of a session know, and prove to know when its link is made anew; nobody else
    does where the greeting was encrypted."""
    digest = hashlib.blake2b(session + nonce, digest_size=MAC_BYTES, person=b"vfio-ferry again")
    return digest.digest()


@dataclass(frozen=True, slots=True)
class SessionHello:
    """A sender's greeting."""

    session: bytes
    nonce: bytes
    lanes: int
    frame_bytes: int
    payload: bytes

    def pack(self) -> bytes:
        fields = self.session, self.nonce, self.lanes, self.frame_bytes, len(self.payload)
        head = _HELLO.pack(MessageType.HELLO, _MAGIC, PROTOCOL_VERSION, *fields)
        return head + self.payload

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        """Raises VersionMismatch for a greeting of another version, RecordError for nonsense."""
        _check_version(message, MessageType.HELLO)
        _, _, _, session, nonce, lanes, frame_bytes, length = _head(_HELLO, message, "HELLO")
        if not 1 <= lanes <= MAX_DATA_LANES:
            raise RecordError(f"HELLO offers {lanes} lanes, 1 to {MAX_DATA_LANES} are possible")
        if not MIN_ANNOUNCED_FRAME_BYTES <= frame_bytes <= MAX_ANNOUNCED_FRAME_BYTES:
            raise RecordError(f"HELLO announces frames of {frame_bytes} bytes")
        payload = _tail(_HELLO, message, length, MAX_RECORD_BYTES, "HELLO")
        return cls(session, nonce, lanes, frame_bytes, payload)


@dataclass(frozen=True, slots=True)
class HelloReply:
    """A receiver's answer to a greeting."""

    verdict: Verdict
    window_frames: int
    peer_timeout_ms: int
    resume_ms: int
    """How long the receiver waits for a lost link at most."""
    payload: bytes

    def pack(self) -> bytes:
        limits = self.window_frames, self.peer_timeout_ms, self.resume_ms, len(self.payload)
        start = MessageType.HELLO_REPLY, _MAGIC, PROTOCOL_VERSION, self.verdict
        return _HELLO_REPLY.pack(*start, *limits) + self.payload

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        """Raises VersionMismatch for an answer of another version, RecordError for nonsense."""
        _check_version(message, MessageType.HELLO_REPLY)
        _, _, _, verdict, window, timeout_ms, resume_ms, length = _head(
            _HELLO_REPLY, message, "HELLO_REPLY"
        )
        if verdict not in Verdict.__members__.values():
            raise RecordError(f"HELLO_REPLY has the verdict {verdict}")
        if not 1 <= window <= MAX_WINDOW_FRAMES:
            raise RecordError(f"HELLO_REPLY announces a window of {window} frames")
        if timeout_ms < MIN_PEER_TIMEOUT_MS:
            raise RecordError(f"HELLO_REPLY announces a timeout of {timeout_ms} ms")
        if resume_ms > MAX_RESUME_MS:
            raise RecordError(f"HELLO_REPLY would wait {resume_ms} ms for a lost link")
        payload = _tail(_HELLO_REPLY, message, length, MAX_RECORD_BYTES, "HELLO_REPLY")
        return cls(Verdict(verdict), window, timeout_ms, resume_ms, payload)


@dataclass(frozen=True, slots=True)
class RecordMessage:
    """A record of the layer above, numbered from 0 in each direction."""

    sequence: int
    kind: int
    payload: bytes

    def pack(self) -> bytes:
        head = _RECORD.pack(MessageType.RECORD, self.sequence, self.kind, len(self.payload))
        return head + self.payload

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        """Raises RecordError for nonsense, as every `unpack` below."""
        _, sequence, kind, length = _head(_RECORD, message, "RECORD")
        return cls(sequence, kind, _tail(_RECORD, message, length, MAX_RECORD_BYTES, "RECORD"))


class _Fixed:
    """A message that is its type and fields of fixed length, `LAYOUT`."""

    TYPE: ClassVar[MessageType]
    LAYOUT: ClassVar[struct.Struct]

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.TYPE, *astuple(self))  # type: ignore[call-overload]

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        layout, name = cls.LAYOUT, cls.TYPE.name
        if len(message) != layout.size:
            raise RecordError(f"{name} has {len(message)} bytes instead of {layout.size}")
        return cls(*layout.unpack_from(message)[1:])


@dataclass(frozen=True, slots=True)
class RecordCredit(_Fixed):
    """How many records have arrived, and the cost of those that the application has taken."""

    received: int
    consumed_cost: int
    TYPE = MessageType.RECORD_CREDIT
    LAYOUT = _TWO_U64


@dataclass(frozen=True, slots=True)
class _Numbered(_Fixed):
    """A message that is its type and one u64, `value`."""

    value: int
    LAYOUT = _ONE_U64


class Ping(_Numbered):
    """Are you there? `value` comes back in the PONG."""

    TYPE = MessageType.PING


class Pong(_Numbered):
    """The answer to a PING, with its `value`."""

    TYPE = MessageType.PONG


class Attached(_Numbered):
    """The receiver has memory of `value` pages and is ready for frames."""

    TYPE = MessageType.ATTACHED


class Hold(_Numbered):
    """From here on a lost link is waited for, for `value` ms; 0: not at all."""

    TYPE = MessageType.HOLD


class LaneHello(_Numbered):
    """The connection is the session's; the lane's next frame has the number `value`."""

    TYPE = MessageType.LANE_HELLO


class TunnelEof(_Numbered):
    """The direction has ended after `value` bytes."""

    TYPE = MessageType.TUNNEL_EOF


class TunnelHead(_Numbered):
    """First part of a TUNNEL message: the data in the second one stands at offset `value`."""

    TYPE = MessageType.TUNNEL


@dataclass(frozen=True, slots=True)
class TunnelCredit(_Fixed):
    """How many bytes of the tunnel have arrived, and how many the application has taken."""

    received: int
    consumed: int
    TYPE = MessageType.TUNNEL_CREDIT
    LAYOUT = _TWO_U64


@dataclass(frozen=True, slots=True)
class Bye:
    """The end of the session, and why."""

    reason: str

    def pack(self) -> bytes:
        text = self.reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]
        return _BYE.pack(MessageType.BYE, len(text)) + text

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        """The reason comes out printable: a terminal must not take commands from a peer."""
        _, length = _head(_BYE, message, "BYE")
        text = _tail(_BYE, message, length, MAX_REASON_BYTES, "BYE").decode("utf-8", "replace")
        return cls("".join(char if char.isprintable() else "?" for char in text))


@dataclass(frozen=True, slots=True)
class Position:
    """What one end of a session has got of the other's records and tunnel bytes."""

    records: int
    tunnel: int
    tunnel_ended: bool


@dataclass(frozen=True, slots=True)
class Resumption:
    """RESUME or RESUMED: the session goes on on a link of this number."""

    type: MessageType
    link: int
    position: Position

    def pack(self, key: bytes) -> bytes:
        """With the proof that the session is known: `key` is its `resume_key`."""
        at = self.position
        body = _RESUME.pack(
            self.type, _MAGIC, PROTOCOL_VERSION, self.link, at.records, at.tunnel, at.tunnel_ended
        )
        return body + _mac(body, key)

    @classmethod
    def unpack(cls, message: Buffer, expected: MessageType, key: bytes) -> Self:
        """Raises VersionMismatch, or RecordError for nonsense and for one without the proof."""
        _check_version(message, expected)
        name = expected.name
        _, _, _, link, records, tunnel, ended = _head(_RESUME, message, name)
        mac = _tail(_RESUME, message, MAC_BYTES, MAC_BYTES, name)
        if not hmac.compare_digest(mac, _mac(bytes(message[: _RESUME.size]), key)):
            raise RecordError(f"{name} comes from somebody who does not know the session")
        return cls(expected, link, Position(records, tunnel, bool(ended)))


def _mac(body: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(body, key=key, digest_size=MAC_BYTES).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Ack:
    """A frame has been applied, except for the pages `rejected` (uint32)."""

    sequence: int
    rejected: npt.NDArray[np.uint32]

    def pack(self) -> bytes:
        rejected = self.rejected.astype("<u4", copy=False)
        return _ACK.pack(MessageType.ACK, self.sequence, len(rejected)) + rejected.tobytes()

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        _, sequence, count = _head(_ACK, message, "ACK")
        if count > MAX_FRAME_PAGES:
            raise RecordError(f"ACK rejects {count} pages")
        tail = _tail(_ACK, message, 4 * count, 4 * MAX_FRAME_PAGES, "ACK")
        return cls(sequence, np.frombuffer(tail, "<u4").astype(np.uint32, copy=False))


@dataclass(frozen=True, slots=True, eq=False)
class Compare:
    """What are the digests of these pages?

    `runs` uint32 (n, 2): first page and length, ascending, apart, at most `MAX_COMPARE_PAGES`
    pages together. One digest is asked for each `block_pages` of these pages in their order, the
    last block may be shorter.
    """

    request: int
    block_pages: int
    runs: npt.NDArray[np.uint32]

    def pack(self) -> bytes:
        head = _COMPARE.pack(MessageType.COMPARE, self.request, self.block_pages, len(self.runs))
        return head + self.runs.astype("<u4", copy=False).tobytes()

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        _, request, block_pages, n_runs = _head(_COMPARE, message, "COMPARE")
        if block_pages not in (1, COMPARE_BLOCK_PAGES):
            raise RecordError(f"COMPARE has blocks of {block_pages} pages")
        if not 1 <= n_runs <= MAX_COMPARE_PAGES:
            raise RecordError(f"COMPARE has {n_runs} runs")
        tail = _tail(_COMPARE, message, 8 * n_runs, 8 * MAX_COMPARE_PAGES, "COMPARE")
        wide = np.frombuffer(tail, "<u4").reshape(n_runs, 2).astype(np.int64)
        ends = wide[:, 0] + wide[:, 1]
        if (wide[:, 1] == 0).any() or (wide[1:, 0] < ends[:-1]).any() or ends[-1] > 1 << 32:
            raise RecordError("COMPARE has runs that are empty, overlap or end nowhere")
        if wide[:, 1].sum() > MAX_COMPARE_PAGES:
            raise RecordError(f"COMPARE asks for {wide[:, 1].sum()} pages")
        return cls(request, block_pages, wide.astype(np.uint32))


@dataclass(frozen=True, slots=True, eq=False)
class CompareReply:
    """The digests that a COMPARE asked for: uint64 (n_blocks)."""

    request: int
    digests: npt.NDArray[np.uint64]

    def pack(self) -> bytes:
        head = _COMPARE_REPLY.pack(MessageType.COMPARE_REPLY, self.request, len(self.digests))
        return head + self.digests.astype("<u8", copy=False).tobytes()

    @classmethod
    def unpack(cls, message: Buffer) -> Self:
        _, request, n_digests = _head(_COMPARE_REPLY, message, "COMPARE_REPLY")
        if not 1 <= n_digests <= MAX_COMPARE_PAGES:
            raise RecordError(f"COMPARE_REPLY has {n_digests} digests")
        tail = _tail(_COMPARE_REPLY, message, 8 * n_digests, 8 * MAX_COMPARE_PAGES, "COMPARE_REPLY")
        return cls(request, np.frombuffer(tail, "<u8").astype(np.uint64, copy=False))


@dataclass(frozen=True, slots=True)
class Digest(_Fixed):
    """What is the digest of these pages (at most `MAX_COMPARE_PAGES`)?"""

    request: int
    first_page: int
    n_pages: int
    TYPE = MessageType.DIGEST
    LAYOUT = _DIGEST

    def __post_init__(self) -> None:
        if not 1 <= self.n_pages <= MAX_COMPARE_PAGES:
            raise RecordError(f"DIGEST asks for {self.n_pages} pages")


@dataclass(frozen=True, slots=True)
class DigestReply(_Fixed):
    """The digest asked for, `REGION_DIGEST_BYTES` long."""

    request: int
    digest: bytes
    TYPE = MessageType.DIGEST_REPLY
    LAYOUT = _DIGEST_REPLY


ControlMessage = RecordMessage | RecordCredit | Ping | Pong | Attached | Bye | Hold
LaneRequest = Compare | Digest
LaneAnswer = Ack | CompareReply | DigestReply

_CONTROL: dict[int, type[ControlMessage]] = {
    MessageType.RECORD: RecordMessage,
    MessageType.RECORD_CREDIT: RecordCredit,
    MessageType.PING: Ping,
    MessageType.PONG: Pong,
    MessageType.ATTACHED: Attached,
    MessageType.BYE: Bye,
    MessageType.HOLD: Hold,
}
_TUNNEL: dict[int, type[TunnelHead | TunnelEof | TunnelCredit]] = {
    MessageType.TUNNEL: TunnelHead,
    MessageType.TUNNEL_EOF: TunnelEof,
    MessageType.TUNNEL_CREDIT: TunnelCredit,
}
_REQUESTS: dict[int, type[LaneRequest]] = {
    MessageType.COMPARE: Compare,
    MessageType.DIGEST: Digest,
}
_ANSWERS: dict[int, type[LaneAnswer]] = {
    MessageType.ACK: Ack,
    MessageType.COMPARE_REPLY: CompareReply,
    MessageType.DIGEST_REPLY: DigestReply,
}


def unpack_control(message: Buffer) -> ControlMessage:
    """A message of the control lane once the greeting is done. Raises RecordError."""
    return _kind(_CONTROL, message, "control").unpack(message)


def unpack_tunnel(message: Buffer) -> TunnelHead | TunnelEof | TunnelCredit:
    """The first part of a message of the tunnel lane. Raises RecordError."""
    return _kind(_TUNNEL, message, "tunnel").unpack(message)


def unpack_request(message: Buffer) -> LaneRequest:
    """What a sender asks on a data lane, page frames apart. Raises RecordError."""
    return _kind(_REQUESTS, message, "data").unpack(message)


def unpack_answer(message: Buffer) -> LaneAnswer:
    """What a receiver answers on a data lane. Raises RecordError."""
    return _kind(_ANSWERS, message, "data").unpack(message)


def message_type(message: Buffer) -> int:
    """The type of a message, its first byte; -1 if it is empty."""
    return message[0] if len(message) else -1


def _kind(table: dict[int, type[_M]], message: Buffer, lane: str) -> type[_M]:
    found = table.get(message_type(message))
    if found is None:
        raise RecordError(f"a message of type {message_type(message)} on the {lane} lane")
    return found


def _check_version(message: Buffer, expected: MessageType) -> None:
    kind, magic, version = _head(_VERSION, message, expected.name)
    if kind != expected or magic != _MAGIC:
        raise RecordError(f"this is no {expected.name}")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the peer speaks version {version} of the transport protocol, this side "
            f"{PROTOCOL_VERSION}; install the same version on both hosts"
        )


def _head(layout: struct.Struct, message: Buffer, name: str) -> tuple[Any, ...]:
    if len(message) < layout.size:
        raise RecordError(f"{name} is cut off after {len(message)} bytes")
    return layout.unpack_from(message)


def _tail(layout: struct.Struct, message: Buffer, length: int, limit: int, name: str) -> bytes:
    """The `length` bytes behind the head, which must be all that follows."""
    if length > limit:
        raise RecordError(f"{name} announces {length} bytes, at most {limit} are allowed")
    if len(message) != layout.size + length:
        raise RecordError(f"{name} announces {length} bytes and has {len(message) - layout.size}")
    return bytes(memoryview(message)[layout.size :])
