"""Frames into the pages of guest memory.

Owns the receiver's side of one lane: the order of frames, and the write of pages. A frame's layout
is in `frames`, its check in `parse`, the loop over its pages in `transport.kernels.unpack`.
Receives nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transport.kernels.digests import page_count
from transport.kernels.files import new_files, was_found
from transport.kernels.load import warm_up
from transport.kernels.pages import new_workspace
from transport.kernels.unpack import apply_pages
from transport.receiving.parse import Buffer, parse_frame
from transport.wire.errors import FrameError
from transport.wire.extents import Extent
from transport.wire.frames import MAX_LANES


@dataclass(frozen=True, slots=True)
class Applied:
    """What one frame has done."""

    round_no: int
    """The sender's number of the round that the frame belongs to."""
    sequence: int
    """Its place in the lane."""
    n_pages: int
    """Pages in the frame, rejected ones included."""
    rejected: npt.NDArray[np.uint32]
    """Pages left as they were because their base is not there; to be forgotten and resent."""


class Decoder:
    """Applies the frames of one lane, in order. Not thread-safe; lanes may run in parallel."""

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        n_pages: int,
        seed: int,
        *,
        lane: int = 0,
        lanes: int = 1,
        files: Sequence[Extent] = (),
        filling: AbstractContextManager[object] | None = None,
    ) -> None:
        """Write to `memory` (uint8, writable, n_pages * 4096, 8-byte aligned).

        `seed` is the sender's. `files` says which pages are shared mappings of which descriptors,
        which stay the caller's: pages that nobody has touched yet are written there, which costs
        half, and not at all if they are zero. `filling` is one lock for all who write there: the
        kernel lets one at a time add pages to a file, and has the others spin for it, which takes
        the cores from everybody. Makes the kernels ready, as `Encoder` does.
        ValueError for arguments that do not suit, `NativeLibraryError` if the C libraries are not
        there.
        """
        if page_count(memory) != n_pages or not memory.flags.writeable:
            raise ValueError(f"memory must be {n_pages} writable pages")
        if not 0 <= lane < lanes <= MAX_LANES:
            raise ValueError(f"lane {lane} of {lanes}")
        warm_up()
        self._memory = memory
        self._n_pages = n_pages
        self._seed = seed
        self._lane = lane
        self._lanes = lanes
        self._next_sequence = 0
        self.files = new_files(files, n_pages)
        """What lies behind the memory; for the thread that applies."""
        self._filling = filling or nullcontext()
        self._workspace = new_workspace()

    @property
    def next_sequence(self) -> int:
        """The sequence number that the next frame must have."""
        return self._next_sequence

    def skip_to(self, sequence: int) -> None:
        """The next frame has this number: those in between were lost with their link.

        Raises `FrameError` if that frame was there already.
        """
        if sequence < self._next_sequence:
            raise FrameError(
                f"a lane goes on at frame {sequence} of which it has {self._next_sequence}"
            )
        self._next_sequence = sequence

    def apply(self, frame: Buffer) -> Applied:
        """Check a frame, decode its pages one by one, write each with one copy.

        Raises `FrameError` for anything malformed, out of order or of another lane. Nothing is
        written then, except where a page's own LZ4 block or delta is broken: pages in front of it
        are. After an error the lane must be given up.
        """
        parsed = parse_frame(
            frame, seed=self._seed, n_pages=self._n_pages, lane=self._lane, lanes=self._lanes
        )
        if parsed.sequence != self._next_sequence:
            raise FrameError(f"frame {parsed.sequence} where {self._next_sequence} was due")
        rejected = np.empty(parsed.index.size, np.uint32)
        with self._filling if self._is_new(parsed.index) else nullcontext():
            n_rejected = apply_pages(
                self._memory,
                self.files,
                parsed.index,
                parsed.kind,
                parsed.length,
                parsed.offset,
                parsed.base,
                parsed.payload,
                np.uint64(self._seed),
                self._workspace,
                rejected,
            )
        if n_rejected < 0:
            raise FrameError(f"page {parsed.index[-1 - n_rejected]} does not decode")
        self._next_sequence += 1
        return Applied(
            round_no=parsed.round_no,
            sequence=parsed.sequence,
            n_pages=parsed.index.size,
            rejected=rejected[:n_rejected],
        )

    def _is_new(self, index: npt.NDArray[np.uint32]) -> bool:
        """Whether most pages are likely to be added to a file: others are written side by side."""
        if not self.files.there.size:
            return False
        first, middle, last = index[0], index[index.size // 2], index[-1]
        return sum(was_found(self.files, int(page)) for page in (first, middle, last)) < 2
