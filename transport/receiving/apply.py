"""The receiver's data lanes: one thread each that applies frames and answers comparisons.

Owns a lane's queue between the thread that receives (`router`) and the work, and the window.
Decoding is `decoder`'s, comparing `answers`'.
"""

from __future__ import annotations

import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import zmq

from transport.receiving.answers import answer_request
from transport.receiving.mapping import IDLE_S, Mapper
from transport.session.link import LinkThread, Shared
from transport.wire.errors import FrameError
from transport.wire.frames import MAGIC, PAGE_BYTES
from transport.wire.records import Ack, unpack_request

if TYPE_CHECKING:
    from transport.receiving.decoder import Decoder
    from transport.wire.extents import Extent


@dataclass(slots=True)
class ApplyCounters:
    """Of one lane; written by its thread, read by anybody."""

    frames: int = 0
    pages: int = 0
    rejected: int = 0
    bytes: int = 0


class ApplyLane(LinkThread):
    """Applies what arrives on one data lane, in order."""

    def __init__(
        self,
        shared: Shared,
        memory: npt.NDArray[np.uint8],
        seed: int,
        *,
        lane: int,
        lanes: int,
        window_frames: int,
        frame_bytes: int,
        send_answer: Callable[[int, int, bytes], None],
        files: Sequence[Extent] = (),
        filling: threading.Lock | None = None,
    ) -> None:
        """`memory` uint8[n_pages * 4096], writable; `files` and `filling` as for `Decoder`.
        `send_answer` takes the lane's number, that of the link on which a message came, and the
        answer to it, in the order of the messages."""
        super().__init__(f"ferry-apply-{lane}", shared)
        self.counters = ApplyCounters()
        self.n_pages = memory.size // PAGE_BYTES
        self.prepared = False
        """Whether it is ready for frames; `Shared.wakeup` is set then."""
        self._memory = memory
        self._files = files
        self._filling = filling
        self._seed = seed
        self._lane = lane
        self._lanes = lanes
        self._window_frames = window_frames
        self._frame_bytes = frame_bytes
        self._send_answer = send_answer
        self._submitted = 0
        self._answered = 0
        """Written by this lane's thread; the one before by who submits."""
        self._queue: deque[tuple[int, zmq.Frame]] = deque()
        """Messages, each with the number of its link."""
        self._begins_at = 0
        """The number of the next frame, once the queue is empty."""
        self._wakeup = shared.new_wakeup()
        self._poll = select.poll()
        self._poll.register(self._wakeup, select.POLLIN)
        self._stopped = False

    @property
    def idle(self) -> bool:
        """Whether every message that was submitted has been answered."""
        return self._submitted == self._answered

    def begin(self, sequence: int) -> None:
        """A new link, on which the first frame has this number. Only while the lane is `idle`; for
        the thread that submits."""
        self._begins_at = sequence

    def submit(self, message: zmq.Frame, link: int) -> None:
        """A message arrived on the link of this number. For one other thread. FrameError: it is
        longer than announced, or beyond the window."""
        if len(message) > self._frame_bytes and _is_frame(message.buffer):
            raise FrameError(f"a frame of {len(message)} bytes, {self._frame_bytes} were announced")
        if self._submitted - self._answered >= self._window_frames:
            raise FrameError(f"the peer sends more than {self._window_frames} frames at once")
        self._submitted += 1
        self._queue.append((link, message))
        self._wakeup.set()

    def stop(self) -> None:
        """End once the message at hand is done; the others are dropped."""
        self._stopped = True
        self._wakeup.set()

    def run(self) -> None:
        """Apply and answer until `stop`, or until something malformed arrives."""
        # Imported here, for it costs up to a second that the greeting need not wait for.
        from transport.receiving.decoder import Decoder

        mapper = Mapper(self._memory, self._files if self._lane == 0 else ())
        decoder = Decoder(
            self._memory,
            self.n_pages,
            self._seed,
            lane=self._lane,
            lanes=self._lanes,
            files=self._files,
            filling=self._filling,
        )
        self.prepared = True
        self.shared.wakeup.set()
        began = link = 0
        while (item := self._next(mapper)) is not None:
            link, message = item
            if link != began:
                decoder.skip_to(self._begins_at)
                began = link
            answer = self._handle(message.buffer, decoder)
            # The next message is likely to get this one's memory, which the caches still have.
            del item, message
            # First, for the next one may be here before the answer is known to be sent.
            self._answered += 1
            self._send_answer(self._lane, link, answer)

    def _next(self, mapper: Mapper) -> tuple[int, zmq.Frame] | None:
        """The next message, None: the end; until it comes, memory is mapped by the first lane."""
        rests = False
        while not self._stopped and not self.shared.over:
            if self._queue:
                return self._queue.popleft()
            ready = self._poll.poll(None if rests and not mapper.useful else IDLE_S * 1000)
            if not ready:
                rests = True
                mapper.step()
            else:
                self._wakeup.clear()
        return None

    def _handle(self, message: memoryview, decoder: Decoder) -> bytes:
        self.counters.bytes += len(message)
        if not _is_frame(message):
            return answer_request(
                unpack_request(message), self._memory, decoder.files, self._seed
            ).pack()
        applied = decoder.apply(message)
        self.counters.frames += 1
        self.counters.pages += applied.n_pages - applied.rejected.size
        self.counters.rejected += applied.rejected.size
        return Ack(applied.sequence, applied.rejected).pack()


def _is_frame(message: memoryview) -> bool:
    return bytes(message[: len(MAGIC)]) == MAGIC
