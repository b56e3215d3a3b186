"""The source VMM's stream on its way to the other host, opened where that is possible.

Owns which pages the VMM has announced and nobody has fetched yet, what is passed on, and when: what
comes before the tail at once, the tail (the state of the VMM's own devices) when it is released.
How fast the VMM may be and how far ahead is `pacing`'s; the pages are sent by `precopy`. A stream
that cannot be opened is carried as it is, or, if it has to be opened, ends the migration.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum

import numpy as np
import trio
from numpy.typing import NDArray

from ferry.errors import Mismatch
from ferry.migration.kernels import STREAM_KERNEL
from ferry.migration.pacing import Pace
from sync.dirty.tracker import Bitmap, n_words
from sync.memory import PAGE_BYTES
from sync.vmm.stream.errors import StreamNotFollowed
from sync.vmm.stream.mapping import FileRange
from sync.vmm.stream.opened import OpenedStream
from sync.vmm.stream.reader import Announced, PassOn, TailBegan
from transport.session.link import SessionEnd

READ_BYTES = 1 << 20
QUEUED_BYTES = 4 << 20
"""So much of what comes before the tail may wait for the link."""
HELD_BYTES = 16 << 20
HELD_BYTES_PER_PAGE = 9
"""A page of zeros takes so many in the stream: it proves nothing, and is held until a block is
proven."""
TAIL_BYTES = 1 << 30
"""The state of the VMM's devices is kept in memory until all pages are in place."""
UNREAD_S = 0.5
"""For so long the VMM is not read while too much is announced. It waits with its lock held."""


class StreamForm(Enum):
    """How the stream is carried."""

    STARTING = "starting"
    OPEN = "open"
    CLOSED = "closed"


class VmmStream:
    """One outgoing stream. `notify` is called once, with a sentence, when it is known how it is
    carried."""

    def __init__(
        self,
        memory: NDArray[np.uint8],
        files: Sequence[FileRange],
        pace: Pace,
        notify: Callable[[str], None],
        *,
        must_open: bool = False,
        why_closed: str = "",
    ) -> None:
        """`memory` is the guest's, uint8[n_pages * 4096], `files` what it is. With `why_closed` the
        stream is not looked at."""
        n_pages = memory.size // PAGE_BYTES
        self._opened: OpenedStream | None = None
        self.form = StreamForm.CLOSED if why_closed else StreamForm.STARTING
        if not why_closed:
            self._opened = OpenedStream(
                memory,
                files,
                max_held_bytes=HELD_BYTES + HELD_BYTES_PER_PAGE * n_pages,
                max_tail_bytes=TAIL_BYTES,
                kernel=STREAM_KERNEL,
            )
        self._why_closed = why_closed
        self._must_open = must_open
        self._pace = pace
        self._notify = notify
        self._n_pages = n_pages
        self._announced = np.zeros(n_words(n_pages) * 64, np.bool_)
        self._cost = 0.0
        """Of the announced pages that were not fetched."""
        self._cost_under_way = 0.0
        self._hurry = False
        self._changed = trio.Event()
        self._gathered = trio.Event()
        """Enough is announced for a round."""
        self._to_pass = deque[bytes]()
        self._queued_bytes = 0
        self._ended = False
        self._tail_from = -1
        """How many pieces come before the tail; none is known before it has begun."""
        self._n_passed = 0
        self._released = False
        self.tail_began = trio.Event()
        """All pages have been announced."""
        self.tail_bytes = 0
        self.pages = 0
        """Announced so far, a page each time."""

    @property
    def is_open(self) -> bool:
        return self.form is StreamForm.OPEN

    @property
    def is_exclusive(self) -> bool:
        """Whether no page of the guest's memory goes through the VMMs."""
        return self._opened is not None and self.is_open and not self._opened.carried

    @property
    def backlog(self) -> float:
        """What is announced and not acknowledged, in pages as `Pace` counts them."""
        return self._cost + self._cost_under_way

    @property
    def announced_pages(self) -> int:
        """Announced and not collected."""
        return int(np.count_nonzero(self._announced))

    def report(self) -> dict[str, object]:
        return {
            "form": self.form.value,
            "why_closed": self._why_closed,
            "pages": self.pages,
            "tail_bytes": self.tail_bytes,
        }

    # --- for the rounds ---

    def collect(self) -> tuple[Bitmap, float]:
        """The pages announced since the last call, which are forgotten, and what they cost. Read
        the pages after this (I1)."""
        bits = np.packbits(self._announced, bitorder="little").view(np.uint64)
        cost, self._cost = self._cost, 0.0
        if cost:
            self._announced[:] = False
        self._cost_under_way += cost
        return bits, cost

    def acknowledged(self) -> None:
        """All that was collected is on the target."""
        self._cost_under_way = 0.0
        self._wake()

    def wrote(self, pages: NDArray[np.uint32]) -> None:
        """Devices have written these pages, which the VMM does not know."""
        if self._opened is not None:
            self._opened.proof.written(pages)

    async def wait_worth_a_round(self) -> None:
        """Waits until enough is announced for a round of its own."""
        while not self._is_worth_a_round:
            await self._gathered.wait()

    @property
    def _is_worth_a_round(self) -> bool:
        return self._cost > 0 and self._cost >= self._pace.round_cost

    def hurry(self) -> None:
        """From here on the VMM is read as fast as it writes: its guest stands still."""
        self._hurry = True
        self._wake()

    def release_tail(self) -> None:
        """Everything announced is on the target: what follows may be passed on."""
        self._released = True
        self._wake()

    # --- for the tunnel ---

    async def carry(
        self,
        stream: trio.abc.ReceiveStream,
        link: SessionEnd,
        complete: Callable[[], Awaitable[bool]],
    ) -> None:
        """Reads the VMM until it closes or is gone; `complete` is asked then.

        The end of a stream that broke off is not passed on: the other VMM would fail of it, and its
        host would see that before it hears the reason. Raises `StreamError`, `Mismatch`,
        `TransportError`.
        """
        if self.form is StreamForm.CLOSED:
            self._decide(StreamForm.CLOSED, self._why_closed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, link)
            try:
                while data := await stream.receive_some(READ_BYTES):
                    await self._take(data)
                if self._opened is not None and self.is_open:
                    self._opened.reader.end()
            except trio.BrokenResourceError:
                pass
            if await complete():
                self._ended = True
                self._wake()
            else:
                nursery.cancel_scope.cancel()
        if self._ended:
            await link.tunnel_send_eof()

    async def _take(self, data: bytes | bytearray) -> None:
        if self._opened is None:
            await self._queue(bytes(data))
            return
        try:
            self._opened.feed(data)
            while (event := self._opened.next_event()) is not None:
                if isinstance(event, Announced):
                    self._note(event)
                elif isinstance(event, PassOn):
                    await self._queue(event.data)
                elif isinstance(event, TailBegan):
                    self._tail_from = self._n_passed + len(self._to_pass)
                    self.tail_began.set()
        except StreamNotFollowed as error:
            if self._opened.reader.has_taken:
                raise
            self._opened.reader.carry_closed()
            self._decide(StreamForm.CLOSED, str(error))
            while (event := self._opened.next_event()) is not None:
                if isinstance(event, PassOn):
                    await self._queue(event.data)
            self._opened = None
            return
        if self._opened.carried and self.form is StreamForm.STARTING:
            names = ", ".join(sorted(self._opened.carried))
            self._decide(StreamForm.CLOSED, f"RAM block {names} is not proven to be shared memory")
        await self._wait_for_room()

    def _note(self, event: Announced) -> None:
        if self.form is StreamForm.STARTING:
            self._decide(StreamForm.OPEN, "")
        self._announced[event.pages] = True
        self._cost += self._pace.cost_of(event.pages.size, int(event.zeros.sum()))
        self._pace.announced(event.pages.size)
        self.pages += int(event.pages.size)
        if self._is_worth_a_round:
            self._gathered.set()
            self._gathered = trio.Event()

    def _decide(self, form: StreamForm, reason: str) -> None:
        if form is StreamForm.CLOSED and self._must_open:
            raise Mismatch(f"--vmm-stream open: the VMM's stream cannot be opened: {reason}")
        self.form, self._why_closed = form, reason
        self._notify(
            "the VMM's stream is opened: all of the guest's memory takes the lanes"
            if form is StreamForm.OPEN
            else f"the VMM's stream is carried as it is: {reason}"
        )

    async def _wait_for_room(self) -> None:
        if self._has_room:
            return
        with trio.move_on_after(UNREAD_S):
            while not self._has_room:
                await self._changed.wait()

    @property
    def _has_room(self) -> bool:
        return self._hurry or self.backlog <= self._pace.max_backlog

    async def _queue(self, data: bytes) -> None:
        self._to_pass.append(data)
        self._queued_bytes += len(data)
        self._wake()
        if self.tail_began.is_set():
            self.tail_bytes += len(data)
            return
        while self._queued_bytes > QUEUED_BYTES:
            await self._changed.wait()

    async def _pass_on(self, link: SessionEnd) -> None:
        while True:
            if not self._to_pass:
                if self._ended:
                    return
                await self._changed.wait()
                continue
            if self._n_passed == self._tail_from and not self._released:
                await self._changed.wait()
                continue
            data = self._to_pass.popleft()
            self._n_passed += 1
            await link.tunnel_send(data)
            self._queued_bytes -= len(data)
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
