"""The check of a page frame that has arrived, complete as far as that is possible without decoding.

Owns what is refused, and why; the layout and its limits are `frames`', the loop over the tables
`transport.kernels.tables`'. Pure: bytes in, arrays or a `FrameError` out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from transport.kernels.digests import digest_payload
from transport.kernels.tables import (
    BAD_INDEX,
    BAD_KIND,
    BAD_LANE,
    BAD_LENGTH,
    BAD_ORIGINAL,
    BAD_SUM,
    NO_ROOM,
    ReadTables,
    new_tables,
    read_tables,
)
from transport.wire.codec import unpack_body
from transport.wire.errors import FrameError
from transport.wire.frames import (
    BASE_BYTES,
    CHECKED_OFFSET,
    ENTRY_BYTES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_FRAME_BYTES,
    PAGE_BYTES,
    VERSION,
    Coding,
    PageKind,
    raw_checksum,
)

Buffer = bytes | bytearray | memoryview

_LAST_CODING = max(Coding)
_LAST_KIND = max(PageKind)
_MAX_PAGE_BYTES = PAGE_BYTES + ENTRY_BYTES + BASE_BYTES  # more than any page needs


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that has been checked; every array is private to it except `payload`.

    `index` uint32 (n), `kind` uint8 (n), `length` uint16 (n), `offset` uint32 (n, start of each
    page in `payload`), `base` uint64 (n, the digest of the base, 0 for kinds without one),
    `payload` uint8 (view into the frame that was parsed, or into its body unpacked).
    """

    sequence: int
    round_no: int
    lane: int
    index: npt.NDArray[np.uint32]
    kind: npt.NDArray[np.uint8]
    length: npt.NDArray[np.uint16]
    offset: npt.NDArray[np.uint32]
    base: npt.NDArray[np.uint64]
    payload: npt.NDArray[np.uint8]


def parse_frame(frame: Buffer, *, seed: int, n_pages: int, lane: int = 0, lanes: int = 1) -> Frame:
    """Check a frame.

    `n_pages` bounds the indices; every index must belong to `lane` of `lanes`. The sequence number
    is checked by `Decoder`, which knows the one before. Raises `FrameError`, and nothing else,
    whatever the bytes are.
    """
    view = memoryview(frame).cast("B")
    if not HEADER_BYTES < len(view) <= MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(view)} bytes")
    magic, version, checksum, *checked = HEADER.unpack_from(view)
    sequence, round_no, body_bytes, pages, frame_lane, coding, unpacked = checked
    if magic != MAGIC:
        raise FrameError("not a page frame")
    if version != VERSION:
        raise FrameError(f"page frames of version {version}; this side speaks {VERSION}")
    if body_bytes != len(view) - HEADER_BYTES:
        raise FrameError(f"a body of {body_bytes} bytes in a frame of {len(view)}")
    if coding > _LAST_CODING:
        raise FrameError(f"unknown coding {coding}")
    body = view[HEADER_BYTES:]
    if coding == Coding.RAW:
        expected = _checksum_of_raw(view, pages, seed)
    else:
        expected = xxhash.xxh3_64_intdigest(view[CHECKED_OFFSET:], seed)
    if checksum != expected:
        raise FrameError("checksum mismatch")
    if frame_lane != lane:
        raise FrameError(f"a frame of lane {frame_lane} on lane {lane}")
    if coding == Coding.ZSTD:
        most = min(MAX_FRAME_BYTES - HEADER_BYTES, pages * _MAX_PAGE_BYTES)
        if not 0 < unpacked <= most:
            raise FrameError(f"{pages} pages in a body of {unpacked} bytes when unpacked")
        body = unpack_body(body, unpacked)
    elif unpacked != 0:
        raise FrameError(f"a body as it is that claims to be packed from {unpacked} bytes")
    if pages == 0 or pages * ENTRY_BYTES > len(body):
        raise FrameError(f"{pages} pages in a body of {len(body)} bytes")
    content = np.frombuffer(body, np.uint8)
    tables = new_tables(pages)
    last_kind = PageKind.RAW if coding == Coding.RAW else _LAST_KIND
    payload_bytes = read_tables(content, n_pages, lane, lanes, last_kind, tables)
    if payload_bytes < 0:
        raise FrameError(_what_is_wrong(payload_bytes, tables, content.size, n_pages, lane))
    return Frame(sequence, round_no, lane, *tables, content[:payload_bytes])


def _checksum_of_raw(view: memoryview, pages: int, seed: int) -> int:
    """What the checksum of a frame of raw pages has to be. `FrameError`: it is no such frame."""
    payload_bytes = len(view) - HEADER_BYTES - pages * ENTRY_BYTES
    if payload_bytes < 0 or payload_bytes % PAGE_BYTES:
        raise FrameError(f"{pages} pages, zero or as they are, in a frame of {len(view)} bytes")
    payload = np.frombuffer(view, np.uint8, payload_bytes, HEADER_BYTES)
    return raw_checksum(view, digest_payload(payload, seed), seed)


def _what_is_wrong(found: int, tables: ReadTables, body_bytes: int, n_pages: int, lane: int) -> str:
    pages = tables.index.size
    if found == NO_ROOM:
        return f"a body of {body_bytes} bytes cannot hold the tables of {pages} pages"
    if found == BAD_SUM:
        return f"pages of {tables.length.sum()} bytes in a payload of another length"
    return {
        BAD_KIND: _bad_kind(tables.kind.max()),
        BAD_LENGTH: "a page's length does not suit its kind",
        BAD_INDEX: f"page {tables.index.max()} of {n_pages}",
        BAD_LANE: f"a page of another lane on lane {lane}",
        BAD_ORIGINAL: f"a copy of a page that is none of lane {lane}",
    }[found]


def _bad_kind(kind: int) -> str:
    if kind > _LAST_KIND:
        return f"unknown page kind {kind}"
    return f"a page of kind {kind} in a frame of raw pages"
