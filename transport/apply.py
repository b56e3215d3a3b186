"""The receiver's data lanes: one thread each that applies frames and answers comparisons.

Owns a lane's queue between the thread of the ROUTER (`router`) and the work, and the window.
Decoding is `decoder`'s, comparing `compare`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Applies what arrives on one data lane, in order. `submit` is for the thread of the ROUTER."""

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
        answer: Callable[[bytes], None],
        files: Sequence[Extent] = (),
    ) -> None:
        """`memory` uint8[n_pages * 4096], writable; `files` as for `Decoder`. `answer` sends an
        answer to the peer."""
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
        self._answer = answer
        self._submitted = 0
        self._answered = 0
        """Written by this lane's thread; the one before by the other."""
        self._queue: SimpleQueue[zmq.Frame | None] = SimpleQueue()

    def submit(self, message: zmq.Frame) -> None:
        """A message arrived. FrameError: it is longer than announced, or beyond the window."""
        if len(message) > self._frame_bytes and _is_frame(message.buffer):
            raise FrameError(f"a frame of {len(message)} bytes, {self._frame_bytes} were announced")
        if self._submitted - self._answered >= self._window_frames:
            raise FrameError(f"the peer sends more than {self._window_frames} frames at once")
        self._submitted += 1
        self._queue.put(message)

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
            answer = self._handle(message.buffer, decoder)
            # The next message is likely to get this one's memory, which the caches still have.
            del message
            # First, for the next one may be here before the answer is known to be sent.
            self._answered += 1
            self._answer(answer)

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
