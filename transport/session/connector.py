"""The sender's thread for the control and tunnel lanes: connecting, greeting, both channels.

Owns these two sockets and the deadlines of the greeting. Does not own the data lanes (`lanes`) nor
the rules of the channels (`channels`). It pings by itself, whatever trio is doing.

    CALLING ── first answer ──► ANSWERED ── HELLO_REPLY accepted ──► ACCEPTED
       │  connect_timeout_s         │  greeting_timeout_s, silence        │  silence, disconnect
       ▼                            ▼                                     ▼
    PeerUnreachable          PeerLost, PeerRefused, VersionMismatch    PeerLost, PeerClosed

Until the first answer a connection that fails is tried again; from then on libzmq's own
reconnecting must not hide a loss, so every end of a connection ends the session.
"""

from __future__ import annotations

import time
from enum import Enum

import zmq

from transport.session.link import Closing, LinkThread, Shared
from transport.session.pacing import SharedBucket
from transport.session.polling import BATCH_MESSAGES, BLOCKED_S, FAREWELL_MS, wait
from transport.session.sockets import connect, open_dealer, receive
from transport.session.watch import WATCH_S, ConnectionEvent, Watch
from transport.wire.errors import (
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    RecordError,
    TransportError,
)
from transport.wire.records import (
    CONTROL_LANE,
    TUNNEL_LANE,
    Bye,
    Hello,
    HelloReply,
    MessageType,
    Verdict,
    message_type,
    routing_id,
    unpack_control,
    unpack_tunnel,
)


class Stage(Enum):
    """How far the greeting is."""

    CALLING = 1
    ANSWERED = 2
    ACCEPTED = 3


class Connector(LinkThread):
    """See the module. `reply` and `stage` may be read under the shared lock."""

    def __init__(
        self,
        shared: Shared,
        context: zmq.Context[zmq.Socket[bytes]],
        url: str,
        hello: Hello,
        bucket: SharedBucket,
        *,
        connect_timeout_s: float,
        greeting_timeout_s: float,
        secret: bytes | None,
    ) -> None:
        super().__init__("ferry-control", shared)
        self.reply: HelloReply | None = None
        self.stage = Stage.CALLING
        self._url = url
        self._hello = hello
        self._bucket = bucket
        self._connect_timeout_s = connect_timeout_s
        self._greeting_timeout_s = greeting_timeout_s
        self._deadline = time.monotonic() + connect_timeout_s
        self._greeted = False
        self._unsuited = False
        """Whether somebody was there, and did not agree on how to talk."""
        self._tunnel_ready = False
        self._unsent_control: bytes | None = None
        self._unsent_tunnel: tuple[bytes, memoryview | None] | None = None
        self._unsent_credit: bytes | None = None
        self._tunnel_due: float | None = None
        self._control = open_dealer(context, routing_id(CONTROL_LANE, hello.session), secret)
        self._tunnel = open_dealer(context, routing_id(TUNNEL_LANE, hello.session), secret)
        self._watches = {
            self._control: Watch(self._control),
            self._tunnel: Watch(self._tunnel),
        }

    def run(self) -> None:
        """Call, greet, then carry both channels until the session is over."""
        linger_ms = 0
        try:
            connect(self._control, self._url)
            linger_ms = self._loop()
        except RecordError as error:
            linger_ms = self._complain(error)
            raise
        finally:
            for zsocket, watch in self._watches.items():
                watch.close()
                zsocket.close(linger=linger_ms)

    def _loop(self) -> int:
        """Returns how long the sockets may linger, in ms."""
        poller = zmq.Poller()
        poller.register(self.shared.wakeup, zmq.POLLIN)
        for zsocket, watch in self._watches.items():
            poller.register(zsocket, zmq.POLLIN)
            poller.register(watch.monitor, zmq.POLLIN)
        while not self.shared.over:
            now = time.monotonic()
            again = min(self._check_deadlines(now), self._send(now), now + WATCH_S)
            if self.shared.closing is Closing.DRAIN and self._drained(now):
                return max(1, int((self.shared.drain_until - now) * 1000))
            ready = wait(poller, again)
            if self.shared.wakeup.fileno() in ready:
                self.shared.wakeup.clear()
            self._watch()
            self._receive()
        failure = self.shared.failure
        return 0 if failure is None or isinstance(failure, PeerLost) else self._complain(failure)

    def _check_deadlines(self, now: float) -> float:
        """Raise what is due; returns when to look again."""
        with self.shared.lock:
            again = self.shared.check_suspicion(now)
            if self.stage is Stage.CALLING:
                if now >= self._deadline:
                    raise self._unreachable()
                return min(again, self._deadline)
            self.shared.talk.check_alive(now)
            if self.stage is Stage.ANSWERED and now >= self._deadline:
                raise PeerLost(
                    f"the receiver neither accepted nor refused in {self._greeting_timeout_s:g} s"
                )
            if self.stage is Stage.ACCEPTED and not self._tunnel_ready and now >= self._deadline:
                raise PeerLost("the receiver accepts no further connections")
            return min(again, self.shared.talk.deadline())

    def _unreachable(self) -> PeerUnreachable:
        if self._greeted:
            return PeerUnreachable(
                f"something listens at {self._url}, but does not answer as a receiver"
            )
        if self._unsuited:
            return PeerUnreachable(
                f"something listens at {self._url}, but no connection comes about: it is no "
                "receiver, or the two sides have not got the same secret"
            )
        return PeerUnreachable(f"nobody answers at {self._url}; is the receiver running there?")

    def _watch(self) -> None:
        for zsocket, watch in self._watches.items():
            watch.enforce()
            for event, _fd in watch.events():
                if event is ConnectionEvent.READY and zsocket is self._tunnel:
                    self._tunnel_ready = True
                elif event is ConnectionEvent.READY and self.stage is Stage.CALLING:
                    # Also if it has greeted: what was sent to a connection that ended may be lost.
                    self._control.send(self._hello.pack(), zmq.NOBLOCK)
                    self._greeted = True
                elif event is ConnectionEvent.UNSUITED:
                    self._unsuited = True
                elif event is ConnectionEvent.GONE and self.stage is not Stage.CALLING:
                    self.shared.suspect(PeerLost("the connection to the receiver has ended"))

    def _send(self, now: float) -> float:
        """Send what may go; returns when to try again."""
        if not self._greeted:
            return float("inf")
        again = self._send_control(now)
        if self.stage is Stage.ACCEPTED:
            again = min(again, self._send_tunnel(now))
        return again

    def _send_control(self, now: float) -> float:
        while True:
            if self._unsent_control is None:
                with self.shared.lock:
                    self._unsent_control = self.shared.talk.next_control(now)
            if self._unsent_control is None:
                return float("inf")
            if not _try_send(self._control, self._unsent_control):
                return now + BLOCKED_S
            self._unsent_control = None

    def _send_tunnel(self, now: float) -> float:
        while True:
            with self.shared.lock:
                tunnel = self.shared.talk.tunnel
                self._unsent_credit = self._unsent_credit or tunnel.next_credit()
                self._unsent_tunnel = self._unsent_tunnel or tunnel.next_message()
            if self._unsent_credit is not None:
                if not _try_send(self._tunnel, self._unsent_credit):
                    return now + BLOCKED_S
                self._unsent_credit = None
            if self._unsent_tunnel is None:
                return float("inf")
            head, data = self._unsent_tunnel
            if self._tunnel_due is None:
                self._tunnel_due = self._bucket.reserve(len(head) + len(data or b""))
            if self._tunnel_due > time.monotonic():
                return self._tunnel_due
            if not _try_send(self._tunnel, head, data):
                return now + BLOCKED_S
            self._unsent_tunnel = self._tunnel_due = None

    def _receive(self) -> None:
        """Take what has arrived; changes of the session wake the trio side."""
        arrived = False
        for zsocket, watch in self._watches.items():
            for _ in range(BATCH_MESSAGES):
                parts = receive(zsocket)
                if parts is None:
                    break
                watch.given(parts)
                arrived = True
                if zsocket is self._control:
                    self._on_control(parts)
                else:
                    self._on_tunnel(parts)
        if arrived:
            self.shared.changed.notify()

    def _on_control(self, parts: list[zmq.Frame]) -> None:
        if len(parts) != 1:
            raise RecordError(f"a control message of {len(parts)} parts")
        now = time.monotonic()
        message = parts[0].buffer
        with self.shared.lock:
            if self.stage is Stage.CALLING:
                self.stage = Stage.ANSWERED
                self._deadline = now + self._greeting_timeout_s
            if message_type(message) == MessageType.HELLO_REPLY:
                self._on_reply(HelloReply.unpack(message), now)
            else:
                self.shared.talk.on_control(unpack_control(message), now)

    def _on_reply(self, reply: HelloReply, now: float) -> None:
        if self.stage is not Stage.ANSWERED:
            raise RecordError("the receiver answers the greeting twice")
        match reply.verdict:
            case Verdict.ACCEPTED:
                self.stage = Stage.ACCEPTED
                self.reply = reply
                self.shared.established = True
                self.shared.talk.ping_for(reply.peer_timeout_ms / 1000)
                self.shared.talk.heard(now)
                self._deadline = now + self._connect_timeout_s
                connect(self._tunnel, self._url)
            case Verdict.BUSY:
                raise PeerUnreachable(f"the receiver at {self._url} is busy with another session")
            case _:
                raise PeerRefused(reply.payload)

    def _on_tunnel(self, parts: list[zmq.Frame]) -> None:
        if not 1 <= len(parts) <= 2:
            raise RecordError(f"a tunnel message of {len(parts)} parts")
        data = parts[1].bytes if len(parts) == 2 else None
        message = unpack_tunnel(parts[0].buffer)
        with self.shared.lock:
            self.shared.talk.on_tunnel(message, data, time.monotonic())

    def _drained(self, now: float) -> bool:
        """Whether everything arrived, or time is up; then says goodbye."""
        with self.shared.lock:
            if not self.shared.talk.flushed and now < self.shared.drain_until:
                return False
        _try_send(self._control, Bye("").pack())
        return True

    def _complain(self, error: TransportError) -> int:
        """Tell the peer why this side leaves; returns how long that may take, in ms."""
        _try_send(self._control, Bye(str(error)).pack())
        return FAREWELL_MS


def _try_send(zsocket: zmq.Socket[bytes], head: bytes, data: memoryview | None = None) -> bool:
    """False: the connection's queue is full. The data part is not copied."""
    try:
        if data is None:
            zsocket.send(head, zmq.NOBLOCK)
        else:
            zsocket.send_multipart((head, data), zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return False
    return True
