"""XBZRLE: how QEMU's migration codes a page as its difference from what was sent before.

A yardstick of our own making, after the format's description in QEMU's docs (devel/migration) and
the page headers of its RAM stream. The cache is taken to be without limit, so every page has a
base.

Runs of equal and of differing bytes alternate, beginning with equal ones, each in front by its
length in ULEB128; differing bytes follow their length. The last run of equal bytes is left out. A
page that would need more than its own size is sent as it is.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from transport.wire.frames import PAGE_BYTES

HEADER_BYTES: Final = 8
"""In front of every page: its address and flags; the name of its block is left out."""
ZERO_BYTES: Final = 1
"""What a page of zeros adds to its header."""
XBZRLE_BYTES: Final = 3
"""What a coded page adds to its header: a flag and its length."""

Bytes = npt.NDArray[np.uint8]


def encode(page: Bytes, base: Bytes) -> bytes | None:
    """`page` as its difference from `base` (both uint8[4096]); empty if they are equal, None if
    that is longer than a page."""
    starts, ends = _changes(page, base)
    if encoded_bytes(page, base) > PAGE_BYTES:
        return None
    out = bytearray()
    at = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        out += _uleb128(start - at) + _uleb128(end - start) + page[start:end].tobytes()
        at = end
    return bytes(out)


def decode(data: bytes, base: Bytes) -> Bytes:
    """The page that was encoded against `base`. ValueError if `data` is malformed."""
    page = base.copy()
    at = byte = 0
    while at < len(data):
        equal, at = _read_uleb128(data, at)
        differing, at = _read_uleb128(data, at)
        byte += equal
        if not differing or byte + differing > PAGE_BYTES or at + differing > len(data):
            raise ValueError("a run that does not fit")
        page[byte : byte + differing] = np.frombuffer(data[at : at + differing], np.uint8)
        byte += differing
        at += differing
    return page


def encoded_bytes(page: Bytes, base: Bytes) -> int:
    """How many bytes `page` becomes, also where that is longer than a page."""
    starts, ends = _changes(page, base)
    equal = starts - np.concatenate([[0], ends])[: starts.size]
    lengths = np.concatenate([equal, ends - starts])
    # A length is below 4097, so it takes one byte or two.
    return int(np.sum(ends - starts) + lengths.size + np.count_nonzero(lengths >= 128))


def wire_bytes(pages: Bytes, bases: Bytes) -> int:
    """What pages (uint8[n, 4096]) take in QEMU's stream if it knows `bases`; equal ones nothing."""
    total = 0
    for page, base in zip(pages, bases, strict=True):
        if not page.any():
            total += HEADER_BYTES + ZERO_BYTES
            continue
        coded = encoded_bytes(page, base)
        if coded > PAGE_BYTES:
            total += HEADER_BYTES + PAGE_BYTES
        elif coded:
            total += HEADER_BYTES + XBZRLE_BYTES + coded
    return total


def _changes(page: Bytes, base: Bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where runs of differing bytes start, and where they end."""
    differs = np.zeros(PAGE_BYTES + 2, np.int8)
    differs[1:-1] = page != base
    edges = np.flatnonzero(np.diff(differs))
    return edges[::2], edges[1::2]


def _uleb128(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])


def _read_uleb128(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    if at < len(data) and data[at] < 128:
        return data[at], at + 1
    if at + 1 < len(data) and data[at + 1] < 128:
        return data[at] & 127 | data[at + 1] << 7, at + 2
    raise ValueError("half a number, or one of more than two bytes")
