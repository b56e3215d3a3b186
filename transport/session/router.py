"""The receiver's thread, and its one bound ROUTER for every connection of a session.

Owns the endpoint, the greeting as the receiver sees it, and who is heard: messages go to the
channels or to a data lane by their routing id, and whatever belongs to no session of ours is
dropped and counted. Lanes answer through it, too.

    LISTENING ── valid HELLO ──► GREETED ── accept ──► ACCEPTED
        ▲                           │
        └────────── refuse ─────────┘

From GREETED on other greetings are answered BUSY. Whatever a member of the session does wrong ends
the session with an error that names it, and with a BYE that tells the peer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from enum import Enum

import zmq

from transport.receiving.apply import ApplyLane
from transport.session.channels import Conversation
from transport.session.link import Closing, LinkThread, Shared
from transport.session.polling import BATCH_MESSAGES, BLOCKED_S, FAREWELL_MS, wait
from transport.session.sockets import bind, open_router, receive
from transport.session.watch import WATCH_S, ConnectionEvent, Watch
from transport.wire.errors import FrameError, PeerLost, RecordError, VersionMismatch
from transport.wire.records import (
    CONTROL_LANE,
    FIRST_DATA_LANE,
    SESSION_BYTES,
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

    LISTENING = 1
    GREETED = 2
    ACCEPTED = 3


class Router(LinkThread):
    """See the module. `hello` and `stage` may be read under the shared lock."""

    def __init__(
        self,
        shared: Shared,
        context: zmq.Context[zmq.Socket[bytes]],
        url: str,
        *,
        peer_timeout_s: float,
        window_frames: int,
        secret: bytes | None,
    ) -> None:
        """Binds. With a `secret`, there has to be a `Gatekeeper`. Raises EndpointError."""
        super().__init__("ferry-router", shared)
        self.hello: Hello | None = None
        self.stage = Stage.LISTENING
        self.dropped = 0
        """Messages that belong to no session of ours."""
        self._peer_timeout_s = peer_timeout_s
        self._window_frames = window_frames
        self._verdict: HelloReply | None = None
        self._session = b""
        self._control_fd = -1
        self._lanes: list[ApplyLane] = []
        self._announced = False
        self._unsent_control: bytes | None = None
        self._unsent_tunnel: tuple[bytes, memoryview | None] | None = None
        self._unsent_credit: bytes | None = None
        self._answers: deque[tuple[int, bytes]] = deque()
        """Of data lanes, by their numbers."""
        self._socket = open_router(context, secret)
        self._watch = Watch(self._socket)
        try:
            self._bound = bind(self._socket, url)
        except BaseException:
            self._watch.close()
            self._socket.close(linger=0)
            raise

    @property
    def url(self) -> str:
        """The endpoint as bound."""
        return self._bound.url

    def answer(self, verdict: Verdict, payload: bytes) -> None:
        """Accept or refuse the greeting. Under the shared lock; RuntimeError: there is none."""
        if self.stage is not Stage.GREETED or self._verdict is not None:
            raise RuntimeError("there is no greeting to answer")
        self._verdict = self._reply(verdict, payload)

    def attach(self, lanes: list[ApplyLane]) -> None:
        """Take these data lanes, which have been started. Under the shared lock."""
        self._lanes = lanes

    def send_answer(self, lane: int, answer: bytes) -> None:
        """Answer a message of a data lane. From any thread."""
        self._answers.append((lane, answer))
        self.shared.wakeup.set()

    def run(self) -> None:
        """Hear and answer until the session is over."""
        linger_ms = 0
        try:
            linger_ms = self._loop()
        except (FrameError, RecordError) as error:
            self._say_goodbye(str(error))
            linger_ms = FAREWELL_MS
            raise
        finally:
            self._watch.close()
            self._socket.close(linger=linger_ms)
            self._bound.remove()

    def _loop(self) -> int:
        """Returns how long the socket may linger, in ms."""
        poller = zmq.Poller()
        poller.register(self.shared.wakeup, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._watch.monitor, zmq.POLLIN)
        while not self.shared.over:
            now = time.monotonic()
            again = min(self._check_deadlines(now), self._send(now), now + WATCH_S)
            if self.shared.closing is Closing.DRAIN and self._drained(now):
                return max(1, int((self.shared.drain_until - now) * 1000))
            self._watch.enforce()
            ready = wait(poller, again)
            if self.shared.wakeup.fileno() in ready:
                self.shared.wakeup.clear()
            if self._watch.monitor in ready:
                self._look_at_connections()
            if self._socket in ready:
                self._receive()
        if self.shared.failure is not None and not isinstance(self.shared.failure, PeerLost):
            self._say_goodbye(str(self.shared.failure))
            return FAREWELL_MS
        return 0

    def _check_deadlines(self, now: float) -> float:
        """Raise what is due; returns when to look again."""
        with self.shared.lock:
            if self.stage is Stage.LISTENING:
                return float("inf")
            self.shared.talk.check_alive(now)
            return min(self.shared.check_suspicion(now), self.shared.talk.deadline())

    def _look_at_connections(self) -> None:
        for event, fd in self._watch.events():
            if event is ConnectionEvent.GONE and fd == self._control_fd:
                self._control_fd = -1
                self.shared.suspect(PeerLost("the connection to the sender has ended"))

    # sending

    def _send(self, now: float) -> float:
        """Send what may go; returns when to try again."""
        if self.stage is Stage.LISTENING:
            return float("inf")
        self._send_answers()
        if self._verdict is not None:
            return now if self._send_verdict(self._verdict) else now + BLOCKED_S
        sent = self._send_control(now) and self._send_tunnel()
        return float("inf") if sent else now + BLOCKED_S

    def _send_answers(self) -> None:
        while self._answers:
            lane, answer = self._answers.popleft()
            # The window is below the high-water mark. A connection that is gone ends the session.
            if self._send_to(routing_id(FIRST_DATA_LANE + lane, self._session), answer) == (
                zmq.EAGAIN
            ):
                raise FrameError(f"the peer does not take the answers of lane {lane}")

    def _send_verdict(self, verdict: HelloReply) -> bool:
        if not self._try_send(CONTROL_LANE, verdict.pack()):
            return False
        with self.shared.lock:
            self._verdict = None
            if verdict.verdict is Verdict.ACCEPTED:
                self.stage = Stage.ACCEPTED
                self.shared.established = True
            else:
                self.stage = Stage.LISTENING
                self.hello = None
                self._session, self._control_fd = b"", -1
                # A pong for this sender must not reach the next one.
                self._unsent_control = None
        self.shared.changed.notify()
        return True

    def _send_control(self, now: float) -> bool:
        """False, as from the others: a queue of libzmq's is full."""
        while True:
            if self._unsent_control is None:
                with self.shared.lock:
                    self._announce_memory()
                    self._unsent_control = self.shared.talk.next_control(now)
            if self._unsent_control is None:
                return True
            if not self._try_send(CONTROL_LANE, self._unsent_control):
                return False
            self._unsent_control = None

    def _announce_memory(self) -> None:
        if self._lanes and not self._announced and all(lane.prepared for lane in self._lanes):
            self._announced = True
            self.shared.talk.attach(self._lanes[0].n_pages)

    def _send_tunnel(self) -> bool:
        while True:
            with self.shared.lock:
                tunnel = self.shared.talk.tunnel
                self._unsent_credit = self._unsent_credit or tunnel.next_credit()
                self._unsent_tunnel = self._unsent_tunnel or tunnel.next_message()
            if self._unsent_credit is not None:
                if not self._try_send(TUNNEL_LANE, self._unsent_credit):
                    return False
                self._unsent_credit = None
            if self._unsent_tunnel is None:
                return True
            if not self._try_send(TUNNEL_LANE, *self._unsent_tunnel):
                return False
            self._unsent_tunnel = None

    def _try_send(self, lane: int, head: bytes, data: memoryview | None = None) -> bool:
        """False: the connection's queue is full, or the connection not there (yet)."""
        return self._send_to(routing_id(lane, self._session), head, data) == 0

    def _send_to(self, identity: bytes, head: bytes, data: memoryview | None = None) -> int:
        """0, or why nothing was sent: zmq.EAGAIN (the connection's queue is full),
        zmq.EHOSTUNREACH (there is no such connection)."""
        parts = (identity, head) if data is None else (identity, head, data)
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=data is None)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return error.errno
        return 0

    # receiving

    def _receive(self) -> None:
        """Hand on what has arrived; changes of the session wake the trio side."""
        for _ in range(BATCH_MESSAGES):
            message = receive(self._socket)
            if message is None:
                return
            identity, *parts = message
            fd = self._watch.given(parts)
            self._on_message(identity.bytes, parts, fd)

    def _on_message(self, identity: bytes, parts: Sequence[zmq.Frame], fd: int) -> None:
        lane, session = identity[0], identity[1:]
        if session != self._session or not session:
            self._on_stranger(identity, parts, fd)
        elif lane == CONTROL_LANE:
            self._on_control(parts)
        elif self.stage is not Stage.ACCEPTED:
            raise RecordError("the sender does not wait for the answer to its greeting")
        elif lane == TUNNEL_LANE:
            self._watch.vouch(fd)
            self._on_tunnel(parts)
        else:
            self._watch.vouch(fd)
            self._on_data(lane - FIRST_DATA_LANE, parts)

    def _on_stranger(self, identity: bytes, parts: Sequence[zmq.Frame], fd: int) -> None:
        session = identity[1:]
        if identity != routing_id(CONTROL_LANE, session) or len(session) != SESSION_BYTES:
            self.dropped += 1
            return
        try:
            if len(parts) != 1 or message_type(parts[0].buffer) != MessageType.HELLO:
                raise RecordError("no greeting")
            hello = Hello.unpack(parts[0].buffer)
            if hello.session != session:
                raise RecordError("a greeting of another session")
        except VersionMismatch:
            self.dropped += 1
            self._send_to(identity, self._reply(Verdict.OTHER_VERSION).pack())
            return
        except RecordError:
            self.dropped += 1
            return
        if self.stage is not Stage.LISTENING or self.shared.closing is not Closing.NO:
            self.dropped += 1
            self._send_to(identity, self._reply(Verdict.BUSY).pack())
            return
        self._watch.vouch(fd)
        self._watch.expect(hello.frame_bytes)
        with self.shared.lock:
            self.hello = hello
            self.stage = Stage.GREETED
            self.shared.talk = Conversation(
                now=time.monotonic(), peer_timeout_s=self._peer_timeout_s, pings=False
            )
        self._session, self._control_fd = session, fd
        self.shared.changed.notify()

    def _on_control(self, parts: Sequence[zmq.Frame]) -> None:
        if len(parts) != 1:
            raise RecordError(f"a control message of {len(parts)} parts")
        if self._is_the_greeting(parts[0].buffer):
            self.dropped += 1
            return
        message = unpack_control(parts[0].buffer)
        with self.shared.lock:
            self.shared.talk.on_control(message, time.monotonic())
        self.shared.changed.notify()

    def _is_the_greeting(self, message: memoryview) -> bool:
        """A sender whose connection ended while it greeted does not know whether libzmq still has
        its greeting for the next one, and greets again."""
        return message_type(message) == MessageType.HELLO and Hello.unpack(message) == self.hello

    def _on_tunnel(self, parts: Sequence[zmq.Frame]) -> None:
        if not 1 <= len(parts) <= 2:
            raise RecordError(f"a tunnel message of {len(parts)} parts")
        data = parts[1].bytes if len(parts) == 2 else None
        message = unpack_tunnel(parts[0].buffer)
        with self.shared.lock:
            self.shared.talk.on_tunnel(message, data, time.monotonic())
        self.shared.changed.notify()

    def _on_data(self, lane: int, parts: Sequence[zmq.Frame]) -> None:
        if not self._announced:
            raise FrameError("frames arrive before there is memory for them")
        if not 0 <= lane < len(self._lanes):
            raise FrameError(f"a frame on lane {lane} of {len(self._lanes)}")
        if len(parts) != 1:
            raise FrameError(f"a frame of {len(parts)} parts")
        self._lanes[lane].submit(parts[0])
        with self.shared.lock:
            self.shared.talk.heard(time.monotonic())

    # ending

    def _reply(self, verdict: Verdict, payload: bytes = b"") -> HelloReply:
        return HelloReply(verdict, self._window_frames, int(self._peer_timeout_s * 1000), payload)

    def _drained(self, now: float) -> bool:
        """Whether everything arrived, or time is up; then says goodbye."""
        with self.shared.lock:
            waiting = self._verdict is not None or not self.shared.talk.flushed
            if waiting and now < self.shared.drain_until:
                return False
        self._say_goodbye("")
        return True

    def _say_goodbye(self, reason: str) -> None:
        if self.stage is Stage.ACCEPTED:
            self._try_send(CONTROL_LANE, Bye(reason).pack())
