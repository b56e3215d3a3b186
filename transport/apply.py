"""The receiver's data lanes: one thread each that applies frames and answers comparisons.

Owns a lane's queue between the thread of the ROUTER (`router`) and the work, and the answers on
their way back. Decoding is `decoder`'s, comparing `compare`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import zmq

from transport.compare import answer_request
from transport.errors import FrameError
from transport.frames import MAGIC, PAGE_BYTES
from transport.link import LinkThread, Shared
from transport.mapping import IDLE_S, Mapper
from transport.processors import Processors
from transport.records import Ack, unpack_request

if TYPE_CHECKING:
    from transport.decoder import Decoder
    from transport.extents import Extent


@dataclass(slots=True)
class ApplyCounters:
    """Of one lane; written by its thread, read by anybody."""

    frames: int = 0
    pages: int = 0
    rejected: int = 0
    bytes: int = 0


class ApplyLane(LinkThread):
    """Applies what arrives on one data lane, in order.

    `submit`, `next_answer` and `answered` are for the thread of the ROUTER alone.
    """

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
        files: Sequence[Extent] = (),
    ) -> None:
        """`memory` uint8[n_pages * 4096], writable; `files` as for `Decoder`."""
        super().__init__(f"ferry-apply-{lane}", shared)
        self.counters = ApplyCounters()
        self.n_pages = memory.size // PAGE_BYTES
        self.prepared = False
        """Whether it is ready for frames; `Shared.wakeup` is set then."""
        self._memory = memory
        self._files = files
        self._seed = seed
        self._lane = lane
        self._lanes = lanes
        self._window_frames = window_frames
        self._frame_bytes = frame_bytes
        self._processors = Processors(lane, lanes)
        self._unanswered = 0
        self._queue: SimpleQueue[zmq.Frame | None] = SimpleQueue()
        self._answers: deque[bytes] = deque()

    def submit(self, message: zmq.Frame) -> None:
        """A message arrived. FrameError: it is longer than announced, or beyond the window."""
        if len(message) > self._frame_bytes and _is_frame(message.buffer):
            raise FrameError(f"a frame of {len(message)} bytes, {self._frame_bytes} were announced")
        if self._unanswered >= self._window_frames:
            raise FrameError(f"the peer sends more than {self._window_frames} frames at once")
        self._unanswered += 1
        self._queue.put(message)

    def next_answer(self) -> bytes | None:
        """The next answer to send; stays the next until `answered`."""
        return self._answers[0] if self._answers else None

    def answered(self) -> None:
        """The next answer was sent: the peer may send one more message."""
        self._answers.popleft()
        self._unanswered -= 1

    def stop(self) -> None:
        """End once the message at hand is done; the others are dropped."""
        self._queue.put(None)

    def run(self) -> None:
        """Apply and answer until `stop`, or until something malformed arrives."""
        # Imported here, for it costs up to a second that the greeting need not wait for.
        from transport.decoder import Decoder

        mapper = Mapper(self._memory, self._files if self._lane == 0 else ())
        decoder = Decoder(
            self._memory,
            self.n_pages,
            self._seed,
            lane=self._lane,
            lanes=self._lanes,
            files=self._files,
        )
        self.prepared = True
        self.shared.wakeup.set()
        while (message := self._next(mapper)) is not None and not self.shared.over:
            self._processors.work()
            self._answers.append(self._handle(message.buffer, decoder))
            self.shared.wakeup.set()

    def _next(self, mapper: Mapper) -> zmq.Frame | None:
        """The next message; until it comes, memory is mapped by the first lane."""
        rests = False
        while mapper.useful or not rests:
            try:
                return self._queue.get(timeout=IDLE_S)
            except Empty:
                self._processors.rest()
                rests = True
                mapper.step()
        return self._queue.get()

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
