"""The sender's thread for the control and tunnel lanes.

Owns these two sockets and what the table of `greeting` means for them. Does not own the data lanes
(`lanes`). Until somebody answers, a connection that fails is tried again; from then on libzmq's own
reconnecting must not hide a loss, so every end of a connection ends the link; that of the tunnel
from LANE_WELCOME on. A link that is made anew has sockets of its own, whose routing ids have its
number: what is left of the ones before cannot be taken for its.
"""

from __future__ import annotations

import time
from typing import Any

import zmq

from transport.session.control_thread import ControlThread, is_word, only_part
from transport.session.greeting import SENDER, Action, Event, Greeting, State
from transport.session.link import Shared
from transport.session.pacing import SharedBucket
from transport.session.secret import Secret
from transport.session.sockets import connect, open_dealer
from transport.session.watch import ConnectionEvent, Watch
from transport.wire.errors import PeerLost, PeerRefused, PeerUnreachable, RecordError
from transport.wire.records import (
    CONTROL_LANE,
    LANE_WELCOME,
    TUNNEL_LANE,
    HelloReply,
    LaneHello,
    MessageType,
    Resumption,
    SessionHello,
    Verdict,
    message_type,
    resume_key,
    routing_id,
)

_VERDICTS = {
    Verdict.ACCEPTED: Event.ACCEPTED,
    Verdict.REFUSED: Event.REFUSED,
    Verdict.OTHER_VERSION: Event.REFUSED,
    Verdict.BUSY: Event.BUSY,
}


class Connector(ControlThread):
    """See the module. `reply` may be read under the shared lock."""

    def __init__(
        self,
        shared: Shared,
        context: zmq.Context[zmq.Socket[bytes]],
        url: str,
        hello: SessionHello,
        bucket: SharedBucket,
        *,
        connect_timeout_s: float,
        greeting_timeout_s: float,
        resume_window_s: float,
        secret: Secret | None,
    ) -> None:
        self._context = context
        self._secret = secret
        self._hello = hello
        self._control, self._tunnel = self._open(0)
        self._timeouts_s = {
            State.CALLING: connect_timeout_s,
            State.HEARD: greeting_timeout_s,
            State.OPENING: connect_timeout_s,
            State.LOST: 0.0,
        }
        greeting = Greeting(SENDER, State.CALLING, self._timeouts_s, time.monotonic())
        super().__init__("ferry-control", shared, greeting, (self._control, self._tunnel))
        self.reply: HelloReply | None = None
        self.n_lanes = 0
        """Data lanes that take part in the session."""
        self._url = url
        self._bucket = bucket
        self._greeting_timeout_s = greeting_timeout_s
        self._resume_window_s = resume_window_s
        self._attempt_s = connect_timeout_s
        self._attempt_until = float("inf")
        """When another attempt to make the link anew is due."""
        self._key = resume_key(hello.session, hello.nonce)
        self._tunnel_is_welcome = False

    def _open(self, link_no: int) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """The sockets of control lane and tunnel for a link."""
        control, tunnel = (
            open_dealer(self._context, routing_id(lane, self._hello.session, link_no), self._secret)
            for lane in (CONTROL_LANE, TUNNEL_LANE)
        )
        return control, tunnel

    def _begin(self) -> None:
        connect(self._control, self._url)

    def _check_deadlines(self, now: float) -> float:
        if now >= self._attempt_until and self._greeting.allows(Event.STALLED):
            self._handle(Event.STALLED)
        with self.shared.lock:
            hold, link_no = self.shared.hold, self.shared.link_no
            whole = self._tunnel_is_welcome and len(self.shared.joined) == self.n_lanes
        if hold is not None:
            event = Event.HOLD if hold and self._timeouts_s[State.LOST] else Event.RELEASE
            if self._greeting.allows(event):
                self.shared.hold = None
                self._handle(event)
        if whole and self._greeting.allows(Event.REJOINED) and link_no == self.shared.link_no:
            self._attempt_until = float("inf")
            self._handle(Event.REJOINED)
        return min(super()._check_deadlines(now), self._attempt_until)

    def _on_connection(self, zsocket: zmq.Socket[bytes], event: ConnectionEvent, fd: int) -> None:
        match event:
            case ConnectionEvent.READY if zsocket is self._tunnel:
                self._handle(Event.TUNNEL_CONNECTED)
            case ConnectionEvent.READY:
                self._handle(Event.CONNECTED)
            case ConnectionEvent.UNSUITED:
                self._handle(Event.UNSUITED)
            case ConnectionEvent.GONE if zsocket is self._tunnel:
                self._handle(Event.TUNNEL_LOST, "the tunnel's connection has ended")
            case ConnectionEvent.GONE:
                self._handle(Event.CONNECTION_LOST, "the connection to the receiver has ended")

    def _perform(self, action: Action, detail: Any) -> None:
        match action:
            case Action.SEND_HELLO:
                self._control.send(self._hello.pack(), zmq.NOBLOCK)
            case Action.SEND_LANE_HELLO:
                self._tunnel.send(LaneHello(0).pack(), zmq.NOBLOCK)
            case Action.OPEN_TUNNEL:
                connect(self._tunnel, self._url)
            case Action.SAY_HOLD:
                with self.shared.lock:
                    self.shared.talk.hold(int(self._timeouts_s[State.LOST] * 1000))
            case Action.SAY_RELEASE:
                with self.shared.lock:
                    self.shared.talk.hold(0)
            case Action.CALL_AGAIN:
                self._call_again()
            case Action.SEND_RESUME:
                with self.shared.lock:
                    position = self.shared.talk.position
                resume = Resumption(MessageType.RESUME, self.shared.link_no, position)
                self._control.send(resume.pack(self._key), zmq.NOBLOCK)
            case Action.REJOIN:
                with self.shared.lock:
                    self.shared.talk.resume(detail.position, time.monotonic())
                connect(self._tunnel, self._url)
                self.shared.let_join()
            case Action.END_FORGOTTEN:
                raise PeerLost(
                    f"{self.shared.link.lost}, and the receiver at {self._url} does not know this "
                    "session: it was started anew, or has given up; what it had is lost"
                )
            case Action.TELL_OPEN:
                window_s = min(self._resume_window_s, detail.resume_ms / 1000)
                self._timeouts_s[State.LOST] = window_s
                with self.shared.lock:
                    self.reply = detail
                    self.shared.established = True
                    self.shared.talk.ping_for(detail.peer_timeout_ms / 1000)
                    self.shared.talk.heard(time.monotonic())
                self.shared.changed.notify()
            case Action.END_NOBODY:
                raise PeerUnreachable(
                    f"nobody answers at {self._url}; is the receiver running there?"
                )
            case Action.END_UNSUITED:
                raise PeerUnreachable(
                    f"something listens at {self._url}, but no connection comes about: it is no "
                    "receiver, or the two sides have not got the same secret, or do not know each "
                    "other's keys"
                )
            case Action.END_MUTE:
                raise PeerUnreachable(
                    f"something listens at {self._url}, but does not answer as a receiver"
                )
            case Action.END_BUSY:
                raise PeerUnreachable(f"the receiver at {self._url} is busy with another session")
            case Action.END_REFUSED:
                raise PeerRefused(detail.payload)
            case Action.END_UNDECIDED:
                raise PeerLost(
                    f"the receiver neither accepted nor refused in {self._greeting_timeout_s:g} s"
                )
            case Action.END_SHUT_OUT:
                raise PeerLost("the receiver accepts no further connections")
            case _:
                raise AssertionError(action)

    def _call_again(self) -> None:
        link_no = self.shared.link_no + 1
        control, tunnel = self._open(link_no)
        self._replace((control, tunnel))
        self._control, self._tunnel = control, tunnel
        self._tunnel_is_welcome = False
        self.shared.begin_link(link_no)
        self._attempt_until = time.monotonic() + self._attempt_s
        connect(control, self._url)

    def _reserve(self, n_bytes: int) -> float:
        return self._bucket.reserve(n_bytes)

    def _try_send(self, lane: int, head: bytes, data: memoryview | None = None) -> bool:
        """The data part is not copied."""
        if lane == TUNNEL_LANE and not self._tunnel_is_welcome:
            return False
        zsocket = self._control if lane == CONTROL_LANE else self._tunnel
        try:
            if data is None:
                zsocket.send(head, zmq.NOBLOCK)
            else:
                zsocket.send_multipart((head, data), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def _on_message(self, zsocket: zmq.Socket[bytes], watch: Watch, parts: list[zmq.Frame]) -> None:
        watch.given(parts)
        if zsocket is self._tunnel:
            if is_word(LANE_WELCOME, parts):
                self._tunnel_is_welcome = True
                self._handle(Event.TUNNEL_WELCOME)
            else:
                self._on_tunnel(parts)
            return
        message = only_part(parts, "a control message").buffer
        match message_type(message):
            case MessageType.HELLO_REPLY:
                reply = HelloReply.unpack(message)
                self._handle(_VERDICTS[reply.verdict], reply)
            case MessageType.RESUMED:
                resumed = Resumption.unpack(message, MessageType.RESUMED, self._key)
                if resumed.link != self.shared.link_no:
                    raise RecordError("the receiver resumes another link")
                self._handle(Event.RESUMED, resumed)
            case MessageType.FORGOTTEN:
                self._handle(Event.FORGOTTEN)
            case _:
                self._on_control(message)
