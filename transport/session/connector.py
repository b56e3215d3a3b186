"""The sender's thread for the control and tunnel lanes.

Owns these two sockets and what the table of `greeting` means for them. Does not own the data lanes
(`lanes`). Until somebody answers, a connection that fails is tried again; from then on libzmq's own
reconnecting must not hide a loss, so every end of a connection ends the session; that of the tunnel
from LANE_WELCOME on.
"""

from __future__ import annotations

import time
from typing import Any

import zmq

from transport.session.control_thread import ControlThread, is_lane_word, only_part
from transport.session.greeting import SENDER, Action, Event, Greeting, State
from transport.session.link import Shared
from transport.session.pacing import SharedBucket
from transport.session.secret import Secret
from transport.session.sockets import connect, open_dealer
from transport.session.watch import ConnectionEvent, Watch
from transport.wire.errors import PeerLost, PeerRefused, PeerUnreachable
from transport.wire.records import (
    CONTROL_LANE,
    LANE_HELLO,
    LANE_WELCOME,
    TUNNEL_LANE,
    HelloReply,
    MessageType,
    SessionHello,
    Verdict,
    message_type,
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
        secret: Secret | None,
    ) -> None:
        self._control = open_dealer(context, routing_id(CONTROL_LANE, hello.session), secret)
        self._tunnel = open_dealer(context, routing_id(TUNNEL_LANE, hello.session), secret)
        timeouts_s = {
            State.CALLING: connect_timeout_s,
            State.HEARD: greeting_timeout_s,
            State.OPENING: connect_timeout_s,
        }
        greeting = Greeting(SENDER, State.CALLING, timeouts_s, time.monotonic())
        super().__init__("ferry-control", shared, greeting, (self._control, self._tunnel))
        self.reply: HelloReply | None = None
        self._url = url
        self._hello = hello
        self._bucket = bucket
        self._greeting_timeout_s = greeting_timeout_s

    def _begin(self) -> None:
        connect(self._control, self._url)

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
                self._tunnel.send(LANE_HELLO, zmq.NOBLOCK)
            case Action.OPEN_TUNNEL:
                connect(self._tunnel, self._url)
            case Action.TELL_OPEN:
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

    def _reserve(self, n_bytes: int) -> float:
        return self._bucket.reserve(n_bytes)

    def _try_send(self, lane: int, head: bytes, data: memoryview | None = None) -> bool:
        """The data part is not copied."""
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
            if is_lane_word(LANE_WELCOME, parts):
                self._handle(Event.TUNNEL_WELCOME)
            else:
                self._on_tunnel(parts)
            return
        message = only_part(parts, "a control message").buffer
        if message_type(message) == MessageType.HELLO_REPLY:
            reply = HelloReply.unpack(message)
            self._handle(_VERDICTS[reply.verdict], reply)
        else:
            self._on_control(message)
