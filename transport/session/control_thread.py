"""The thread of either role that owns the control and tunnel lanes: its loop, and both channels.

Owns the order of a turn: deadlines, sending, waiting, connections, receiving. What may happen when
is `greeting`'s table, what is said then `channels`'; which sockets there are, and what the actions
of the table mean for them, is `connector`'s (sender) and `router`'s (receiver).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import zmq

from transport.session.greeting import Action, Event, Greeting
from transport.session.link import Closing, LinkThread, Shared
from transport.session.polling import BATCH_MESSAGES, BLOCKED_S, FAREWELL_MS, wait
from transport.session.sockets import receive
from transport.session.watch import WATCH_S, ConnectionEvent, Watch
from transport.wire.errors import FrameError, PeerClosed, PeerLost, RecordError
from transport.wire.records import (
    CONTROL_LANE,
    TUNNEL_LANE,
    Bye,
    Hold,
    Ping,
    Pong,
    unpack_control,
    unpack_tunnel,
)


class ControlThread(LinkThread):
    """See the module. Its pings do not depend on what trio is doing."""

    def __init__(
        self,
        name: str,
        shared: Shared,
        greeting: Greeting,
        sockets: Sequence[zmq.Socket[bytes]],
    ) -> None:
        super().__init__(name, shared)
        self._greeting = greeting
        """For this thread; for others under the shared lock."""
        self._watches = {zsocket: Watch(zsocket) for zsocket in sockets}
        self._unsent_control: bytes | None = None
        self._unsent_tunnel: tuple[bytes, memoryview | None] | None = None
        self._tunnel_due: float | None = None
        """When `_unsent_tunnel` may go, in monotonic seconds."""
        self._unsent_credit: bytes | None = None
        self._poller = zmq.Poller()
        self._poller.register(shared.wakeup, zmq.POLLIN)
        for zsocket in sockets:
            self._poll(zsocket)

    def _poll(self, zsocket: zmq.Socket[bytes]) -> None:
        self._poller.register(zsocket, zmq.POLLIN)
        self._poller.register(self._watches[zsocket].monitor, zmq.POLLIN)

    def _replace(self, sockets: Sequence[zmq.Socket[bytes]]) -> None:
        """Use these sockets instead of the ones before, which are closed: what they still have
        is lost."""
        before = self._watches
        self._watches = {zsocket: Watch(zsocket) for zsocket in sockets}
        for zsocket in sockets:
            self._poll(zsocket)
        for zsocket, watch in before.items():
            self._poller.unregister(zsocket)
            self._poller.unregister(watch.monitor)
            watch.close()
            zsocket.close(linger=0)
        self._drop_unsent()

    def _drop_unsent(self) -> None:
        """What was about to be sent was for a link that is lost."""
        self._unsent_control = self._unsent_tunnel = None
        self._unsent_credit = self._tunnel_due = None

    def run(self) -> None:
        """Greet or be greeted, then carry both channels until the session is over."""
        linger_ms = 0
        try:
            self._begin()
            linger_ms = self._loop()
        except (FrameError, RecordError) as error:
            linger_ms = self._fail(str(error))
            raise
        finally:
            self._close(linger_ms)

    def _begin(self) -> None:
        """The first thing that the thread does."""

    def _close(self, linger_ms: int) -> None:
        for zsocket, watch in self._watches.items():
            watch.close()
            zsocket.close(linger=linger_ms)

    def _loop(self) -> int:
        """Returns how long the sockets may linger, in ms."""
        while not self.shared.over:
            now = time.monotonic()
            again = min(self._check_deadlines(now), self._send(now), now + WATCH_S)
            if self.shared.closing is Closing.DRAIN and self._drained(now):
                self._handle(Event.LEAVE, "")
                return max(1, int((self.shared.drain_until - now) * 1000))
            ready = wait(self._poller, again)
            if self.shared.wakeup.fileno() in ready:
                self.shared.wakeup.clear()
            for zsocket, watch in self._watches.items():
                watch.enforce()
                if watch.monitor in ready:
                    self._look_at_connections(zsocket, watch)
                if zsocket in ready:
                    self._receive(zsocket, watch)
        failure = self.shared.failure
        return 0 if failure is None or isinstance(failure, PeerLost) else self._fail(str(failure))

    def _check_deadlines(self, now: float) -> float:
        """Raise what is due; returns when to look again."""
        with self.shared.lock:
            talk = self.shared.talk
            again, lost = self.shared.check_suspicion(now)
            again = min(again, self._greeting.deadline)
            due = Event.LOSS if lost is not None else None
            if self._greeting.allows(Event.SILENCE):
                again = min(again, talk.deadline())
                if talk.silent(now):
                    due = Event.SILENCE
                    lost = PeerLost(f"the peer has been silent for {talk.peer_timeout_s:g} s")
            if now >= self._greeting.deadline:
                due = Event.TIMEOUT
        if due is None:
            return again
        self._handle(due, lost)
        return now

    def _drained(self, now: float) -> bool:
        """Whether everything arrived, or time is up."""
        if now >= self.shared.drain_until:
            return True
        with self.shared.lock:
            return not self._greeting.allows(Event.ANSWERED) and self.shared.talk.flushed

    def _handle(self, event: Event, detail: Any = None) -> None:
        """Make a transition, and do what it asks for. `detail` is for the actions: the message, or
        why this side leaves."""
        with self.shared.lock:
            actions = self._greeting.handle(event, time.monotonic())
        for action in actions:
            match action:
                case Action.SUSPECT_LOSS:
                    self.shared.suspect(PeerLost(detail), self.shared.link_no)
                case Action.SAY_FAREWELL:
                    self._try_send(CONTROL_LANE, Bye(detail).pack())
                case Action.DROP_LINK:
                    self._drop_unsent()
                    why = str(detail) if isinstance(detail, PeerLost) else "the sender has lost it"
                    self.shared.lose_link(why, time.monotonic())
                    self._drop_link()
                case Action.TELL_RESUMED:
                    self.shared.regain_link()
                case Action.END_LOST:
                    raise detail
                case Action.END_NOT_RESUMED:
                    link = self.shared.link
                    waited_s = time.monotonic() - link.lost_at
                    raise PeerLost(
                        f"{link.lost}, and in {waited_s:.0f} s the link could not be made anew"
                    )
                case Action.END_CLOSED:
                    raise PeerClosed(detail.reason)
                case _:
                    self._perform(action, detail)

    def _drop_link(self) -> None:
        """Heed nothing of the present link any more."""

    @abstractmethod
    def _perform(self, action: Action, detail: Any) -> None:
        """Carry out an action that only one of the roles knows."""

    @abstractmethod
    def _on_connection(
        self, zsocket: zmq.Socket[bytes], event: ConnectionEvent, fd: int
    ) -> None: ...

    def _fail(self, why: str) -> int:
        """Tell the peer why this side leaves; returns how long that may take, in ms."""
        self._handle(Event.FAIL, why)
        return FAREWELL_MS

    # sending

    def _send(self, now: float) -> float:
        """Send what may go; returns when to try again."""
        if not self._greeting.allows(Event.ALIVE):
            return float("inf")
        again = self._send_control(now)
        if self._greeting.allows(Event.LANE):
            again = min(again, self._send_tunnel(now))
        return again

    def _send_control(self, now: float) -> float:
        while True:
            if self._unsent_control is None:
                with self.shared.lock:
                    self._unsent_control = self.shared.talk.next_control(now)
            if self._unsent_control is None:
                return float("inf")
            if not self._try_send(CONTROL_LANE, self._unsent_control):
                return now + BLOCKED_S
            self._unsent_control = None

    def _send_tunnel(self, now: float) -> float:
        while True:
            with self.shared.lock:
                tunnel = self.shared.talk.tunnel
                self._unsent_credit = self._unsent_credit or tunnel.next_credit()
                self._unsent_tunnel = self._unsent_tunnel or tunnel.next_message()
            if self._unsent_credit is not None:
                if not self._try_send(TUNNEL_LANE, self._unsent_credit):
                    return now + BLOCKED_S
                self._unsent_credit = None
            if self._unsent_tunnel is None:
                return float("inf")
            head, data = self._unsent_tunnel
            if self._tunnel_due is None:
                self._tunnel_due = self._reserve(len(head) + len(data or b""))
            if self._tunnel_due > time.monotonic():
                return self._tunnel_due
            if not self._try_send(TUNNEL_LANE, head, data):
                return now + BLOCKED_S
            self._unsent_tunnel = self._tunnel_due = None

    def _reserve(self, n_bytes: int) -> float:
        """When a tunnel message of this length may go; to be asked once for each."""
        return 0.0

    @abstractmethod
    def _try_send(self, lane: int, head: bytes, data: memoryview | None = None) -> bool:
        """False: the connection's queue is full, or the connection not there (yet)."""

    # receiving

    def _receive(self, zsocket: zmq.Socket[bytes], watch: Watch) -> None:
        """Take what has arrived, in a batch, so that answers get their turn."""
        for _ in range(BATCH_MESSAGES):
            parts = receive(zsocket)
            if parts is None:
                return
            self._look_at_connections(zsocket, watch)
            try:
                self._on_message(zsocket, watch, parts)
            except (FrameError, RecordError):
                # libzmq connects anew by itself: what comes then lacks what was lost in between.
                if not self.shared.confirm_suspicion():
                    raise

    def _look_at_connections(self, zsocket: zmq.Socket[bytes], watch: Watch) -> None:
        for event, fd in watch.events():
            self._on_connection(zsocket, event, fd)

    @abstractmethod
    def _on_message(
        self, zsocket: zmq.Socket[bytes], watch: Watch, parts: list[zmq.Frame]
    ) -> None: ...

    def _on_control(self, message: memoryview) -> None:
        """A message of the session's control lane, no part of the greeting."""
        unpacked = unpack_control(message)
        if isinstance(unpacked, Bye):
            self._handle(Event.FAREWELL, unpacked)
            return
        if isinstance(unpacked, Hold):
            self._on_hold(unpacked)
            return
        self._handle(Event.ALIVE if isinstance(unpacked, Ping | Pong) else Event.CHANNEL)
        with self.shared.lock:
            self.shared.talk.on_control(unpacked, time.monotonic())
        self.shared.changed.notify()

    def _on_hold(self, message: Hold) -> None:
        """The peer says what becomes of a lost link."""
        raise RecordError("the receiver says what becomes of a lost link")

    def _on_tunnel(self, parts: Sequence[zmq.Frame]) -> None:
        """A message of the session's tunnel."""
        if not 1 <= len(parts) <= 2:
            raise RecordError(f"a tunnel message of {len(parts)} parts")
        self._handle(Event.LANE)
        data = parts[1].bytes if len(parts) == 2 else None
        message = unpack_tunnel(parts[0].buffer)
        with self.shared.lock:
            self.shared.talk.on_tunnel(message, data, time.monotonic())
        self.shared.changed.notify()


def only_part(parts: Sequence[zmq.Frame], what: str) -> zmq.Frame:
    """The one part of a message. RecordError: it has another number of parts."""
    if len(parts) != 1:
        raise RecordError(f"{what} of {len(parts)} parts")
    return parts[0]


def is_word(word: bytes, parts: Sequence[zmq.Frame]) -> bool:
    """Whether a message is this one, which is short."""
    return len(parts) == 1 and len(parts[0]) == len(word) and parts[0].bytes == word
