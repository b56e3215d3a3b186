"""Where the trio side of a session meets its threads: ordered records and the tunnel, for trio.

Owns the lock, the wake-ups in both directions, the session's first error, and the methods that both
roles share. The rules behind them are in `channels`; the threads are `connector` (sender),
`router` (receiver) and `lanes`.

libzmq's descriptor is edge-triggered, so trio waits on none of it: each socket lives in a thread
that polls, and the two sides share a `Conversation` under a lock that is held for the time of a few
assignments (lanes have ways of their own, see `sender` and `apply`)::

    trio task ── lock, queue, wakeup.set() ──►  thread: poll, send
    trio task ◄── changed.notify() ─ lock, arrived ──  thread: receive
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import trio
import zmq

from transport.session.channels import Conversation, Record, RecordChannel
from transport.session.sockets import Wakeup
from transport.wire.errors import LinkFailed, PeerLost, TransportError
from transport.wire.extents import Extent, check_extents
from transport.wire.frames import PAGE_BYTES
from transport.wire.records import MAX_RESUME_MS

LOOK_S = 0.5
"""How often `wait_ended` looks."""
GRACE_S = 0.05
"""From a connection's end to PeerLost: what the peer said last may still be in libzmq's queues of
another connection."""

_T = TypeVar("_T")


class Closing(Enum):
    """Whether the session is being closed from this side."""

    NO = 0
    DRAIN = 1
    """Deliver what was queued, for a bounded time."""
    DROP = 2
    """Drop what was queued and end at once."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """Whether a session has a link at the moment."""

    lost: str = ""
    """Why it has none; empty while it has one."""
    lost_at: float = 0.0
    """When it was lost last; monotonic seconds."""
    resumed: int = 0
    """How often it was made anew."""


class Signal:
    """Wakes all trio tasks that wait for something to change; `notify` is for any thread."""

    def __init__(self) -> None:
        """To be made within the trio run whose tasks it wakes."""
        self._token = trio.lowlevel.current_trio_token()
        self._event = trio.Event()

    def notify(self) -> None:
        """Wake everybody who waits. Nothing happens once trio has ended."""
        try:
            self._token.run_sync_soon(self._fire, idempotent=True)
        except trio.RunFinishedError:
            return

    async def wait(self) -> None:
        """Wait for the next `notify`. Look at what may have changed right before, without await."""
        await self._event.wait()

    def _fire(self) -> None:
        event, self._event = self._event, trio.Event()
        event.set()


class Shared:
    """What the trio side and the threads of a session have in common."""

    def __init__(self, talk: Conversation, linger_s: float) -> None:
        self.lock = threading.Lock()
        """Held around every use of what follows, never across a wait."""
        self.talk = talk
        self.established = False
        """Whether the greeting is done."""
        self.closing = Closing.NO
        self.drain_until = 0.0
        self.failure: TransportError | None = None
        """The first error of the session; final."""
        self.link = LinkState()
        self.link_no = 0
        """The number of the present link."""
        self.joinable = True
        """Whether the data lanes may connect on the present link."""
        self.joined: set[int] = set()
        """The data lanes that are welcome on the present link."""
        self.hold: bool | None = None
        """What the user wants of a lost link, until the control thread has heeded it: that it is
        made anew, or that it ends the session."""
        self.changed = Signal()
        self.wakeup = Wakeup()
        """Of the thread that owns the control and tunnel sockets."""
        self._linger_s = linger_s
        self._suspicion: tuple[float, PeerLost] | None = None
        self._wakeups = [self.wakeup]

    def new_wakeup(self) -> Wakeup:
        """A wake-up for one more thread; set by `fail` and closed by `close`."""
        wakeup = Wakeup()
        self._wakeups.append(wakeup)
        return wakeup

    def fail(self, error: BaseException) -> None:
        """Record the session's error, unless it has one. Anything unforeseen becomes LinkFailed."""
        if not isinstance(error, TransportError):
            failed = LinkFailed(f"a thread of the link failed: {error!r}")
            failed.__cause__ = error
            error = failed
        with self.lock:
            self.failure = self.failure or error
        self.wake_all()

    def suspect(self, error: PeerLost, link_no: int) -> None:
        """A connection of this link ended: it is lost soon, unless what is still queued says
        more."""
        with self.lock:
            if link_no == self.link_no:
                self._suspicion = self._suspicion or (time.monotonic() + GRACE_S, error)
        self.wakeup.set()

    def confirm_suspicion(self) -> bool:
        """Nothing that is still queued says more: returns whether a loss is suspected."""
        with self.lock:
            if self._suspicion is not None:
                self._suspicion = (0.0, self._suspicion[1])
            return self._suspicion is not None

    def check_suspicion(self, now: float) -> tuple[float, PeerLost | None]:
        """When to look again, and the suspected loss, once, as soon as its grace is over."""
        if self._suspicion is None:
            return float("inf"), None
        when, error = self._suspicion
        if now < when:
            return when, None
        self._suspicion = None
        return when, error

    def lose_link(self, why: str, now: float) -> None:
        """The link is lost, and to be made anew."""
        with self.lock:
            self.link = replace(self.link, lost=why, lost_at=now)
            self.joinable = False
            self._suspicion = None
        self.wake_all()

    def begin_link(self, link_no: int) -> None:
        """What happened on links before this one counts no more."""
        with self.lock:
            self.link_no = link_no
            self.joined = set()
            self.joinable = False
            self._suspicion = None
        self.wake_all()

    def let_join(self) -> None:
        """The data lanes may connect on the present link."""
        with self.lock:
            self.joinable = True
        self.wake_all()

    def join(self, lane: int, link_no: int) -> None:
        """A data lane is welcome on this link."""
        with self.lock:
            if link_no == self.link_no:
                self.joined.add(lane)
        self.wakeup.set()

    def regain_link(self) -> None:
        """The session goes on, on the present link."""
        with self.lock:
            self.link = replace(self.link, lost="", resumed=self.link.resumed + 1)
        self.wake_all()

    def start_closing(self, how: Closing) -> None:
        """Close; from DRAIN to DROP is possible, the other way is not."""
        with self.lock:
            if how is Closing.DRAIN and self.closing is Closing.NO:
                self.drain_until = time.monotonic() + self._linger_s
            if how.value > self.closing.value:
                self.closing = how
        self.wake_all()

    @property
    def over(self) -> bool:
        """Whether threads have to end now."""
        return self.failure is not None or self.closing is Closing.DROP

    def wake_all(self) -> None:
        """Let every thread and task look at what has changed."""
        for wakeup in self._wakeups:
            wakeup.set()
        self.changed.notify()

    def close(self) -> None:
        """Give the descriptors back; every thread of the session must have ended."""
        for wakeup in self._wakeups:
            wakeup.close()


class SessionEnd(ABC):
    """What `Sender` and `Receiver` have in common. Every method may be cancelled.

    Every method raises the link's first error once there is one: `PeerLost` (`PeerClosed` if the
    peer said goodbye), `RecordError`, `FrameError`, `LinkFailed`. Records and tunnel bytes that
    arrived before the error are handed out first.
    """

    def __init__(self, shared: Shared, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._shared = shared
        self._context = context

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The life of the session's threads. For `open_sender` and `open_receiver`.

        A block that ends normally delivers what was queued, within `linger_s`; one that raises or
        is cancelled does not. In either case no thread is left, so memory may be unmapped.
        """
        try:
            yield
            self._shared.start_closing(Closing.DRAIN)
            while not self._threads()[0].ended:
                await self._shared.changed.wait()
        finally:
            self._shared.start_closing(Closing.DROP)
            self._leave()
            with trio.CancelScope(shield=True):
                # A limiter of its own: nobody else's threads can keep this one waiting.
                await trio.to_thread.run_sync(self._end, limiter=trio.CapacityLimiter(1))

    def _end(self) -> None:
        for thread in self._threads():
            thread.join()
        self._context.destroy(linger=0)
        self._shared.close()

    def _leave(self) -> None:  # noqa: B027 -- only the sender waits for one
        """Have tasks wait no longer for descriptors that are about to be given back."""

    @abstractmethod
    def _threads(self) -> list[LinkThread]:
        """Those of the session; the one that owns the control lane first."""

    @property
    def link(self) -> LinkState:
        """Whether there is a link at the moment."""
        return self._shared.link

    async def wait_link(self, known: LinkState) -> LinkState:
        """Wait until `link` is another one than `known`, and return it."""
        return await self._when(
            lambda: None if self._shared.link == known else self._shared.link, look_first=True
        )

    async def send_record(self, kind: int, payload: bytes, *, flush: bool = False) -> None:
        """Send a record; waits only while the peer's window is full.

        With `flush`, returns when the peer's transport has the record in its process (not yet:
        when its application has taken it). An error raised instead, or a cancellation, leaves
        open whether it arrived; without `flush` nothing is known after return either, until
        an answer of the peer's application or `flush`.

        Records arrive exactly once, in order; tasks that send at the same time do so in some order.
        ValueError: `kind` or the length of `payload` is out of range.
        """
        RecordChannel.check(kind, payload)

        def queue() -> int | None:
            records = self._shared.talk.records
            return records.sent if records.try_queue(kind, payload) else None

        mine = await self._when(queue)
        self._shared.wakeup.set()
        if flush:
            records = self._shared.talk.records
            await self._when(lambda: records.delivered >= mine or None, look_first=True)

    async def wait_ended(self) -> NoReturn:
        """Raises what ends the session, soon after it has ended, whatever has not been read yet."""
        while True:
            await self._when(lambda: None, change=partial(trio.sleep, LOOK_S))

    async def receive_record(self) -> Record:
        """The next record of the peer. Cancelled, it takes no record away."""

        def take() -> Record | None:
            record = self._shared.talk.records.take()
            if record is not None and self._shared.talk.records.owes_credit():
                self._shared.wakeup.set()
            return record

        return await self._when(take, look_first=True)

    async def tunnel_send(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes of the VMM's stream; returns when all are queued within the peer's window.

        `bytes` are not copied. Cancelled: an unknown prefix of `data` has been queued.
        ValueError: this direction has been closed.
        """
        view = memoryview(data if isinstance(data, bytes) else bytes(data))

        def queue() -> int | None:
            if self._shared.talk.tunnel.ended:
                raise ValueError("this direction of the tunnel has been closed")
            return self._shared.talk.tunnel.try_queue(view) or None

        while view:
            view = view[await self._when(queue) :]
            self._shared.wakeup.set()

    async def tunnel_send_eof(self) -> None:
        """Close this direction of the tunnel; the other one stays open."""

        def end() -> bool:
            self._shared.talk.tunnel.end()
            return True

        await self._when(end)
        self._shared.wakeup.set()

    async def tunnel_receive(self, max_bytes: int = 1 << 20) -> bytes:
        """The next bytes of the tunnel, at least one; b"" once the peer has closed its side."""

        def take() -> bytes | None:
            chunk = self._shared.talk.tunnel.take(max_bytes)
            if chunk and self._shared.talk.tunnel.owes_credit():
                self._shared.wakeup.set()
            return chunk

        return await self._when(take, look_first=True)

    async def _when(
        self,
        attempt: Callable[[], _T | None],
        *,
        look_first: bool = False,
        greeting: bool = False,
        change: Callable[[], Awaitable[None]] | None = None,
    ) -> _T:
        """What `attempt`, called under the lock, returns as soon as that is not None.

        `change` waits until it may have changed, or the session has; without one, for any change.

        The session's error ends the wait; with `look_first` only if `attempt` has nothing: what was
        reached or had arrived before the error counts.
        RuntimeError unless there is a session, or `greeting` says that it is just being made.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        shared = self._shared
        waited = False
        while True:
            if shared.closing is not Closing.NO:  # which only trio's side sets
                # Who is cancelled as the link closes may have been woken for another reason.
                await trio.lowlevel.checkpoint_if_cancelled()
                raise trio.ClosedResourceError("the link has been closed")
            with shared.lock:
                if not greeting and not shared.established and shared.failure is None:
                    raise RuntimeError("there is no session yet")
                result = attempt() if look_first or shared.failure is None else None
                failure = shared.failure
            # Only now: a round waits for its lanes, which would wait for this turn of the loop.
            if (result is not None or failure is not None) and not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
            if result is not None:
                return result
            if failure is not None:
                raise failure
            await (shared.changed.wait if change is None else change)()
            waited = True


def check_memory(memory: npt.NDArray[np.uint8], files: Sequence[Extent]) -> None:
    """Raise ValueError unless `memory` is uint8[n_pages * 4096], contiguous and aligned, and
    `files` say where its pages lie."""
    if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
        raise ValueError("guest memory is a contiguous 1-D array of uint8")
    if memory.size == 0 or memory.size % PAGE_BYTES or memory.ctypes.data % 8:
        raise ValueError(f"guest memory is whole pages of {PAGE_BYTES} bytes, 8-byte aligned")
    check_extents(files, memory.size // PAGE_BYTES)


def check_resume_window(seconds: float) -> None:
    """Raise ValueError for a window that no lost link can be given."""
    if not 0 <= seconds * 1000 <= MAX_RESUME_MS:
        raise ValueError(f"{seconds} s to make a lost link anew; 0 to an hour are possible")


class LinkThread(ABC):
    """A thread of a session. Whatever ends it unforeseen becomes the session's error."""

    def __init__(self, name: str, shared: Shared) -> None:
        self.shared = shared
        # A daemon, so that a process that is told to go never waits for its peer.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.ended = False
        """Whether its work is over; `Shared.changed` is notified then."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Bring about the end, as far as `Shared.start_closing` has not, and wait for it."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:  # noqa: B027 -- most threads watch `Shared`
        """Wake the thread if it does not watch a wake-up of `Shared`."""

    @abstractmethod
    def run(self) -> None:
        """The thread's work; returns when the session is over."""

    def _main(self) -> None:
        try:
            self.run()
        # A thread has nobody above it: what it does not hand over here is lost.
        except BaseException as error:
            self.shared.fail(error)
        finally:
            self.ended = True
            self.shared.changed.notify()
