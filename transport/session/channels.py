"""What both ends of a session keep track of: ordered records, the tunnel, credit, liveness.

Owns the rules of the control and tunnel lanes behind the greeting; the layouts are in `records`.
Pure: messages and the time in, messages out, `RecordError` for a peer that breaks the rules.
Not thread-safe: `link` holds a lock around it and owns sockets, threads and trio.

Credit works the same way in both directions of both channels. A sender never has more under way
than the window, which counts what the peer's *application* has not taken yet; so a slow application
stops its peer, and neither side holds more than a window for each channel. Beside it the peer says
what its *transport* has got: that is what a flush waits for::

    application   queue ──► under way ──► arrived ──► taken     application
                  └─────────────── window ─────────────┘
                  └────── flush ──────────┘

What was sent is kept until it is known to have arrived. When a link is made anew, each end says
what it has got (`Conversation.position`), and the rest is sent again (`Conversation.resume`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from transport.wire.errors import RecordError
from transport.wire.records import (
    MAX_RECORD_BYTES,
    MAX_TUNNEL_CHUNK_BYTES,
    MIN_PEER_TIMEOUT_MS,
    Attached,
    ControlMessage,
    Hold,
    Ping,
    Pong,
    Position,
    RecordCredit,
    RecordMessage,
    TunnelCredit,
    TunnelEof,
    TunnelHead,
)

RECORD_WINDOW_BYTES = 4 << 20
"""Cost of the records under way in one direction: a few of the longest, thousands of short ones."""
RECORD_COST_BYTES = 256
"""What a record costs beside its payload, so that empty records are bounded, too."""
TUNNEL_WINDOW_BYTES = 4 << 20
"""Bytes of the tunnel under way in one direction: 10 Gbit/s at 3 ms."""
COALESCE_BYTES = 64 << 10
"""Tunnel chunks shorter than this are joined on arrival: a peer that sends single bytes must not
cost an object for each."""
PINGS_PER_TIMEOUT = 5
"""A peer may lose four answers to our scheduling before it counts as gone."""
GREETING_PING_S = MIN_PEER_TIMEOUT_MS / 1000 / PINGS_PER_TIMEOUT
"""Between two pings as long as the peer's timeout is not known: often enough for any."""
LISTENING_S = 0.5
"""A longer time between two looks at the peer's silence is one in which this side did not run."""

MAX_KIND = 0xFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """One message of the ordered control lane, opaque to `transport`."""

    kind: int
    """0 to 65535, meaning given by the layer above."""
    payload: bytes
    """At most `MAX_RECORD_BYTES` (1 MiB)."""


class RecordChannel:
    """Records in both directions, exactly once and in order."""

    def __init__(self) -> None:
        self.sent = 0
        """Records queued so far, which is the next one's sequence number."""
        self.delivered = 0
        """Records that the peer's transport has got."""
        self.received = 0
        """Records that arrived."""
        self._outbox: deque[RecordMessage] = deque()
        self._kept: deque[RecordMessage] = deque()
        """Sent, and not known to have arrived."""
        self._sent_cost = 0
        self._peer_consumed_cost = 0
        self._inbox: deque[Record] = deque()
        self._received_cost = 0
        self._consumed_cost = 0
        self._told = RecordCredit(0, 0)

    @staticmethod
    def check(kind: int, payload: bytes) -> None:
        """Raise ValueError for a record that cannot be sent."""
        if not 0 <= kind <= MAX_KIND:
            raise ValueError(f"a record's kind is 0 to {MAX_KIND}, not {kind}")
        if len(payload) > MAX_RECORD_BYTES:
            raise ValueError(
                f"a record has at most {MAX_RECORD_BYTES} bytes, this one {len(payload)}"
            )

    def try_queue(self, kind: int, payload: bytes) -> bool:
        """Queue a record that `check` has passed; False: the window is full."""
        cost = _cost(payload)
        if self._sent_cost - self._peer_consumed_cost + cost > RECORD_WINDOW_BYTES:
            return False
        self._outbox.append(RecordMessage(self.sent, kind, payload))
        self.sent += 1
        self._sent_cost += cost
        return True

    def take(self) -> Record | None:
        """The next record that arrived, if there is one."""
        if not self._inbox:
            return None
        record = self._inbox.popleft()
        self._consumed_cost += _cost(record.payload)
        return record

    def on_record(self, message: RecordMessage) -> None:
        """A record arrived."""
        if message.sequence != self.received:
            raise RecordError(f"record {message.sequence} instead of {self.received}")
        self._received_cost += _cost(message.payload)
        if self._received_cost - self._consumed_cost > RECORD_WINDOW_BYTES:
            raise RecordError("the peer sends records beyond the window")
        self.received += 1
        self._inbox.append(Record(message.kind, message.payload))

    def on_credit(self, message: RecordCredit) -> None:
        """The peer says what it has got and taken."""
        if not self.delivered <= message.received <= self.sent - len(self._outbox):
            raise RecordError("the peer acknowledges records that were not sent")
        if not self._peer_consumed_cost <= message.consumed_cost <= self._sent_cost:
            raise RecordError("the peer gives credit for records that were not sent")
        self._has_arrived(message.received)
        self._peer_consumed_cost = message.consumed_cost

    def resume(self, received: int) -> None:
        """A new link: the peer has got so many records, and gets the others again."""
        if not self.delivered <= received <= self.sent - len(self._outbox):
            raise RecordError("the peer resumes behind records that it does not have")
        self._has_arrived(received)
        self._outbox.extendleft(reversed(self._kept))
        self._kept.clear()
        self._told = RecordCredit(0, 0)

    def _has_arrived(self, received: int) -> None:
        self.delivered = received
        while self._kept and self._kept[0].sequence < received:
            self._kept.popleft()

    def owes_credit(self) -> bool:
        """Whether the peer has to hear what arrived or was taken."""
        unsaid = self._consumed_cost - self._told.consumed_cost
        return self.received != self._told.received or unsaid >= RECORD_WINDOW_BYTES // 4

    def next_message(self) -> bytes | None:
        """The next message for the wire, if there is one; it must then be sent."""
        if self.owes_credit():
            self._told = RecordCredit(self.received, self._consumed_cost)
            return self._told.pack()
        if not self._outbox:
            return None
        self._kept.append(self._outbox.popleft())
        return self._kept[-1].pack()


class TunnelChannel:
    """A stream of bytes in both directions, each of which can end by itself."""

    def __init__(self, chunk_bytes: int = MAX_TUNNEL_CHUNK_BYTES) -> None:
        """At most `chunk_bytes` are put into one message."""
        self.sent = 0
        """Bytes queued so far."""
        self.delivered = 0
        """Bytes that the peer's transport has got."""
        self.received = 0
        """Bytes that arrived."""
        self.ended = False
        """Whether this side has closed its direction."""
        self._chunk_bytes = chunk_bytes
        self._outbox: deque[tuple[TunnelHead, memoryview]] = deque()
        self._outbox_bytes = 0
        self._kept: deque[tuple[TunnelHead, memoryview]] = deque()
        """Sent, and not known to have arrived."""
        self._eof_unsent = False
        self._peer_consumed = 0
        self._inbox: deque[bytes | bytearray] = deque()
        self._consumed = 0
        self.peer_ended = False
        """Whether the peer has closed its direction."""
        self._told = TunnelCredit(0, 0)

    def try_queue(self, data: memoryview) -> int:
        """Queue as much of `data` (of immutable bytes) as the window allows; returns how much."""
        room = TUNNEL_WINDOW_BYTES - (self.sent - self._peer_consumed)
        taken = min(room, len(data))
        for start in range(0, taken, self._chunk_bytes):
            chunk = data[start : min(start + self._chunk_bytes, taken)]
            self._outbox.append((TunnelHead(self.sent), chunk))
            self.sent += len(chunk)
            self._outbox_bytes += len(chunk)
        return taken

    def end(self) -> None:
        """Close this direction; nothing may be queued afterwards."""
        self._eof_unsent |= not self.ended
        self.ended = True

    def take(self, max_bytes: int) -> bytes | None:
        """The next bytes that arrived; b"" at the end, None: nothing there yet."""
        if not self._inbox:
            return b"" if self.peer_ended else None
        chunk = self._inbox.popleft()
        if len(chunk) > max_bytes:
            self._inbox.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        self._consumed += len(chunk)
        return bytes(chunk)

    def on_data(self, head: TunnelHead, data: bytes) -> None:
        """Bytes arrived."""
        if self.peer_ended or head.value != self.received or not data:
            raise RecordError("the peer's tunnel bytes are out of order, empty, or after their end")
        if len(data) > MAX_TUNNEL_CHUNK_BYTES:
            raise RecordError(f"a tunnel chunk of {len(data)} bytes")
        self.received += len(data)
        if self.received - self._consumed > TUNNEL_WINDOW_BYTES:
            raise RecordError("the peer sends tunnel bytes beyond the window")
        if len(data) >= COALESCE_BYTES:
            self._inbox.append(data)
        elif (
            self._inbox
            and isinstance(last := self._inbox[-1], bytearray)
            and len(last) < COALESCE_BYTES
        ):
            last += data
        else:
            self._inbox.append(bytearray(data))

    def on_eof(self, message: TunnelEof) -> None:
        """The peer closed its direction."""
        if self.peer_ended or message.value != self.received:
            raise RecordError("the peer's tunnel ends twice or at the wrong place")
        self.peer_ended = True

    def on_credit(self, message: TunnelCredit) -> None:
        """The peer says what it has got and taken."""
        if not self.delivered <= message.received <= self.sent - self._outbox_bytes:
            raise RecordError("the peer acknowledges tunnel bytes that were not sent")
        if not self._peer_consumed <= message.consumed <= message.received:
            raise RecordError("the peer gives credit for tunnel bytes that were not sent")
        self._has_arrived(message.received)
        self._peer_consumed = message.consumed

    def resume(self, received: int, ended: bool) -> None:
        """A new link: the peer has got so many bytes, and the end of them if `ended`; it gets the
        others again."""
        if not self.delivered <= received <= self.sent - self._outbox_bytes:
            raise RecordError("the peer resumes behind tunnel bytes that it does not have")
        if ended and (self._eof_unsent or not self.ended or received != self.sent):
            raise RecordError("the peer resumes behind the end of a tunnel that has not ended")
        self._has_arrived(received)
        self._outbox.extendleft(reversed(self._kept))
        if received != (self._outbox[0][0].value if self._outbox else self.sent):
            raise RecordError("the peer resumes within a message of the tunnel")
        self._outbox_bytes += sum(len(data) for _, data in self._kept)
        self._kept.clear()
        self._eof_unsent = self.ended and not ended
        self._told = TunnelCredit(0, 0)

    def _has_arrived(self, received: int) -> None:
        self.delivered = received
        while self._kept and self._kept[0][0].value < received:
            self._kept.popleft()

    def owes_credit(self) -> bool:
        """Whether the peer has to hear what arrived or was taken."""
        unsaid = self._consumed - self._told.consumed
        return self.received != self._told.received or unsaid >= TUNNEL_WINDOW_BYTES // 4

    def next_credit(self) -> bytes | None:
        """The credit message to send now, if one is due."""
        if not self.owes_credit():
            return None
        self._told = TunnelCredit(self.received, self._consumed)
        return self._told.pack()

    def next_message(self) -> tuple[bytes, memoryview | None] | None:
        """The next head and data for the wire, if there is one; it must then be sent."""
        if self._outbox:
            head, data = self._outbox.popleft()
            self._outbox_bytes -= len(data)
            self._kept.append((head, data))
            return head.pack(), data
        if self._eof_unsent:
            self._eof_unsent = False
            return TunnelEof(self.sent).pack(), None
        return None

    @property
    def idle(self) -> bool:
        """Whether the peer's transport has everything that was queued."""
        return not self._outbox and not self._eof_unsent and self.delivered == self.sent


class Conversation:
    """Both channels of a session and the liveness of the peer, the same for both roles."""

    def __init__(
        self,
        *,
        now: float,
        peer_timeout_s: float,
        pings: bool,
        chunk_bytes: int = MAX_TUNNEL_CHUNK_BYTES,
    ) -> None:
        """`now`: monotonic seconds, as everywhere below. `pings`: it is this side that asks."""
        self.records = RecordChannel()
        self.tunnel = TunnelChannel(chunk_bytes)
        self.peer_pages: int | None = None
        """Pages that the receiver has attached."""
        self.round_trip_ns = 0
        """Of the last ping; 0 before the first answer."""
        self.peer_timeout_s = peer_timeout_s
        """Silence after which the peer counts as lost."""
        self._ping_every_s = GREETING_PING_S
        self._next_ping = now if pings else None
        self._heard = now
        self._looked = now
        self._urgent: deque[bytes] = deque()
        self._attached: int | None = None
        """Pages that this side has attached."""
        self._heard_pages = False
        """Whether the receiver has told its pages on this link."""

    def ping_for(self, peer_timeout_s: float) -> None:
        """Ping as often as this side's timeout and the peer's ask for."""
        self._ping_every_s = min(self.peer_timeout_s, peer_timeout_s) / PINGS_PER_TIMEOUT

    def attach(self, n_pages: int) -> None:
        """Tell the peer that memory of this size is attached."""
        self._attached = n_pages
        self._urgent.append(Attached(n_pages).pack())

    def hold(self, window_ms: int) -> None:
        """Tell the receiver how long a lost link is to be waited for."""
        self._urgent.append(Hold(window_ms).pack())

    @property
    def position(self) -> Position:
        """What this side has got."""
        return Position(self.records.received, self.tunnel.received, self.tunnel.peer_ended)

    def resume(self, theirs: Position, now: float) -> None:
        """A new link, to a peer that has got `theirs`: what that lacks goes again."""
        self.records.resume(theirs.records)
        self.tunnel.resume(theirs.tunnel, theirs.tunnel_ended)
        self._urgent.clear()
        self._heard_pages = False
        if self._attached is not None:
            self._urgent.append(Attached(self._attached).pack())
        self._heard = now
        if self._next_ping is not None:
            self._next_ping = now

    def on_control(self, message: ControlMessage, now: float) -> None:
        """A message of the control lane arrived. BYE and HOLD, which are the session's, are not for
        here."""
        self._heard = now
        match message:
            case RecordMessage():
                self.records.on_record(message)
            case RecordCredit():
                self.records.on_credit(message)
            case Ping():
                # Answers that the peer does not read must not pile up here.
                if len(self._urgent) < 2 * PINGS_PER_TIMEOUT:
                    self._urgent.append(Pong(message.value).pack())
            case Pong():
                self.round_trip_ns = max(0, int(now * 1e9) - message.value)
            case Attached():
                other = self.peer_pages not in (None, message.value)
                if other or self._heard_pages or self._next_ping is None:
                    raise RecordError("the peer attaches memory twice, or is not the receiver")
                self._heard_pages = True
                self.peer_pages = message.value

    def on_tunnel(
        self, message: TunnelHead | TunnelEof | TunnelCredit, data: bytes | None, now: float
    ) -> None:
        """A message of the tunnel lane arrived, with its second part if it had one."""
        self._heard = now
        if isinstance(message, TunnelHead) != (data is not None):
            raise RecordError("a tunnel message has the wrong number of parts")
        match message:
            case TunnelHead():
                self.tunnel.on_data(message, data or b"")
            case TunnelEof():
                self.tunnel.on_eof(message)
            case TunnelCredit():
                self.tunnel.on_credit(message)

    def heard(self, now: float) -> None:
        """The peer has shown by something else that it is there."""
        self._heard = now

    def next_control(self, now: float) -> bytes | None:
        """The next message for the control lane, if there is one; it must then be sent."""
        if self._next_ping is not None and now >= self._next_ping:
            self._next_ping = now + self._ping_every_s
            return Ping(int(now * 1e9)).pack()
        if self._urgent:
            return self._urgent.popleft()
        return self.records.next_message()

    def deadline(self) -> float:
        """When to call `silent` and `next_control` again if nothing arrives before; the former
        several times in `LISTENING_S`."""
        lost = self._heard + self.peer_timeout_s
        return lost if self._next_ping is None else min(lost, self._next_ping)

    def silent(self, now: float) -> bool:
        """Whether the peer has said nothing for too long while this side listened.

        A process that was stopped, or found no processor, has not yet read what the peer said
        meanwhile: that may well be why it leaves.
        """
        if now - self._looked > LISTENING_S:
            self._heard = min(now, self._heard + now - self._looked)
        self._looked = now
        return now - self._heard > self.peer_timeout_s

    @property
    def flushed(self) -> bool:
        """Whether the peer's transport has everything that was queued."""
        return self.records.delivered == self.records.sent and self.tunnel.idle


def _cost(payload: bytes) -> int:
    return len(payload) + RECORD_COST_BYTES
