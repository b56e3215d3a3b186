"""The sender's data lanes: one thread and one connection each, kept busy with tasks.

Owns a lane's socket, its window and its part in the bandwidth limit. What is sent is a `Task`'s
business: a share of a round (`rounds`) or of a comparison (`compare`). The receiver answers every
message of a lane, in order, so an answer is for the oldest message under way::

    task makes a message ──► held ── bucket allows ──► under way ── answer ──► task is told

When the link is lost, whatever is under way is lost with it: its task is told, and makes its work
again on the next link.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from transport.session.channels import LISTENING_S
from transport.session.link import LinkThread, Shared
from transport.session.pacing import SharedBucket
from transport.session.polling import wait
from transport.session.secret import Secret
from transport.session.sockets import Wakeup, connect, open_dealer, receive
from transport.session.watch import WATCH_S, ConnectionEvent, Watch
from transport.wire.errors import PeerLost, RecordError
from transport.wire.records import (
    FIRST_DATA_LANE,
    LaneAnswer,
    LaneHello,
    MessageType,
    message_type,
    routing_id,
    unpack_answer,
)


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """One message of a lane."""

    data: bytes | int
    """What to send: bytes of its own, or so many bytes of the buffer offered."""
    context: Any
    """For the task, which gets it back with the answer."""

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self.data if isinstance(self.data, int) else len(self.data)


class Task(ABC):
    """Work for one lane. All methods but `cancel` are called by the lane's thread."""

    def __init__(self) -> None:
        self.waited_for: list[None] = [None]
        """An entry for each task that no lane has put away yet of those that are waited for
        together, which share this list; `performed` is set when it is empty."""
        self._under_way = 0
        self._cancelled = False

    def cancel(self) -> None:
        """Produce no more; what is under way is still answered. From any thread."""
        self._cancelled = True

    @property
    def ready(self) -> bool:
        """Whether `produce` has something to do now, without a further answer."""
        return not self._cancelled and self._has_more()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do and nothing under way."""
        return not self._under_way and not self.ready

    def produce(self, buffer: npt.NDArray[np.uint8]) -> Outgoing | None:
        """Do a piece of work: a message, or None if it came to none. Only if `ready`.

        `buffer` (uint8, frame_bytes) may be used for the message, and not after this call.
        """
        outgoing = self._produce(buffer)
        self._under_way += outgoing is not None
        return outgoing

    def on_answer(self, context: Any, answer: LaneAnswer) -> None:
        """The receiver answered. RecordError: that is no answer to the message."""
        self._on_answer(context, answer)
        self._under_way -= 1

    def lose(self, context: Any) -> None:
        """The link is lost, and with it the answer to this message; called for the oldest one
        first. Its work is to be done again."""
        self._lose(context)
        self._under_way -= 1

    def after_answer(self, now: float) -> None:  # noqa: B027 -- most have nothing to do
        """Called after each `on_answer`, when whoever waits for it has been told."""

    @abstractmethod
    def _has_more(self) -> bool: ...

    @abstractmethod
    def _produce(self, buffer: npt.NDArray[np.uint8]) -> Outgoing | None: ...

    @abstractmethod
    def _on_answer(self, context: Any, answer: LaneAnswer) -> None: ...

    @abstractmethod
    def _lose(self, context: Any) -> None: ...


@dataclass(slots=True, eq=False)
class _UnderWay:
    task: Task
    outgoing: Outgoing
    due: float


@dataclass(slots=True)
class LaneCounters:
    """Of one lane; written by its thread, read by anybody."""

    messages: int = 0
    bytes: int = 0
    lost: int = 0
    """Messages that were under way when their link was lost: what was in them is sent again."""


class SendLane(LinkThread):
    """Sends what its tasks produce, one task after the other, a window at a time."""

    def __init__(
        self,
        shared: Shared,
        context: zmq.Context[zmq.Socket[bytes]],
        url: str,
        session: bytes,
        lane: int,
        prepare: Callable[[], None],
        idle: Callable[[], None],
        next_sequence: Callable[[], int],
        bucket: SharedBucket,
        *,
        window_frames: int,
        frame_bytes: int,
        progress_timeout_s: float,
        performed: Wakeup,
        secret: Secret | None,
    ) -> None:
        """`prepare` is called by the lane's thread before its first task: loads what takes long;
        `idle` when it has had nothing to do for a while: has to be short. `next_sequence` is the
        number of the next frame. `performed` is set when tasks that are waited for together have
        been put away."""
        super().__init__(f"ferry-lane-{lane}", shared)
        self.counters = LaneCounters()
        self._url = url
        self._context = context
        self._session = session
        self._lane = lane
        self._secret = secret
        self._prepare = prepare
        self._idle = idle
        self._next_sequence = next_sequence
        self._bucket = bucket
        self._window_frames = window_frames
        self._progress_timeout_s = progress_timeout_s
        self._performed = performed
        self._progress_by = float("inf")
        self._wakeup = shared.new_wakeup()
        self._tasks: deque[Task] = deque()
        self._held: _UnderWay | None = None
        self._under_way: deque[_UnderWay] = deque()
        self._welcome = False
        """Whether the receiver knows that the connection is this lane's; nothing is sent before."""
        self._torn = False
        """Whether that connection has ended: what another one brings may lack what was before."""
        self._buffer = np.empty(frame_bytes, np.uint8)
        """What the next message is made in, or the held one is."""
        self._link: int | None = None
        """The number of the link that the lane is connected on."""
        self._poller = zmq.Poller()
        self._poller.register(self._wakeup, zmq.POLLIN)

    def submit(self, task: Task) -> None:
        """Add a task. From any thread."""
        self._tasks.append(task)
        self._wakeup.set()

    def wake(self) -> None:
        """A task has been cancelled. From any thread."""
        self._wakeup.set()

    def run(self) -> None:
        """Work on tasks until the session is over."""
        try:
            self._follow_link()
            self._prepare()
            self._loop()
        finally:
            self._disconnect()

    def _follow_link(self) -> None:
        """Leave a link that is lost, and connect on the present one."""
        with self.shared.lock:
            present = self.shared.link_no if self.shared.joinable else None
        if self._link is not None and self._link != present:
            self._disconnect()
            self._lose_under_way()
        if self._link is None and present is not None:
            self._link = present
            identity = routing_id(FIRST_DATA_LANE + self._lane, self._session, present)
            self._socket = open_dealer(self._context, identity, self._secret)
            self._watch = Watch(self._socket)
            self._poller.register(self._socket, zmq.POLLIN)
            self._poller.register(self._watch.monitor, zmq.POLLIN)
            connect(self._socket, self._url)
            self._progress_by = time.monotonic() + self._progress_timeout_s

    def _disconnect(self) -> None:
        if self._link is not None:
            self._link, self._welcome, self._torn = None, False, False
            self._progress_by = float("inf")
            self._poller.unregister(self._socket)
            self._poller.unregister(self._watch.monitor)
            self._watch.close()
            self._socket.close(linger=0)

    def _lose_under_way(self) -> None:
        self.counters.lost += len(self._under_way)
        if self._held is not None:
            self._under_way.append(self._held)
            self._held = None
        while self._under_way:
            message = self._under_way.popleft()
            message.task.lose(message.outgoing.context)
        self._put_away()

    def _loop(self) -> None:
        looked = time.monotonic()
        self._progress_by = looked + self._progress_timeout_s
        while not self.shared.over:
            self._follow_link()
            again = self._advance()
            ready = wait(self._poller, min(again, time.monotonic() + WATCH_S, self._progress_by))
            if self._wakeup.fileno() in ready:
                self._wakeup.clear()
            elif not ready and not self._tasks:
                self._idle()
            if self._link is not None:
                self._watch.enforce()
                if self._watch.monitor in ready:
                    self._look_at_connection()
                if self._socket in ready:
                    self._receive()
            now = time.monotonic()
            if now - looked > LISTENING_S:
                # This process was stopped, or found no processor: what the receiver has answered
                # meanwhile may not have been read yet.
                self._progress_by += now - looked
            looked = now
            if now > self._progress_by:
                missing = "applied nothing" if self._welcome else "welcomed no lane"
                self._suspect(f"the receiver has {missing} for {self._progress_timeout_s:g} s")
                self._progress_by = float("inf")

    def _look_at_connection(self) -> None:
        for event, _fd in self._watch.events():
            if event is ConnectionEvent.READY and not self._welcome:
                self._socket.send(LaneHello(self._next_sequence()).pack(), zmq.NOBLOCK)
            # Before, the receiver may have taken it for a stranger's: libzmq makes another one.
            elif event is ConnectionEvent.GONE and self._welcome:
                self._torn = True
                self._suspect("a lane's connection to the receiver has ended")

    def _suspect(self, why: str) -> None:
        assert self._link is not None
        self.shared.suspect(PeerLost(why), self._link)

    def _advance(self) -> float:
        """Produce and send at most one message; returns when to come back (0: at once)."""
        self._put_away()
        if self._held is None:
            if not self._may_produce():
                return float("inf")
            task = self._tasks[0]
            outgoing = task.produce(self._buffer)
            if outgoing is None:
                return 0.0
            due = self._bucket.reserve(outgoing.n_bytes)
            self._held = _UnderWay(task, outgoing, due)
        if self._held.due > time.monotonic():
            return self._held.due
        self._send(self._held)
        self._held = None
        return 0.0 if self._may_produce() else float("inf")

    def _put_away(self) -> None:
        """The tasks that are finished."""
        while self._tasks and self._tasks[0].finished:
            waited_for = self._tasks.popleft().waited_for
            waited_for.pop()
            if not waited_for:
                self._performed.set()

    def _may_produce(self) -> bool:
        room = len(self._under_way) < self._window_frames
        return (
            self._welcome and not self._torn and room and bool(self._tasks) and self._tasks[0].ready
        )

    def _send(self, message: _UnderWay) -> None:
        # The window is far below the high-water mark, so there is always room in libzmq's queue.
        data = message.outgoing.data
        if isinstance(data, int):
            self._socket.send(self._buffer[:data].data, zmq.NOBLOCK, copy=True)
        else:
            self._socket.send(data, zmq.NOBLOCK)
        if not self._under_way:
            self._progress_by = time.monotonic() + self._progress_timeout_s
        self._under_way.append(message)
        self.counters.messages += 1
        self.counters.bytes += message.outgoing.n_bytes

    def _receive(self) -> None:
        while (parts := receive(self._socket)) is not None:
            self._watch.given(parts)
            self._look_at_connection()
            if self._torn:
                continue
            if len(parts) != 1:
                raise RecordError(f"an answer of {len(parts)} parts")
            if message_type(parts[0].buffer) == MessageType.LANE_WELCOME:
                if not self._welcome:
                    self._welcome, self._progress_by = True, float("inf")
                    assert self._link is not None
                    self.shared.join(self._lane, self._link)
                continue
            answer = unpack_answer(parts[0].buffer)
            if not self._under_way:
                raise RecordError("the receiver answers what it was not asked")
            message = self._under_way.popleft()
            message.task.on_answer(message.outgoing.context, answer)
            self._put_away()  # before anything else, for a guest may be paused until it is known
            now = time.monotonic()
            message.task.after_answer(now)
            self._progress_by = now + self._progress_timeout_s if self._under_way else float("inf")
