"""The target's end of a session, for trio: one bound endpoint, greeting, pages applied.

Owns the options and the start and end of a session's threads. The threads are `router` and
`apply`; records and the tunnel are `link`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import trio
import zmq

from transport.receiving.apply import ApplyLane
from transport.session.channels import Conversation
from transport.session.gatekeeper import Gatekeeper
from transport.session.link import (
    LinkThread,
    SessionEnd,
    Shared,
    check_memory,
    check_resume_window,
)
from transport.session.message_memory import keep_message_memory
from transport.session.router import Router
from transport.session.secret import Secret, check_secret
from transport.session.sockets import check_url, listening_url, new_context
from transport.wire.records import (
    MAX_RECORD_BYTES,
    MAX_WINDOW_FRAMES,
    MIN_PEER_TIMEOUT_MS,
    SessionHello,
    Verdict,
    session_seed,
)

if TYPE_CHECKING:
    from transport.wire.extents import Extent

MAX_PEER_TIMEOUT_MS = 3_600_000
"""An hour: longer than anybody waits for a migration to notice its end."""


@dataclass(frozen=True, slots=True)
class ReceiverOptions:
    """How a receiver behaves."""

    peer_timeout_s: float = 5.0
    """Silence after which the sender counts as lost, 0.5 s to 1 h; it pings accordingly."""
    resume_window_s: float = 60.0
    """How long a lost link of a session that its sender holds is waited for at most, up to an hour;
    0: not at all."""
    linger_s: float = 2.0
    """How long `aclose` waits for records that are on their way."""
    window_frames: int = 4
    """Frames that a lane may have under way; bounds memory: lanes * window * frame_bytes."""
    secret: Secret | None = field(default=None, repr=False)
    """32 bytes that a sender has to have as well, or keys; None: any may come, and nothing is
    encrypted."""

    def __post_init__(self) -> None:
        if not 1 <= self.window_frames <= MAX_WINDOW_FRAMES:
            raise ValueError(
                f"a window of {self.window_frames} frames; 1 to {MAX_WINDOW_FRAMES} are possible"
            )
        if not MIN_PEER_TIMEOUT_MS <= self.peer_timeout_s * 1000 <= MAX_PEER_TIMEOUT_MS:
            raise ValueError(f"a timeout of {self.peer_timeout_s} s; 0.5 s to 1 h are possible")
        check_resume_window(self.resume_window_s)
        check_secret(self.secret)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a sender said first."""

    session: bytes
    """The session's id, 16 bytes."""
    lanes: int
    frame_bytes: int
    payload: bytes
    """What the sender's application said, at most 1 MiB."""


@dataclass(frozen=True, slots=True)
class ReceiverStatistics:
    """What has arrived so far."""

    frames: int
    pages_applied: int
    pages_rejected: int
    """Deltas and copies whose base did not match; the sender sends these pages again in full."""
    lane_bytes: int
    """Bytes of frames and of requests for digests, on the data lanes."""
    tunnel_bytes_sent: int
    tunnel_bytes_received: int
    dropped_messages: int
    """Messages that belong to no session of ours: dropped unread."""


class Receiver(SessionEnd):
    """The target's end of one session; made by `open_receiver`."""

    def __init__(
        self, url: str, options: ReceiverOptions, context: zmq.Context[zmq.Socket[bytes]]
    ) -> None:
        """Binds and listens. Use `open_receiver`."""
        self._options = options
        talk = Conversation(
            now=time.monotonic(), peer_timeout_s=options.peer_timeout_s, pings=False
        )
        super().__init__(Shared(talk, options.linger_s), context)
        secret = options.secret
        self._gatekeeper = None if secret is None else Gatekeeper(self._shared, context, secret)
        self._router = Router(
            self._shared,
            context,
            url,
            peer_timeout_s=options.peer_timeout_s,
            window_frames=options.window_frames,
            resume_window_s=options.resume_window_s,
            secret=secret,
        )
        self._hello: SessionHello | None = None
        self._lanes: list[ApplyLane] = []
        for thread in self._threads():
            thread.start()

    @property
    def url(self) -> str:
        """The endpoint as bound: a wildcard port is filled in."""
        return self._router.url

    @property
    def seed(self) -> int:
        """The session's secret digest seed (64 bit), the same on both sides; after wait_hello."""
        if self._hello is None:
            raise RuntimeError("there has been no greeting yet")
        return session_seed(self._hello.session, self._hello.nonce)

    async def wait_hello(self) -> Greeting:
        """Wait, for ever if need be, for a sender's valid greeting; others find us busy then."""
        hello = await self._when(lambda: self._router.hello, greeting=True)
        self._hello = hello
        return Greeting(hello.session, hello.lanes, hello.frame_bytes, hello.payload)

    async def accept(self, reply: bytes) -> None:
        """Take the session; `reply` (at most 1 MiB) becomes the sender's `hello_reply`.

        PeerLost: the sender did not wait. RuntimeError: no greeting waits for an answer.
        """
        await self._answer(Verdict.ACCEPTED, reply)
        await self._when(lambda: self._shared.established or None, greeting=True, look_first=True)

    async def refuse(self, payload: bytes) -> None:
        """Turn the sender away; it raises PeerRefused(payload). `wait_hello` is possible again.

        Errors as of `accept`.
        """
        await self._answer(Verdict.REFUSED, payload)
        mine = self._hello
        await self._when(
            lambda: self._router.hello is not mine or None, greeting=True, look_first=True
        )
        self._hello = None

    def attach_memory(self, memory: npt.NDArray[np.uint8], *, files: Sequence[Extent] = ()) -> None:
        """Give the writable guest memory, uint8[n_pages * 4096], and let the sender begin.

        After `accept`, once. `files` says which of its pages are shared mappings of which
        descriptors: (first page, number of pages, descriptor, byte of the file) each. What nobody
        has touched is written there, at half the cost, and stays a hole if it is zero. The array
        must stay mapped, and the descriptors open, until the context manager of `open_receiver`
        has ended. ValueError: `memory` is not of that shape, not writable, or `files` do not lie
        in it.
        """
        check_memory(memory, files)
        if not memory.flags.writeable:
            raise ValueError("guest memory has to be writable here")
        if not self._shared.established or self._hello is None or self._lanes:
            raise RuntimeError("memory is attached once, after accept()")
        filling = threading.Lock()
        self._lanes = [
            ApplyLane(
                self._shared,
                memory,
                self.seed,
                lane=number,
                lanes=self._hello.lanes,
                window_frames=self._options.window_frames,
                frame_bytes=self._hello.frame_bytes,
                send_answer=self._router.send_answer,
                files=files,
                filling=filling,
            )
            for number in range(self._hello.lanes)
        ]
        for lane in self._lanes:
            lane.start()
        with self._shared.lock:
            self._router.attach(self._lanes)

    def statistics(self) -> ReceiverStatistics:
        """Totals of the session so far; cheap, any time."""
        talk = self._shared.talk
        counters = [lane.counters for lane in self._lanes]
        return ReceiverStatistics(
            frames=sum(lane.frames for lane in counters),
            pages_applied=sum(lane.pages for lane in counters),
            pages_rejected=sum(lane.rejected for lane in counters),
            lane_bytes=sum(lane.bytes for lane in counters),
            tunnel_bytes_sent=talk.tunnel.sent,
            tunnel_bytes_received=talk.tunnel.received,
            dropped_messages=self._router.dropped,
        )

    async def _answer(self, verdict: Verdict, payload: bytes) -> None:
        if len(payload) > MAX_RECORD_BYTES:
            raise ValueError(f"an answer has at most {MAX_RECORD_BYTES} bytes, not {len(payload)}")

        def answer() -> bool:
            self._router.answer(verdict, payload)
            return True

        await self._when(answer, greeting=True)
        self._shared.wakeup.set()

    def _threads(self) -> list[LinkThread]:
        gatekeeper = [self._gatekeeper] if self._gatekeeper else []
        return [self._router, *gatekeeper, *self._lanes]


@asynccontextmanager
async def open_receiver(
    url: str, options: ReceiverOptions | None = None
) -> AsyncIterator[Receiver]:
    """Bind `url` (`tcp://host:port`, port `*` for any; `ipc:///path`, file mode 0600).

    Leaving the block normally delivers what is on its way (records, tunnel; at most `linger_s`)
    and says goodbye; leaving it by an error or a cancellation drops it.

    Raises EndpointError if the address cannot be bound.
    """
    check_url(url, bind=True)
    url = await trio.to_thread.run_sync(listening_url, url, abandon_on_cancel=True)
    keep_message_memory()
    context = new_context()
    try:
        receiver = Receiver(url, options or ReceiverOptions(), context)
    except BaseException:
        context.destroy(linger=0)
        raise
    async with receiver.running():
        yield receiver
