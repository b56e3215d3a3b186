"""The page frame: what one message of pages looks like on the wire.

Owns the layout, the limits, the seeded checksum and the assignment of pages to lanes. What arrives
is checked by `parse`. Pure: does not touch guest memory (`encoder`, `decoder`) and knows no socket
(`link`).

Layout, little-endian throughout::

     0               4               8                               16
    +---------------+---------------+-------------------------------+
    | magic "vfpg"  | version u32   | checksum u64                  |
    +---------------+---------------+---------------+---------------+
    | sequence u64                  | round u32     | body_bytes u32|
    +-------+---+---+---------------+---------------+---------------+
    | pages | l | c | unpacked u32  |   pages u16, l: lane u8, c: coding u8
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
The checksum is XXH3-64, with the migration's secret seed; it finds corruption and mix-ups, it is no
authentication. It covers everything behind it (offset 16 to the end), in frames coded `RAW` with
the payload represented by the digests of its pages (XXH3-64 with the same seed, u64 each): these
the sender has made already, so it reads raw pages once less. `coding` says how the body is coded as
a whole, see `Coding`; `unpacked` is the length of a packed body before, no more than a frame could
hold as it is, and 0 for others.

A page that does not shrink is sent raw, so no compressed form is as long as a page. A copy names
its original, a page of the same lane: what that holds when the copy's turn comes follows from the
lane's order, and the base digest proves it. Pages of a frame are applied in their order. Each one
decodes to exactly one page, so a frame can cost its receiver at most `MAX_FRAME_PAGES` page writes
and no allocation beyond the frame.

A lane sees its frames numbered 0, 1, 2, ... without a gap. Pages are dealt to lanes in stripes of
`STRIPE_PAGES`, so that all versions of a page pass through one lane, in order (invariant I3).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

PAGE_BYTES: Final = 4096
VERSION: Final = 3
MAGIC: Final = b"vfpg"
HEADER_BYTES: Final = 40
MAX_FRAME_PAGES: Final = 65535  # the header's counter has 16 bits
MAX_FRAME_BYTES: Final = 8 << 20  # what a receiver must be ready to hold for a frame of its window
DEFAULT_FRAME_BYTES: Final = 1 << 20  # large enough that work done once a frame costs nothing
MIN_FRAME_BYTES: Final = 8192  # header and one page of any kind
STRIPE_PAGES: Final = 64  # one word of a bitmap belongs to one lane
MAX_LANES: Final = 255
ENTRY_BYTES: Final = 7  # of a page in the tables: index, length, kind
BASE_BYTES: Final = 8  # what a page that needs a base adds to that
ORIGINAL_BYTES: Final = 4  # the payload of a copy
HEADER: Final = struct.Struct("<4sIQQIIHBBI")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = 8
CHECKED_OFFSET: Final = 16
"""Offset of the first byte that the checksum covers."""


class Coding(IntEnum):
    """How a frame's body is coded as a whole."""

    PLAIN = 0
    """The body stands there as it is."""
    ZSTD = 1
    """Packed by zstandard (`codec`)."""
    RAW = 2
    """As it is, and its pages are zero or raw: the checksum covers their digests."""


class PageKind(IntEnum):
    """How a page's bytes stand in the payload."""

    ZERO = 0
    """Nothing: the page is all zero."""
    RAW = 1
    """The page as it is, 4096 bytes."""
    LZ4 = 2
    """An LZ4 block."""
    DELTA = 3
    """Runs of bytes that differ from the base, see `transport.kernels.pages`."""
    LZ4_BASE = 4
    """An LZ4 block with the base as its dictionary."""
    COPY = 5
    """The number, u32, of another page: the base, whose bytes this one has."""


FIRST_KIND_WITH_BASE: Final = PageKind.DELTA


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
    raw_digests: npt.NDArray[np.uint64] | None = None,
) -> int:
    """Write the header in front of a body that stands at `out[40:40 + body_bytes]`.

    `unpacked_bytes` is the length that a packed body had before, 0 for one as it is. `raw_digests`
    are those of the payload's pages if the frame is to be coded `RAW`. Returns the frame's whole
    length in bytes. The fields' ranges are the caller's business.
    """
    view = out.data[: HEADER_BYTES + body_bytes]
    coding = Coding.PLAIN
    if unpacked_bytes:
        coding = Coding.ZSTD
    elif raw_digests is not None:
        coding = Coding.RAW
    fields = (sequence, round_no, body_bytes, n_pages, lane, coding, unpacked_bytes)
    HEADER.pack_into(view, 0, MAGIC, VERSION, 0, *fields)
    if raw_digests is not None:
        checksum = raw_checksum(view, raw_digests, seed)
    else:
        checksum = xxhash.xxh3_64_intdigest(view[CHECKED_OFFSET:], seed)
    _CHECKSUM.pack_into(view, _CHECKSUM_OFFSET, checksum)
    return len(view)


def raw_checksum(view: memoryview, digests: npt.NDArray[np.uint64], seed: int) -> int:
    """The checksum of a frame coded `RAW`, the payload's pages having these digests."""
    hasher = xxhash.xxh3_64(view[CHECKED_OFFSET:HEADER_BYTES], seed)
    hasher.update(digests.data)
    hasher.update(view[HEADER_BYTES + digests.size * PAGE_BYTES :])
    return hasher.intdigest()
