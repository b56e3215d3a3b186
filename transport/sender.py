"""The source's end of a session, for trio: greeting, rounds of pages, verification.

Owns the options, the start and end of a session's threads, and how work is dealt to lanes. The
threads are `connector` and `lanes`; records and the tunnel are `link`'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import trio
import zmq

from transport.sending.compare import CompareShare, DigestShare, chunks_of, region_digest
from transport.sending.lanes import SendLane, Task
from transport.sending.rounds import LaneSource, RoundCounters, RoundShare, Source
from transport.session.channels import Conversation
from transport.session.connector import Connector
from transport.session.link import (
    LinkThread,
    SessionEnd,
    Shared,
    check_memory,
    check_resume_window,
)
from transport.session.message_memory import keep_message_memory
from transport.session.pacing import SharedBucket
from transport.session.secret import Secret, check_secret
from transport.session.sockets import check_url, new_context
from transport.wire.codec import Codec
from transport.wire.errors import LayoutMismatch
from transport.wire.frames import split_by_lane
from transport.wire.records import (
    MAX_ANNOUNCED_FRAME_BYTES,
    MAX_DATA_LANES,
    MAX_RECORD_BYTES,
    MAX_TUNNEL_CHUNK_BYTES,
    MIN_ANNOUNCED_FRAME_BYTES,
    MIN_PEER_TIMEOUT_MS,
    NONCE_BYTES,
    SESSION_BYTES,
    SessionHello,
    session_seed,
)

if TYPE_CHECKING:
    from transport.wire.extents import Extent


@dataclass(frozen=True, slots=True)
class SenderOptions:
    """How a sender behaves; every default suits a local network."""

    lanes: int = 2
    """Data lanes, 1 to 16: one thread and one connection each."""
    frame_bytes: int = 5 << 19
    """Upper bound of a frame of pages; made smaller when the bandwidth limit is low, and where
    pages are compressed. A thousand pages of a last round go into one frame of each of two lanes,
    unless one gets many more than the other: a second frame costs more than its pages."""
    connect_timeout_s: float = 5.0
    """How long to try until somebody answers at the address."""
    greeting_timeout_s: float = 60.0
    """How long a live peer may take to accept or refuse."""
    peer_timeout_s: float = 5.0
    """Silence after which the receiver counts as lost, at least 0.5 s; five pings fit in."""
    progress_timeout_s: float = 10.0
    """How long a live peer may take to acknowledge the next frame of a lane."""
    resume_window_s: float = 60.0
    """How long a lost link of a session that is held is tried to make anew, at most an hour and no
    longer than the receiver waits; 0: not at all."""
    linger_s: float = 2.0
    """How long `aclose` waits for records that are on their way."""
    bandwidth_bytes_per_s: int | None = None
    """Limit over data lanes and tunnel together; None: none."""
    codec: Codec | None = None
    """How pages are compressed; None: each lane finds out with what most get through."""
    secret: Secret | None = field(default=None, repr=False)
    """The receiver's 32 bytes, or keys; None: it has none, and nothing is encrypted."""

    def __post_init__(self) -> None:
        if not 1 <= self.lanes <= MAX_DATA_LANES:
            raise ValueError(f"{self.lanes} lanes; 1 to {MAX_DATA_LANES} are possible")
        if not MIN_ANNOUNCED_FRAME_BYTES <= self.frame_bytes <= MAX_ANNOUNCED_FRAME_BYTES:
            raise ValueError(
                f"frames of {self.frame_bytes} bytes; possible are "
                f"{MIN_ANNOUNCED_FRAME_BYTES} to {MAX_ANNOUNCED_FRAME_BYTES}"
            )
        if self.peer_timeout_s * 1000 < MIN_PEER_TIMEOUT_MS:
            raise ValueError(f"a timeout of {self.peer_timeout_s} s; at least 0.5 s are possible")
        check_resume_window(self.resume_window_s)
        check_secret(self.secret)


@dataclass(frozen=True, slots=True)
class RoundStatistics:
    """What one round moved; complete only once `send_round` has returned it."""

    round_no: int
    pages: int
    """Pages asked for."""
    done_pages: int
    """Pages acknowledged as applied, or known to be equal without sending."""
    sent_pages: int
    """Pages that crossed the wire in any form, resent ones included."""
    zero: int
    """Pages sent as zero."""
    same: int
    """Pages not sent since the receiver holds the same."""
    delta: int
    """Pages sent as difference to what the receiver holds."""
    copy: int
    """Pages sent as the number of another page that has the same bytes."""
    lz4: int
    raw: int
    resent: int
    """Pages whose delta or copy the receiver rejected, sent again in full."""
    wire_bytes: int
    """Bytes of frames handed to the network."""
    duration_ns: int
    """From the call to the last acknowledgement; so far, when read during the round."""


@dataclass(frozen=True, slots=True)
class RegionComparison:
    """One range of pages, digested on both sides."""

    first_page: int
    n_pages: int
    local: str
    """Hex digest of this side's pages."""
    remote: str
    """Hex digest of the receiver's pages."""

    @property
    def equal(self) -> bool:
        """Whether both sides hold the same bytes."""
        return self.local == self.remote


@dataclass(frozen=True, slots=True)
class SenderStatistics:
    """What has crossed the link so far."""

    lane_messages: int
    """Frames and comparisons on the data lanes."""
    lane_bytes: int
    """Bytes of these messages, towards the receiver."""
    lost_messages: int
    """Of these: under way when a link was lost, so that what was in them was sent again."""
    codecs: tuple[str, ...]
    """The codec that each lane uses at the moment."""
    tunnel_bytes_sent: int
    """Bytes of the tunnel that were queued, within the peer's window."""
    tunnel_bytes_received: int
    round_trip_ns: int
    """The last PING's, on the control lane; 0 before the first."""


class _Round:
    """A round while it runs, and its numbers afterwards."""

    def __init__(self, round_no: int, pages: int, shares: Sequence[RoundShare]) -> None:
        self._round_no = round_no
        self._pages = pages
        self._shares = shares
        self._started_ns = time.monotonic_ns()
        self._duration_ns: int | None = None

    def finish(self) -> None:
        """Take the round's duration: it is over."""
        self._duration_ns = time.monotonic_ns() - self._started_ns

    def statistics(self) -> RoundStatistics:
        sums = RoundCounters()
        for share in self._shares:
            sums.add(share.counters)
        duration_ns = self._duration_ns
        if duration_ns is None:
            duration_ns = time.monotonic_ns() - self._started_ns
        return RoundStatistics(
            round_no=self._round_no,
            pages=self._pages,
            done_pages=sums.done,
            sent_pages=sums.zero + sums.delta + sums.copy + sums.lz4 + sums.raw,
            zero=sums.zero,
            same=sums.same,
            delta=sums.delta,
            copy=sums.copy,
            lz4=sums.lz4,
            raw=sums.raw,
            resent=sums.resent,
            wire_bytes=sums.wire_bytes,
            duration_ns=duration_ns,
        )


class _Turn:
    """What rounds and comparisons take turns by. Who finds it free goes on at once: other tasks of
    trio would run first, while the guest may be paused."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class Sender(SessionEnd):
    """The source's end of one session; made by `open_sender`. Rounds and comparisons take turns;
    records and the tunnel go on beside them."""

    def __init__(
        self,
        url: str,
        hello: SessionHello,
        options: SenderOptions,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        """Starts to connect. Use `open_sender`."""
        self._options = options
        self._url = url
        self._hello = hello
        self._context = context
        self._seed = session_seed(hello.session, hello.nonce)
        self._bucket = SharedBucket(options.bandwidth_bytes_per_s)
        talk = Conversation(
            now=time.monotonic(),
            peer_timeout_s=options.peer_timeout_s,
            pings=True,
            chunk_bytes=self._bucket.piece_bytes(MAX_TUNNEL_CHUNK_BYTES),
        )
        super().__init__(Shared(talk, options.linger_s), context)
        self._connector = Connector(
            self._shared,
            context,
            url,
            hello,
            self._bucket,
            connect_timeout_s=options.connect_timeout_s,
            greeting_timeout_s=options.greeting_timeout_s,
            resume_window_s=options.resume_window_s,
            secret=options.secret,
        )
        self._source: Source | None = None
        self._attached = False
        """Whether the receiver has attached as much memory as there is here."""
        self._lanes: list[SendLane] = []
        self._lane_sources: list[LaneSource] = []
        self._turn = _Turn()
        self._performed = self._shared.new_wakeup()
        """Of the task that waits for lanes: it is waited for by itself, since the way of all other
        changes takes three turns of trio's loop."""
        self._round: _Round | None = None
        self._connector.start()

    @property
    def hello_reply(self) -> bytes:
        """What the receiver's application said when it accepted."""
        assert self._connector.reply is not None
        return self._connector.reply.payload

    @property
    def seed(self) -> int:
        """The session's secret digest seed (64 bit), the same on both sides."""
        return self._seed

    def attach_memory(
        self,
        memory: npt.NDArray[np.uint8],
        *,
        cache_bytes: int = 64 << 20,
        files: Sequence[Extent] = (),
    ) -> None:
        """Give the live guest memory: uint8[n_pages * 4096], read only by us. Once.

        `cache_bytes` bounds, over all lanes, what is kept of the receiver's copy for deltas.
        `files` says which pages are shared mappings of which descriptors: (first page, number of
        pages, descriptor, byte of the file) each; pages that nobody has touched are not touched
        there. The array must stay mapped, and the descriptors open, until the context manager of
        `open_sender` has ended.
        ValueError: `memory` is not of that shape, or `files` do not lie in it.
        """
        check_memory(memory, files)
        if self._source is not None:
            raise RuntimeError("memory has been attached already")
        assert self._connector.reply is not None
        lanes = self._options.lanes
        self._source = Source(memory, self._seed, cache_bytes, lanes, files)
        self._connector.n_lanes = lanes
        frame_bytes = self._bucket.piece_bytes(self._options.frame_bytes)
        for number in range(lanes):
            source = LaneSource(self._source, number, frame_bytes, self._options.codec)
            lane = SendLane(
                self._shared,
                self._context,
                self._url,
                self._hello.session,
                number,
                source.prepare,
                source.idle,
                source.next_sequence,
                self._bucket,
                window_frames=self._connector.reply.window_frames,
                frame_bytes=frame_bytes,
                progress_timeout_s=self._options.progress_timeout_s,
                performed=self._performed,
                secret=self._options.secret,
            )
            self._lane_sources.append(source)
            self._lanes.append(lane)
            lane.start()

    def hold(self) -> None:
        """From here on a lost link is made anew, as far as both sides' windows allow: calls wait
        meanwhile, `link` says so."""
        self._tell_hold(True)

    def release(self) -> None:
        """From here on a link that is lost, or is so already, ends the session."""
        self._tell_hold(False)

    def _tell_hold(self, hold: bool) -> None:
        with self._shared.lock:
            self._shared.hold = hold
        self._shared.wakeup.set()

    def limit_bandwidth(self, bytes_per_s: int | None) -> None:
        """Another limit from now on; None is none. ValueError: it is not positive."""
        self._bucket.limit(bytes_per_s)

    async def send_round(self, indices: npt.NDArray[np.uint32], round_no: int) -> RoundStatistics:
        """Send these pages; returns when the receiver has applied every one.

        `indices`: uint32[n], strictly ascending, below n_pages. Waits until the receiver has
        attached its memory. Pages are read after the call, so clear their dirty bits before it
        (I1). Rejected pages are resent in full within the round. Cancelled: some of the pages
        were sent, which ones is not known; the session goes on.

        Raises LayoutMismatch if the receiver attached another number of pages, ValueError for
        `indices` that are not as said.
        """
        async with self._turn:
            indices = await self._checked(indices)
            shares = [
                RoundShare(source, part, round_no)
                for source, part in zip(
                    self._lane_sources,
                    split_by_lane(indices, len(self._lanes)),
                    strict=True,
                )
            ]
            self._round = _Round(round_no, indices.size, shares)
            await self._perform(shares)
            self._round.finish()
            return self._round.statistics()

    def round_progress(self) -> RoundStatistics | None:
        """The present or last round as far as it is; None before the first. Cheap, any time."""
        return None if self._round is None else self._round.statistics()

    async def verify(self, indices: npt.NDArray[np.uint32] | None = None) -> npt.NDArray[np.uint32]:
        """Compare pages by digest, all or `indices` (ascending): those that differ, ascending.

        Both memories must be quiet. Pages found different are forgotten by the replica, so that a
        following `send_round` sends them again. Errors as of `send_round`.
        """
        async with self._turn:
            indices = await self._checked(indices)
            shares = [
                CompareShare(source, part)
                for source, part in zip(
                    self._lane_sources,
                    split_by_lane(indices, len(self._lanes)),
                    strict=True,
                )
            ]
            await self._perform(shares)
            return np.sort(np.concatenate([share.differing() for share in shares]))

    async def compare_regions(
        self, regions: Sequence[tuple[int, int]]
    ) -> tuple[RegionComparison, ...]:
        """Digest ranges (first page, number of pages) on both sides, for the report.

        Both memories must be quiet. ValueError: a range is not within the memory.
        """
        async with self._turn:
            n_pages = await self._ready()
            for first, count in regions:
                if first < 0 or count < 0 or first + count > n_pages:
                    raise ValueError(f"pages {first} to {first + count} of {n_pages}")
            chunks = chunks_of(regions)
            shares = [
                DigestShare(source, chunks[number :: len(self._lanes)])
                for number, source in enumerate(self._lane_sources)
            ]
            await self._perform(shares)
        found = {chunk: pair for share in shares for chunk, pair in share.digests.items()}
        pairs = [
            [found[chunk] for chunk in chunks if chunk.region == number]
            for number in range(len(regions))
        ]
        return tuple(
            RegionComparison(
                first_page=first,
                n_pages=count,
                local=region_digest([local for local, _ in digests]),
                remote=region_digest([remote for _, remote in digests]),
            )
            for (first, count), digests in zip(regions, pairs, strict=True)
        )

    def statistics(self) -> SenderStatistics:
        """Totals of the session so far; cheap, any time."""
        talk = self._shared.talk
        return SenderStatistics(
            lane_messages=sum(lane.counters.messages for lane in self._lanes),
            lane_bytes=sum(lane.counters.bytes for lane in self._lanes),
            lost_messages=sum(lane.counters.lost for lane in self._lanes),
            codecs=tuple(str(source.choice.codec) for source in self._lane_sources),
            tunnel_bytes_sent=talk.tunnel.sent,
            tunnel_bytes_received=talk.tunnel.received,
            round_trip_ns=talk.round_trip_ns,
        )

    async def greeted(self) -> None:
        """Wait until the receiver has accepted. For `open_sender`."""
        await self._when(lambda: self._shared.established or None, greeting=True, look_first=True)

    async def _ready(self) -> int:
        """Wait until both sides have attached their memories; returns the number of pages."""
        if self._source is None:
            raise RuntimeError("no memory has been attached")
        if not self._attached:
            pages = await self._when(lambda: self._shared.talk.peer_pages)
            if pages != self._source.n_pages:
                raise LayoutMismatch(
                    f"this side has {self._source.n_pages} pages of guest memory, "
                    f"the receiver {pages}"
                )
            self._attached = True
        return self._source.n_pages

    async def _checked(self, indices: npt.NDArray[np.uint32] | None) -> npt.NDArray[np.uint32]:
        n_pages = await self._ready()
        if indices is None:
            return np.arange(n_pages, dtype=np.uint32)
        if indices.dtype != np.uint32 or indices.ndim != 1:
            raise ValueError("page indices are a 1-D array of uint32")
        if indices.size and (indices[-1] >= n_pages or (indices[1:] <= indices[:-1]).any()):
            raise ValueError(f"page indices must ascend and be below {n_pages}")
        return indices

    async def _perform(self, shares: Iterable[Task]) -> None:
        """Let each lane do its share; cancelled, the lanes put theirs away by themselves."""
        tasks = list(shares)
        waited_for = [None] * len(tasks)
        for lane, task in zip(self._lanes, tasks, strict=True):
            task.waited_for = waited_for
            lane.submit(task)
        try:
            await self._when(
                lambda: not waited_for or None, look_first=True, change=self._wait_performed
            )
        except BaseException:
            for lane, task in zip(self._lanes, tasks, strict=True):
                task.cancel()
                lane.wake()
            raise

    async def _wait_performed(self) -> None:
        await trio.lowlevel.wait_readable(self._performed.fileno())
        self._performed.clear()

    def _leave(self) -> None:
        trio.lowlevel.notify_closing(self._performed.fileno())

    def _threads(self) -> list[LinkThread]:
        return [self._connector, *self._lanes]


@asynccontextmanager
async def open_sender(
    url: str, session: bytes, hello: bytes, options: SenderOptions | None = None
) -> AsyncIterator[Sender]:
    """Connect to the receiver at `url` (`tcp://host:port` or `ipc:///path`) and be accepted.

    `session`: 16 random bytes. `hello`: at most 1 MiB, handed to the receiver's application.
    Leaving the block normally delivers what is on its way (records, tunnel; at most `linger_s`)
    and says goodbye; leaving it by an error or a cancellation drops it.

    Raises EndpointError, PeerUnreachable, PeerRefused, VersionMismatch, PeerLost; ValueError for
    arguments out of range.
    """
    check_url(url, bind=False)
    if len(session) != SESSION_BYTES:
        raise ValueError(f"a session id has {SESSION_BYTES} bytes, this one {len(session)}")
    if len(hello) > MAX_RECORD_BYTES:
        raise ValueError(f"a greeting has at most {MAX_RECORD_BYTES} bytes, not {len(hello)}")
    options = options or SenderOptions()
    greeting = SessionHello(
        session, os.urandom(NONCE_BYTES), options.lanes, options.frame_bytes, hello
    )
    keep_message_memory()
    context = new_context()
    try:
        sender = Sender(url, greeting, options, context)
    except BaseException:
        context.destroy(linger=0)
        raise
    async with sender.running():
        await sender.greeted()
        yield sender
