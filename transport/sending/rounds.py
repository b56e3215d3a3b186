"""One lane's share of a round: pages into frames, acknowledgements into progress.

Owns the lane's encoder and sequence, and which pages of the share are still to be encoded, to be
acknowledged, or to be sent again in full. Encoding itself is `encoder`'s, sending `lanes`'.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from transport.receiving.mapping import Mapper
from transport.sending.codec_choice import Choice
from transport.sending.lanes import Outgoing, Task
from transport.wire.arrays import Indices, Memory
from transport.wire.codec import Codec
from transport.wire.errors import RecordError
from transport.wire.frames import PAGE_BYTES
from transport.wire.records import Ack, LaneAnswer

if TYPE_CHECKING:
    from transport.kernels.files import Files
    from transport.sending.encoder import EncodedFrame, Encoder
    from transport.sending.replica import Replica
    from transport.wire.extents import Extent


class Source:
    """The sender's memory, and the replica that its lanes share."""

    def __init__(
        self,
        memory: Memory,
        seed: int,
        cache_bytes: int,
        lanes: int,
        files: Sequence[Extent] = (),
    ) -> None:
        """`memory` uint8[n_pages * 4096], `files` as for `Encoder`. Allocates nothing yet."""
        self.memory = memory
        self.n_pages = memory.size // PAGE_BYTES
        self.seed = seed
        self._cache_bytes = cache_bytes
        self._lanes = lanes
        self.files = files
        self._lock = threading.Lock()
        self._replica: Replica | None = None

    def encoder(self, lane: int, frame_bytes: int) -> Encoder:
        """The encoder of one lane. For the lane's thread: the first call loads compiled code."""
        # Imported here, for it costs up to a second that the greeting need not wait for.
        from transport.sending.encoder import Encoder
        from transport.sending.replica import Replica

        with self._lock:
            if self._replica is None:
                self._replica = Replica(self.n_pages, self._cache_bytes, self._lanes)
        return Encoder(
            self.memory,
            self._replica,
            self.seed,
            lane=lane,
            frame_bytes=frame_bytes,
            files=self.files,
        )


class LaneSource:
    """A lane's encoder, its choice of codecs and the number of its next frame. For the lane's
    thread."""

    def __init__(
        self, source: Source, lane: int, frame_bytes: int, codec: Codec | None = None
    ) -> None:
        """`codec`: the one to use; None: the choice's."""
        self.source = source
        self.choice = Choice(codec)
        self.sequence = 0
        self._lane = lane
        self._frame_bytes = frame_bytes
        self._encoder: Encoder | None = None
        self._first_round: int | None = None
        self._mapper = Mapper(source.memory, source.files)

    def prepare(self) -> None:
        """Make the encoder."""
        self._encoder = self.source.encoder(self._lane, self._frame_bytes)

    def idle(self) -> None:
        """Nothing is to be sent at the moment: memory is mapped meanwhile, by the first lane, and
        the cache made ready."""
        if self._lane == 0:
            self._mapper.step()
        if self._encoder is not None:
            self._encoder.replica.touch_ahead(self._lane)

    def next_sequence(self) -> int:
        """The number of the next frame."""
        return self.sequence

    @property
    def files(self) -> Files:
        """What lies behind the memory."""
        assert self._encoder is not None
        return self._encoder.files

    def encode(
        self,
        indices: Indices,
        start: int,
        out: Memory,
        round_no: int,
        full: bool,
    ) -> EncodedFrame:
        """`Encoder.encode`, with the codec and the sequence taken care of."""
        encoder = self._encoder
        assert encoder is not None
        if self._first_round is None:
            self._first_round = round_no
        encoder.codec = self.choice.pick(
            time.monotonic(),
            begins=indices.size if start == 0 else 0,
            again=round_no != self._first_round,
        )
        frame = encoder.encode(
            indices,
            start,
            out,
            round_no=round_no,
            sequence=self.sequence,
            max_raw_pages=self.choice.frame_pages,
            full=full,
        )
        self.choice.encoded(
            time.monotonic(),
            looked=frame.consumed,
            pages=frame.n_pages - frame.zero,
            n_bytes=frame.n_bytes,
        )
        self.sequence += frame.n_bytes > 0
        return frame

    def forget(self, indices: Indices) -> None:
        """What the receiver holds of these pages is not known any more."""
        assert self._encoder is not None
        self._encoder.forget(indices)


@dataclass(slots=True)
class RoundCounters:
    """What a share has done, in pages unless named bytes; written by its lane, read by anybody."""

    done: int = 0
    zero: int = 0
    same: int = 0
    delta: int = 0
    copy: int = 0
    lz4: int = 0
    raw: int = 0
    resent: int = 0
    wire_bytes: int = 0

    def add(self, other: RoundCounters) -> None:
        """Sum up."""
        self.done += other.done
        self.zero += other.zero
        self.same += other.same
        self.delta += other.delta
        self.copy += other.copy
        self.lz4 += other.lz4
        self.raw += other.raw
        self.resent += other.resent
        self.wire_bytes += other.wire_bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A frame under way."""

    sequence: int
    n_bytes: int
    indices: Indices
    """Pages it was made of, those left out as equal included."""
    full: bool
    """Whether its pages are sent once more, encoded so that they cannot be rejected."""


class RoundShare(Task):
    """The pages of one round that belong to one lane."""

    def __init__(self, lane: LaneSource, indices: Indices, round_no: int) -> None:
        """`indices` uint32, 1-D, each of this lane."""
        super().__init__()
        self.counters = RoundCounters()
        self._lane = lane
        self._round_no = round_no
        self._indices = np.ascontiguousarray(indices, np.uint32)
        self._start = 0
        self._again: deque[Indices] = deque()
        """Pages that were rejected, or lost with a link: to be sent once more, in full."""
        self._resending = False

    def _has_more(self) -> bool:
        return self._start < self._indices.size or bool(self._again)

    def _produce(self, buffer: Memory) -> Outgoing | None:
        if self._start == self._indices.size and self._again:
            self._indices = np.concatenate(self._again)
            self._start = 0
            self._resending = True
            self._again.clear()
        frame = self._lane.encode(
            self._indices,
            self._start,
            buffer,
            self._round_no,
            self._resending,
        )
        pages = self._indices[self._start : self._start + frame.consumed]
        self._start += frame.consumed
        self._count(frame)
        if frame.n_bytes == 0:
            self.counters.done += pages.size
            return None
        sent = _Sent(self._lane.sequence - 1, frame.n_bytes, pages, self._resending)
        return Outgoing(frame.n_bytes, sent)

    def _on_answer(self, context: _Sent, answer: LaneAnswer) -> None:
        if not isinstance(answer, Ack) or answer.sequence != context.sequence:
            raise RecordError("the receiver acknowledges a frame that it was not sent")
        self.counters.done += context.indices.size
        if not answer.rejected.size:
            return
        rejected = np.unique(answer.rejected)
        if context.full or not np.isin(rejected, context.indices).all():
            raise RecordError("the receiver rejects pages that needed no base or were not sent")
        self._lane.forget(rejected)
        self._again.append(rejected)
        self.counters.done -= rejected.size
        self.counters.resent += rejected.size

    def _lose(self, context: _Sent) -> None:
        # Whether they were applied is not known, so nothing may be built on them.
        self._lane.choice.lost()
        self._lane.forget(context.indices)
        self._again.append(context.indices)

    def after_answer(self, now: float) -> None:
        """The choice of a codec learns from it."""
        self._lane.choice.acknowledged(now)

    def _count(self, frame: EncodedFrame) -> None:
        counters = self.counters
        counters.zero += frame.zero
        counters.same += frame.same
        counters.delta += frame.delta + frame.lz4_base
        counters.copy += frame.copy
        counters.lz4 += frame.lz4
        counters.raw += frame.raw
        counters.wire_bytes += frame.n_bytes
