"""The receiver's thread, and its one bound ROUTER for every connection of a session.

Owns the endpoint, what the table of `greeting` means for it, and who is heard: messages go to the
channels or to a data lane by their routing id, and whatever belongs to no session of ours is
dropped and counted. Lanes answer through it, too. Whatever a member of the session does wrong ends
the session with an error that names it, and with a BYE that tells the peer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import zmq

from transport.receiving.apply import ApplyLane
from transport.session.channels import Conversation
from transport.session.control_thread import ControlThread, only_part
from transport.session.greeting import RECEIVER, Action, Event, Greeting, State
from transport.session.link import Shared
from transport.session.polling import BLOCKED_S
from transport.session.secret import Secret
from transport.session.sockets import bind, open_router
from transport.session.watch import ConnectionEvent, Watch
from transport.wire.errors import FrameError, RecordError, VersionMismatch
from transport.wire.records import (
    CONTROL_LANE,
    FIRST_DATA_LANE,
    FORGOTTEN,
    LANE_WELCOME,
    TUNNEL_LANE,
    HelloReply,
    Hold,
    LaneHello,
    MessageType,
    Resumption,
    SessionHello,
    Verdict,
    message_type,
    resume_key,
    routing_id,
    split_routing_id,
)


class _Caller(NamedTuple):
    """Who greets: the routing id, the greeting unless it is unreadable, and the descriptor."""

    identity: bytes
    hello: SessionHello | None
    fd: int


class _Resumer(NamedTuple):
    """The session's sender on a new link: what it said, and the descriptor."""

    resume: Resumption
    fd: int


class Router(ControlThread):
    """See the module. `hello` may be read under the shared lock."""

    def __init__(
        self,
        shared: Shared,
        context: zmq.Context[zmq.Socket[bytes]],
        url: str,
        *,
        peer_timeout_s: float,
        window_frames: int,
        resume_window_s: float,
        secret: Secret | None,
    ) -> None:
        """Binds. With a `secret`, there has to be a `Gatekeeper`. Raises EndpointError."""
        self._socket = open_router(context, secret)
        self._timeouts_s = {State.LOST: 0.0}
        greeting = Greeting(RECEIVER, State.LISTENING, self._timeouts_s, time.monotonic())
        super().__init__("ferry-router", shared, greeting, (self._socket,))
        self.hello: SessionHello | None = None
        self.dropped = 0
        """Messages that belong to no session of ours."""
        self._peer_timeout_s = peer_timeout_s
        self._window_frames = window_frames
        self._resume_ms = int(resume_window_s * 1000)
        self._answer: HelloReply | None = None
        """The user's answer to the greeting, until it has been sent."""
        self._resumed: bytes | None = None
        """What a new link begins with, until it has been sent."""
        self._session = b""
        self._control_fd = -1
        self._lane_fds: dict[int, int] = {}
        """Of the lanes that said hello, by the first byte of their routing ids."""
        self._lanes: list[ApplyLane] = []
        self._announced = False
        self._hellos: dict[int, int] = {}
        """The lanes that are not welcome yet, by the first byte of their routing ids, with the
        number of their first frame."""
        self._lane_answers: deque[tuple[int, int, bytes]] = deque()
        """What data lanes have to answer, each with the numbers of the lane and the link."""
        try:
            self._bound = bind(self._socket, url)
        except BaseException:
            super()._close(0)
            raise

    @property
    def url(self) -> str:
        """The URL that is bound, a wildcard port filled in."""
        return self._bound.url

    def answer(self, verdict: Verdict, payload: bytes) -> None:
        """Accept or refuse the greeting. Under the shared lock; RuntimeError: there is none."""
        event = Event.ACCEPT if verdict is Verdict.ACCEPTED else Event.REFUSE
        if Action.SEND_ANSWER in self._greeting.handle(event, time.monotonic()):
            self._answer = self._reply(verdict, payload)

    def attach(self, lanes: list[ApplyLane]) -> None:
        """Take these data lanes, which have been started. Under the shared lock."""
        self._lanes = lanes

    def send_answer(self, lane: int, link: int, answer: bytes) -> None:
        """Answer a message that came from a data lane on this link. From any thread."""
        self._lane_answers.append((lane, link, answer))
        self.shared.wakeup.set()

    def _close(self, linger_ms: int) -> None:
        super()._close(linger_ms)
        self._bound.remove()

    def _on_connection(self, zsocket: zmq.Socket[bytes], event: ConnectionEvent, fd: int) -> None:
        if event is not ConnectionEvent.GONE:
            return
        if fd == self._control_fd:
            self._control_fd = -1
            self._handle(Event.CONNECTION_LOST, "the connection to the sender has ended")
        elif fd in self._lane_fds.values() and self._greeting.allows(Event.LANE_LOST):
            if self._greeting.state is State.HELD:
                self._lane_fds = {lane: each for lane, each in self._lane_fds.items() if each != fd}
            self._handle(Event.LANE_LOST, "a lane's connection to the sender has ended")

    def _perform(self, action: Action, detail: Any) -> None:
        match action:
            case Action.TELL_HELLO:
                self._take(detail)
            case Action.TELL_OPEN:
                with self.shared.lock:
                    self.shared.established = True
                self.shared.changed.notify()
            case Action.FORGET:
                # A pong for this sender must not reach the next one.
                self._unsent_control = None
                self._session, self._control_fd = b"", -1
                with self.shared.lock:
                    self.hello = None
                self.shared.changed.notify()
            case Action.WELCOME_LANE:
                self._on_lane_hello(*detail)
            case Action.TAKE_OVER:
                self._take_over(detail)
            case Action.ANSWER_FORGOTTEN:
                self.dropped += 1
                self._send_to(detail, FORGOTTEN)
            case Action.ANSWER_BUSY:
                self._turn_away(detail, Verdict.BUSY)
            case Action.ANSWER_OTHER_VERSION:
                self._turn_away(detail, Verdict.OTHER_VERSION)
            case _:
                raise AssertionError(action)

    def _take(self, caller: _Caller) -> None:
        assert caller.hello is not None
        (watch,) = self._watches.values()
        watch.vouch(caller.fd)
        watch.expect(caller.hello.frame_bytes)
        self._session, self._control_fd = caller.hello.session, caller.fd
        with self.shared.lock:
            self.hello = caller.hello
            self.shared.talk = Conversation(
                now=time.monotonic(), peer_timeout_s=self._peer_timeout_s, pings=False
            )
        self.shared.changed.notify()

    def _drop_link(self) -> None:
        (watch,) = self._watches.values()
        watch.drop_vouched()
        self._control_fd = -1
        self._lane_fds.clear()
        self._hellos.clear()
        self._resumed = None

    def _take_over(self, resumer: _Resumer) -> None:
        (watch,) = self._watches.values()
        watch.vouch(resumer.fd)
        self._control_fd = resumer.fd
        link = resumer.resume.link
        self.shared.begin_link(link)
        with self.shared.lock:
            talk = self.shared.talk
            talk.resume(resumer.resume.position, time.monotonic())
            position = talk.position
        self._resumed = Resumption(MessageType.RESUMED, link, position).pack(self._key)

    @property
    def _key(self) -> bytes:
        assert self.hello is not None
        return resume_key(self.hello.session, self.hello.nonce)

    def _on_lane_hello(self, lane: int, fd: int, sequence: int) -> None:
        assert self.hello is not None
        if lane != TUNNEL_LANE and not 0 <= lane - FIRST_DATA_LANE < self.hello.lanes:
            raise FrameError(f"lane {lane - FIRST_DATA_LANE} of {self.hello.lanes} says hello")
        if self._lane_fds.setdefault(lane, fd) != fd:
            # What was said to the connection before may be lost.
            self._handle(Event.CONNECTION_LOST, "a lane's connection to the sender has ended")
        self._hellos[lane] = sequence

    def _welcome_lanes(self) -> None:
        """Those that have nothing left of the links before: an older frame never comes later."""
        for number, sequence in list(self._hellos.items()):
            lane = number - FIRST_DATA_LANE
            if 0 <= lane < len(self._lanes):
                if not self._lanes[lane].idle:
                    continue
                self._lanes[lane].begin(sequence)
            elif sequence:
                raise FrameError(f"lane {lane} begins at frame {sequence} without memory for it")
            del self._hellos[number]
            self._try_send(number, LANE_WELCOME)

    def _turn_away(self, caller: _Caller, verdict: Verdict) -> None:
        self.dropped += 1
        self._send_to(caller.identity, self._reply(verdict).pack())

    def _reply(self, verdict: Verdict, payload: bytes = b"") -> HelloReply:
        timeout_ms = int(self._peer_timeout_s * 1000)
        return HelloReply(verdict, self._window_frames, timeout_ms, self._resume_ms, payload)

    # sending

    def _send(self, now: float) -> float:
        if self._answer is not None:
            if not self._try_send(CONTROL_LANE, self._answer.pack()):
                return now + BLOCKED_S
            self._answer = None
            self._handle(Event.ANSWERED)
        if self._resumed is not None:
            if not self._try_send(CONTROL_LANE, self._resumed):
                return now + BLOCKED_S
            self._resumed = None
        self._send_lane_answers()
        self._welcome_lanes()
        self._announce_memory()
        return super()._send(now)

    def _send_lane_answers(self) -> None:
        while self._lane_answers:
            lane, link, answer = self._lane_answers.popleft()
            if link != self.shared.link_no:
                continue  # the sender has given up waiting for it
            # The window is below the high-water mark. A connection that is gone ends the link.
            error = self._send_to(routing_id(FIRST_DATA_LANE + lane, self._session, link), answer)
            if error == zmq.EAGAIN:
                raise FrameError(f"the peer does not take the answers of lane {lane}")

    def _announce_memory(self) -> None:
        if self._announced:
            return
        with self.shared.lock:
            if self._lanes and all(lane.prepared for lane in self._lanes):
                self._announced = True
                self.shared.talk.attach(self._lanes[0].n_pages)

    def _try_send(self, lane: int, head: bytes, data: memoryview | None = None) -> bool:
        if lane == TUNNEL_LANE and lane not in self._lane_fds:
            return False
        identity = routing_id(lane, self._session, self.shared.link_no)
        return self._send_to(identity, head, data) == 0

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

    def _on_message(self, zsocket: zmq.Socket[bytes], watch: Watch, parts: list[zmq.Frame]) -> None:
        identity, parts = parts[0].bytes, parts[1:]
        fd = watch.given(parts)
        try:
            lane, session, link = split_routing_id(identity)
        except RecordError:
            self.dropped += 1
            return
        if session != self._session:
            self._on_stranger(identity, parts, fd)
        elif link != self.shared.link_no or self._greeting.state is State.LOST:
            self._on_other_link(identity, parts, fd)
        elif lane == CONTROL_LANE:
            if not self._is_torn(self._control_fd, fd):
                self._on_member(parts)
        else:
            watch.vouch(fd)
            if len(parts) == 1 and message_type(parts[0].buffer) == MessageType.LANE_HELLO:
                sequence = LaneHello.unpack(parts[0].buffer).value
                self._handle(Event.LANE_HELLO, (lane, fd, sequence))
            elif self._is_torn(self._lane_fds.get(lane, -1), fd):
                return
            elif lane == TUNNEL_LANE:
                self._on_tunnel(parts)
            else:
                self._on_data(lane - FIRST_DATA_LANE, parts)

    def _is_torn(self, known_fd: int, fd: int) -> bool:
        """Whether a message may lack what came before it: it is not from the connection that its
        lane began the link with. Where the link is not made anew, every message counts."""
        torn = self._greeting.state is State.HELD and fd != known_fd
        self.dropped += torn
        return torn

    def _on_stranger(self, identity: bytes, parts: Sequence[zmq.Frame], fd: int) -> None:
        lane, session, link = split_routing_id(identity)
        try:
            message = only_part(parts, "a greeting").buffer
            if lane != CONTROL_LANE:
                raise RecordError("no identity of a sender")
            if link and message_type(message) == MessageType.RESUME:
                self._handle(Event.RESUME_OF_OTHER, identity)
                return
            hello = SessionHello.unpack(message)
            if hello.session != session:
                raise RecordError("a greeting of another session")
        except VersionMismatch:
            self._handle(Event.HELLO_OF_OTHER_VERSION, _Caller(identity, None, fd))
        except RecordError:
            self.dropped += 1
        else:
            self._handle(Event.HELLO, _Caller(identity, hello, fd))

    def _on_other_link(self, identity: bytes, parts: Sequence[zmq.Frame], fd: int) -> None:
        """Who belongs to the session begins a new link; what is left of older ones, and whoever
        only knows the session's name, is dropped."""
        lane, _, link = split_routing_id(identity)
        try:
            message = only_part(parts, "what begins a link").buffer
            if lane != CONTROL_LANE or link <= self.shared.link_no:
                raise RecordError("no new link")
            resume = Resumption.unpack(message, MessageType.RESUME, self._key)
            if resume.link != link:
                raise RecordError("another link than it comes on")
        except (RecordError, VersionMismatch):
            self.dropped += 1
        else:
            self._handle(Event.RESUME, _Resumer(resume, fd))

    def _on_hold(self, message: Hold) -> None:
        if message.value > self._resume_ms:
            raise RecordError(f"a lost link would have to be waited for {message.value} ms")
        self._timeouts_s[State.LOST] = message.value / 1000
        self._handle(Event.TOLD_HOLD if message.value else Event.TOLD_RELEASE)

    def _on_member(self, parts: Sequence[zmq.Frame]) -> None:
        message = only_part(parts, "a control message").buffer
        if (
            message_type(message) == MessageType.HELLO
            and SessionHello.unpack(message) == self.hello
        ):
            self.dropped += 1
            self._handle(Event.HELLO_AGAIN)
        else:
            self._on_control(message)

    def _on_data(self, lane: int, parts: Sequence[zmq.Frame]) -> None:
        self._handle(Event.LANE)
        if not self._announced:
            raise FrameError("frames arrive before there is memory for them")
        if not 0 <= lane < len(self._lanes):
            raise FrameError(f"a frame on lane {lane} of {len(self._lanes)}")
        if len(parts) != 1:
            raise FrameError(f"a frame of {len(parts)} parts")
        self._lanes[lane].submit(parts[0], self.shared.link_no)
        with self.shared.lock:
            self.shared.talk.heard(time.monotonic())
