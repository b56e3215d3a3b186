"""An encoder and a decoder with nothing between them, and their two memories."""

import time

import numpy as np
import numpy.typing as npt

from transport.receiving.decoder import Decoder
from transport.sending.encoder import Encoder
from transport.sending.replica import Replica
from transport.wire.codec import Codec
from transport.wire.frames import DEFAULT_FRAME_BYTES, PAGE_BYTES

SEED = 0x5EED

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.uint32]


class Lane:
    """What one lane of a sender and of its receiver does, in one thread."""

    def __init__(self, source: Bytes, cache_bytes: int) -> None:
        self.source = source
        self.n_pages = source.size // PAGE_BYTES
        self.everything = np.arange(self.n_pages, dtype=np.uint32)
        self.replica = Replica(self.n_pages, cache_bytes)
        self._encoder = Encoder(source, self.replica, SEED)
        self._decoder = Decoder(np.zeros_like(source), self.n_pages, SEED)
        self._out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)
        self._frames: list[bytes] = []

    @property
    def codec(self) -> Codec:
        """How pages are compressed; may be changed at any time."""
        return self._encoder.codec

    @codec.setter
    def codec(self, codec: Codec) -> None:
        self._encoder.codec = codec

    def encode(self, indices: Indices) -> float:
        """Encodes these pages and keeps the frames for `decode`. Returns the CPU seconds."""
        start, seconds = 0, 0.0
        while start < indices.size:
            sequence = self._decoder.next_sequence + len(self._frames)
            began = time.thread_time()
            done = self._encoder.encode(indices, start, self._out, round_no=0, sequence=sequence)
            seconds += time.thread_time() - began
            start += done.consumed
            if done.n_bytes:
                self._frames.append(self._out[: done.n_bytes].tobytes())
        return seconds

    def decode(self) -> tuple[float, int]:
        """Applies the frames that were kept. Returns the CPU seconds, and the frames' bytes."""
        began = time.thread_time()
        for frame in self._frames:
            self._decoder.apply(frame)
        seconds = time.thread_time() - began
        n_bytes = sum(map(len, self._frames))
        self._frames = []
        return seconds, n_bytes
