"""The page frame: what one message of pages looks like on the wire, and the check of what arrives.

Owns the layout, the limits, the seeded checksum and the assignment of pages to lanes. Pure: bytes
in, arrays or a `FrameError` out. Does not touch guest memory (`encoder`, `decoder`) and knows no
socket (`link`).

Layout, little-endian throughout::

     0               4               8                               16
    +---------------+---------------+-------------------------------+
    | magic "vfpg"  | version u32   | checksum u64                  |
    +---------------+---------------+---------------+---------------+
    | sequence u64                  | round u32     | body_bytes u32|
    +-------+---+---+---------------+---------------+---------------+
    | pages | l | c | unpacked u32  |   pages u16, l: lane u8, c: codec u8
    +-------+---+---+---------------+
    32      34  35  36              40: body, `body_bytes` long; as it is or unpacked:
    +--------------------------------------------------------+
    | payload: the pages' bytes one after the other          |
    | base digest  u64 x pages of a kind that needs a base   |
    | index        u32 x pages                               |
    | length       u16 x pages   (of each page in payload)   |
    | kind         u8  x pages                               |
    +--------------------------------------------------------+

The tables stand behind the payload because the encoder knows their size only when it is done.
The checksum is XXH3-64, with the migration's secret seed, over everything behind it (offset 16 to
the end); it finds corruption and mix-ups, it is no authentication. `codec` says how the body is
coded as a whole: 0, as it is, `unpacked` being 0; or 1, packed by zstandard (`codec`), `unpacked`
being the length of the body before, no more than a frame could hold as it is. Others are refused.

Pages of a frame are applied in their order. Each one decodes to exactly one page, so a frame can
cost its receiver at most `MAX_FRAME_PAGES` page writes and no allocation beyond the frame.

A lane sees its frames numbered 0, 1, 2, ... without a gap. Pages are dealt to lanes in stripes of
`STRIPE_PAGES`, so that all versions of a page pass through one lane, in order (invariant I3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from transport.codec import unpack_body
from transport.errors import FrameError

PAGE_BYTES: Final = 4096
VERSION: Final = 1
MAGIC: Final = b"vfpg"
HEADER_BYTES: Final = 40
MAX_FRAME_PAGES: Final = 65535  # the header's counter has 16 bits
MAX_FRAME_BYTES: Final = 8 << 20  # what a receiver must be ready to hold for a frame of its window
DEFAULT_FRAME_BYTES: Final = 1 << 20  # large enough that work done once a frame costs nothing
MIN_FRAME_BYTES: Final = 8192  # header and one page of any kind
STRIPE_PAGES: Final = 64  # one word of a bitmap belongs to one lane
MAX_LANES: Final = 255
CODEC_NONE: Final = 0
CODEC_ZSTD: Final = 1
ENTRY_BYTES: Final = 7  # of a page in the tables: index, length, kind
BASE_BYTES: Final = 8  # what a page that needs a base adds to that
_MAX_PAGE_BYTES: Final = PAGE_BYTES + ENTRY_BYTES + BASE_BYTES  # more than any page needs

Buffer = bytes | bytearray | memoryview

_HEADER = struct.Struct("<4sIQQIIHBBI")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = 8
_CHECKED_OFFSET = 16  # where that starts which the checksum covers


class PageKind(IntEnum):
    """How a page's bytes stand in the payload."""

    ZERO = 0
    """Nothing: the page is all zero."""
    RAW = 1
    """4096 bytes."""
    LZ4 = 2
    """An LZ4 block."""
    DELTA = 3
    """Runs of bytes that differ from the base, see `transport.kernels.pages`."""
    LZ4_BASE = 4
    """An LZ4 block with the base as its dictionary."""


FIRST_KIND_WITH_BASE: Final = PageKind.DELTA

# By kind. A page that does not shrink is sent raw, so no other form is as long as a page.
_MIN_LENGTH = np.array([0, PAGE_BYTES, 1, 1, 1], np.uint16)
_MAX_LENGTH = np.array([0] + [PAGE_BYTES] + 3 * [PAGE_BYTES - 1], np.uint16)


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


def lane_of(index: int, lanes: int) -> int:
    """The lane, of `lanes`, that carries page `index` for the whole migration."""
    return index // STRIPE_PAGES % lanes


def split_by_lane(indices: npt.NDArray[np.uint32], lanes: int) -> list[npt.NDArray[np.uint32]]:
    """Deal page indices (uint32, 1-D) to `lanes` lanes; order is kept within each."""
    if lanes == 1:
        return [indices]
    lane = indices // np.uint32(STRIPE_PAGES) % np.uint32(lanes)
    return [indices[lane == each] for each in range(lanes)]


def seal_frame(
    out: npt.NDArray[np.uint8],
    *,
    body_bytes: int,
    n_pages: int,
    sequence: int,
    round_no: int,
    lane: int,
    seed: int,
    unpacked_bytes: int = 0,
) -> int:
    """Write the header in front of a body that stands at `out[40:40 + body_bytes]`.

    `unpacked_bytes` is the length that a packed body had before, 0 for one as it is. Returns the
    frame's whole length in bytes. The fields' ranges are the caller's business.
    """
    view = out.data
    end = HEADER_BYTES + body_bytes
    codec = CODEC_ZSTD if unpacked_bytes else CODEC_NONE
    fields = (sequence, round_no, body_bytes, n_pages, lane, codec, unpacked_bytes)
    _HEADER.pack_into(view, 0, MAGIC, VERSION, 0, *fields)
    checksum = xxhash.xxh3_64_intdigest(view[_CHECKED_OFFSET:end], seed)
    _CHECKSUM.pack_into(view, _CHECKSUM_OFFSET, checksum)
    return end


def parse_frame(frame: Buffer, *, seed: int, n_pages: int, lane: int = 0, lanes: int = 1) -> Frame:
    """Check a frame completely, as far as that is possible without decoding pages.

    `n_pages` bounds the indices; every index must belong to `lane` of `lanes`. The sequence number
    is checked by `Decoder`, which knows the one before. Raises `FrameError`, and nothing else,
    whatever the bytes are.
    """
    view = memoryview(frame).cast("B")
    if not HEADER_BYTES < len(view) <= MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(view)} bytes")
    magic, version, checksum, *checked = _HEADER.unpack_from(view)
    sequence, round_no, body_bytes, pages, frame_lane, codec, unpacked = checked
    if magic != MAGIC:
        raise FrameError("not a page frame")
    if version != VERSION:
        raise FrameError(f"page frames of version {version}; this side speaks {VERSION}")
    if body_bytes != len(view) - HEADER_BYTES:
        raise FrameError(f"a body of {body_bytes} bytes in a frame of {len(view)}")
    if checksum != xxhash.xxh3_64_intdigest(view[_CHECKED_OFFSET:], seed):
        raise FrameError("checksum mismatch")
    if codec not in (CODEC_NONE, CODEC_ZSTD):
        raise FrameError(f"unknown codec {codec}")
    if frame_lane != lane:
        raise FrameError(f"a frame of lane {frame_lane} on lane {lane}")
    body = view[HEADER_BYTES:]
    if codec == CODEC_ZSTD:
        most = min(MAX_FRAME_BYTES - HEADER_BYTES, pages * _MAX_PAGE_BYTES)
        if not 0 < unpacked <= most:
            raise FrameError(f"{pages} pages in a body of {unpacked} bytes when unpacked")
        body = unpack_body(body, unpacked)
    elif unpacked != 0:
        raise FrameError(f"a body as it is that claims to be packed from {unpacked} bytes")
    if pages == 0 or pages * ENTRY_BYTES > len(body):
        raise FrameError(f"{pages} pages in a body of {len(body)} bytes")
    header = (sequence, round_no, lane)
    return _parse_body(np.frombuffer(body, np.uint8), pages, header, n_pages, lanes)


def _parse_body(
    body: npt.NDArray[np.uint8],
    pages: int,
    header: tuple[int, int, int],
    n_pages: int,
    lanes: int,
) -> Frame:
    kind = body[body.size - pages :].copy()
    if kind.max() > max(PageKind):
        raise FrameError(f"unknown page kind {kind.max()}")
    needs_base = kind >= FIRST_KIND_WITH_BASE
    n_bases = int(np.count_nonzero(needs_base))
    payload_bytes = body.size - pages * ENTRY_BYTES - n_bases * BASE_BYTES
    if payload_bytes < 0:
        raise FrameError(f"a body of {body.size} bytes cannot hold the tables of {pages} pages")
    # Copies, because the tables stand at odd addresses.
    tables = body[payload_bytes:].tobytes()
    index = np.frombuffer(tables, np.uint32, pages, n_bases * BASE_BYTES)
    length = np.frombuffer(tables, np.uint16, pages, n_bases * BASE_BYTES + pages * 4)
    base = np.zeros(pages, np.uint64)
    if n_bases:
        base[needs_base] = np.frombuffer(tables, np.uint64, n_bases)

    if (length < _MIN_LENGTH[kind]).any() or (length > _MAX_LENGTH[kind]).any():
        raise FrameError("a page's length does not suit its kind")
    ends = np.cumsum(length, dtype=np.uint32)
    if ends[-1] != payload_bytes:
        raise FrameError(f"pages of {ends[-1]} bytes in a payload of {payload_bytes}")
    if index.max() >= n_pages:
        raise FrameError(f"page {index.max()} of {n_pages}")
    sequence, round_no, lane = header
    if lanes > 1 and (index // np.uint32(STRIPE_PAGES) % np.uint32(lanes) != lane).any():
        raise FrameError(f"a page of another lane on lane {lane}")
    payload = body[:payload_bytes]
    return Frame(sequence, round_no, lane, index, kind, length, ends - length, base, payload)
