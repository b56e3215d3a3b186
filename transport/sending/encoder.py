"""Pages of live guest memory into frames, each page in the cheapest form.

Owns the sender's side of one lane: the frame in the making. The work on pages is done in
`transport.kernels.pages`; the frame's layout is in `frames`, what is known of the receiver in
`replica`. Sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from transport.kernels import pages as kernels
from transport.kernels.clib import LZ4_STATE_WORDS
from transport.kernels.digests import digest_all, page_count
from transport.kernels.files import new_files
from transport.kernels.load import warm_up
from transport.sending.replica import Replica
from transport.wire.codec import LZ4, Method, Packer
from transport.wire.extents import Extent
from transport.wire.frames import (
    BASE_BYTES,
    DEFAULT_FRAME_BYTES,
    ENTRY_BYTES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAME_PAGES,
    MIN_FRAME_BYTES,
    PAGE_BYTES,
    PageKind,
    seal_frame,
)

MAX_COMPRESSED_FRAME_BYTES: Final = 1 << 20
"""Of a frame by a method that compresses: its pages take so long that what comes once a frame does
not count, and both sides had better begin soon. Only frames of raw pages gain by being longer."""
MAX_CALL_PAGES: Final = 65536
"""Indices that one call looks at, at most, so that a caller can be interrupted: some 25 ms."""

_EFFORT: Final = {
    Method.NONE: kernels.EFFORT_RAW,
    Method.DELTA: kernels.EFFORT_DELTA,
    Method.LZ4: kernels.EFFORT_LZ4,
    Method.ZSTD: kernels.EFFORT_PACKED,
}


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """What one call of `Encoder.encode` has done.

    `consumed == same + n_pages`; `n_pages` is the sum of all that follow `same`.
    """

    consumed: int
    """Indices taken from the list, from `start` on; 0 only at its end."""
    n_bytes: int
    """Length of the frame at the start of `out`; 0: nothing to send, the sequence is not used."""
    n_pages: int
    """Pages in the frame."""
    same: int
    """Pages left out because the receiver holds them already."""
    zero: int
    """Pages of zeros, in the frame without payload."""
    raw: int
    """Pages as they are."""
    lz4: int
    """Pages as an LZ4 block."""
    delta: int
    """Pages as the bytes that changed."""
    lz4_base: int
    """Pages as an LZ4 block with the base as dictionary."""
    copy: int
    """Pages as the number of another page that has the same bytes."""


class Encoder:
    """Encodes the pages of one lane. Not thread-safe; works without the GIL."""

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        replica: Replica,
        seed: int,
        *,
        lane: int = 0,
        frame_bytes: int = DEFAULT_FRAME_BYTES,
        files: Sequence[Extent] = (),
    ) -> None:
        """Read from `memory` (uint8, replica.n_pages * 4096, 8-byte aligned, may be read-only).

        The memory may change at any time. `seed` (64 bits) is the migration's secret, the same on
        both sides. A frame is never longer than `frame_bytes`, nor, if its pages are compressed,
        than `MAX_COMPRESSED_FRAME_BYTES`. There is one encoder for each lane of the replica.
        `files` says which pages are shared mappings of which descriptors, which stay the caller's:
        pages that nobody has touched yet are found, and not touched, there. Makes the kernels
        ready, which takes long if they were never compiled (see
        `transport.kernels.load.warm_up`). Raises ValueError for arguments that do not suit,
        `NativeLibraryError` if the C libraries are not there.
        """
        if page_count(memory) != replica.n_pages:
            raise ValueError(f"memory of {page_count(memory)} pages, replica of {replica.n_pages}")
        if not 0 <= lane < replica.lanes:
            raise ValueError(f"lane {lane} of {replica.lanes}")
        if not MIN_FRAME_BYTES <= frame_bytes <= MAX_FRAME_BYTES:
            raise ValueError(f"frames of {frame_bytes} bytes: {MIN_FRAME_BYTES}-{MAX_FRAME_BYTES}")
        warm_up()
        self.codec = LZ4
        """May be changed between any two calls of `encode`."""
        self._memory = memory.view(np.uint64)
        self.files = new_files(files, replica.n_pages)
        """What lies behind the memory; for the thread that encodes."""
        self._replica = replica
        self._seed = seed
        self._lane = lane
        self._frame_bytes = frame_bytes
        self._known = replica.knowledge_of_lane(lane)
        self._tables = kernels.Tables(
            index=np.empty(MAX_FRAME_PAGES, np.uint32),
            length=np.empty(MAX_FRAME_PAGES, np.uint16),
            kind=np.empty(MAX_FRAME_PAGES, np.uint8),
            base=np.empty(MAX_FRAME_PAGES, np.uint64),
            digest=np.empty(MAX_FRAME_PAGES, np.uint64),
        )
        self._workspace = kernels.new_workspace()
        self._packer = Packer()
        self._unpacked = np.empty(0, np.uint8)
        self._lz4_state = np.zeros(LZ4_STATE_WORDS, np.uint64)
        self._zero_digest = digest_all(np.zeros(PAGE_BYTES, np.uint8), seed)[0]

    @property
    def replica(self) -> Replica:
        """What is known of the receiver."""
        return self._replica

    def encode(
        self,
        indices: npt.NDArray[np.uint32],
        start: int,
        out: npt.NDArray[np.uint8],
        *,
        round_no: int,
        sequence: int,
        max_raw_pages: int = 0,
        full: bool = False,
    ) -> EncodedFrame:
        """Encode pages `indices[start:]` until the frame is full, into the start of `out`.

        `indices` uint32, 1-D, contiguous, each below n_pages and of this lane, in any order,
        repeats allowed. `out` uint8, writable, 1-D, contiguous, 8-byte aligned, at least
        `frame_bytes` long. The replica takes what is encoded for delivered: a page that is not
        applied must be forgotten. At most `MAX_CALL_PAGES` indices are looked at, so a call may end
        without a frame and before the end of the list. `max_raw_pages`: a frame has no more room
        than so many pages take as they are; 0: no more than `frame_bytes`. `full`: no page is sent
        as a copy of another, so that pages which were forgotten before cannot be rejected. Raises
        IndexError for an index out of range or of another lane (the pages that this call has
        encoded are forgotten, so nothing is lost), ValueError for an unfit `start` or `out`.
        """
        if not 0 <= start <= indices.size:
            raise ValueError(f"start {start} in a list of {indices.size}")
        if out.size < self._frame_bytes:
            raise ValueError(f"{out.size} bytes of room for a frame of {self._frame_bytes}")
        if out.ctypes.data % 8:
            raise ValueError("a frame is made at an address that is a multiple of 8")
        counters = np.zeros(kernels.COUNTERS, np.int64)
        body = self._room_for_body(out, max_raw_pages)
        stop = kernels.encode_pages(
            self._memory,
            indices,
            start,
            min(indices.size, start + MAX_CALL_PAGES),
            self._lane,
            self._replica.lanes,
            np.uint64(self._seed),
            self._zero_digest,
            _EFFORT[self.codec.method],
            full,
            self.files,
            self._known,
            kernels.words_and_bytes(body),
            self._tables,
            self._workspace,
            self._lz4_state,
            counters,
        )
        if stop < 0:
            bad = -1 - stop
            self._replica.forget(indices[start:bad])
            raise IndexError(f"page {indices[bad]} is not one of lane {self._lane}")
        by_kind: list[int] = counters[: len(PageKind)].tolist()
        n_pages = sum(by_kind)
        n_bytes = 0
        if n_pages:
            body = body[: int(counters[kernels.COUNT_BODY_BYTES])]
            body_bytes, unpacked_bytes = self._put_body(body, out)
            raw = self.codec.method is Method.NONE
            raw_digests = self._tables.digest[: by_kind[PageKind.RAW]] if raw else None
            n_bytes = seal_frame(
                out,
                body_bytes=body_bytes,
                unpacked_bytes=unpacked_bytes,
                n_pages=n_pages,
                sequence=sequence,
                round_no=round_no,
                lane=self._lane,
                seed=self._seed,
                raw_digests=raw_digests,
            )
        return EncodedFrame(
            consumed=stop - start,
            n_bytes=n_bytes,
            n_pages=n_pages,
            same=int(counters[kernels.COUNT_SAME]),
            zero=by_kind[PageKind.ZERO],
            raw=by_kind[PageKind.RAW],
            lz4=by_kind[PageKind.LZ4],
            delta=by_kind[PageKind.DELTA],
            lz4_base=by_kind[PageKind.LZ4_BASE],
            copy=by_kind[PageKind.COPY],
        )

    def forget(self, indices: npt.NDArray[np.uint32]) -> None:
        """The receiver rejected these pages, or they never arrived: see `Replica.forget`."""
        self._replica.forget(indices)

    def _room_for_body(
        self, out: npt.NDArray[np.uint8], max_raw_pages: int
    ) -> npt.NDArray[np.uint8]:
        """Where the body is made: in its place, unless it is packed afterwards."""
        body_bytes = self._frame_bytes - HEADER_BYTES
        if max_raw_pages:
            body_bytes = min(body_bytes, max_raw_pages * (PAGE_BYTES + ENTRY_BYTES) + BASE_BYTES)
        if self.codec.method in (Method.NONE, Method.DELTA):
            return out[HEADER_BYTES : HEADER_BYTES + body_bytes]
        body_bytes = min(body_bytes, MAX_COMPRESSED_FRAME_BYTES - HEADER_BYTES)
        if self.codec.method is not Method.ZSTD:
            return out[HEADER_BYTES : HEADER_BYTES + body_bytes]
        if not self._unpacked.size:
            self._unpacked = np.empty(MAX_COMPRESSED_FRAME_BYTES, np.uint8)
        return self._unpacked[:body_bytes]

    def _put_body(self, body: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> tuple[int, int]:
        """The body to its place, packed if that is shorter.

        Returns how long it is there, and how long it was before, 0 if it is not packed.
        """
        if self.codec.method is not Method.ZSTD:
            return body.size, 0
        packed = self._packer.pack(body, self.codec.level)
        if len(packed) < body.size:
            out[HEADER_BYTES : HEADER_BYTES + len(packed)] = np.frombuffer(packed, np.uint8)
            return len(packed), body.size
        out[HEADER_BYTES : HEADER_BYTES + body.size] = body
        return body.size, 0
