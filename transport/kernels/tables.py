"""The receiver's check of a frame's tables: what they say, copied out and found consistent.

Owns the loop; the layout is in `transport.wire.frames`, the words of a refusal in
`transport.receiving.parse`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numba import types

from transport.kernels import externals
from transport.kernels.declare import inlined, kernel, named_tuple, readonly, writable
from transport.wire.frames import (
    BASE_BYTES,
    ENTRY_BYTES,
    FIRST_KIND_WITH_BASE,
    ORIGINAL_BYTES,
    PAGE_BYTES,
    STRIPE_PAGES,
    PageKind,
)

# What `read_tables` returns for tables that are not consistent.
BAD_KIND: Final = -1
NO_ROOM: Final = -2
BAD_LENGTH: Final = -3
BAD_SUM: Final = -4
BAD_INDEX: Final = -5
BAD_LANE: Final = -6
BAD_ORIGINAL: Final = -7

_ZERO: Final = int(PageKind.ZERO)
_RAW: Final = int(PageKind.RAW)
_COPY: Final = int(PageKind.COPY)
_FIRST_WITH_BASE: Final = int(FIRST_KIND_WITH_BASE)


class ReadTables(NamedTuple):
    """The tables of a frame, each as long as it has pages: `transport.receiving.parse`."""

    index: Any
    kind: Any
    length: Any
    offset: Any
    base: Any


def new_tables(pages: int) -> ReadTables:
    """Room for the tables of so many pages."""
    return ReadTables(
        index=np.empty(pages, np.uint32),
        kind=np.empty(pages, np.uint8),
        length=np.empty(pages, np.uint16),
        offset=np.empty(pages, np.uint32),
        base=np.zeros(pages, np.uint64),
    )


_TABLES = named_tuple(
    (
        writable(types.uint32),
        writable(types.uint8),
        writable(types.uint16),
        writable(types.uint32),
        writable(types.uint64),
    ),
    ReadTables,
)


@inlined
def original_of_copy(payload, at):  # type: ignore[no-untyped-def]
    """The page that the copy at `payload[at:]` names; at any alignment."""
    page = np.int64(0)
    for byte in range(ORIGINAL_BYTES):
        page |= np.int64(payload[at + byte]) << (8 * byte)
    return page


@kernel(readonly(types.uint8), types.int64, types.int64, types.int64, types.int64, _TABLES)
def read_tables(body, n_pages, lane, lanes, last_kind, tables):  # type: ignore[no-untyped-def]
    """Copy the tables at the end of `body` and check them against each other and the limits.

    `tables` is a `ReadTables` for the frame's number of pages, whose entries `body` has room for.
    Every index, and every original of a copy, must be below `n_pages` and of `lane` of `lanes`, no
    kind greater than `last_kind`, every length suit its kind, and the payload be as long as the
    lengths say. Returns the length of the payload in bytes, or one of the constants above; `tables`
    then holds what was copied so far.
    """
    pages = tables.index.size
    start = body.ctypes.data
    kinds_at = body.size - pages
    externals.memcpy(tables.kind.ctypes.data, start + kinds_at, pages)
    bases = 0
    for position in range(pages):
        if tables.kind[position] > last_kind:
            return BAD_KIND
        bases += tables.kind[position] >= _FIRST_WITH_BASE
    payload_bytes = body.size - pages * ENTRY_BYTES - bases * BASE_BYTES
    if payload_bytes < 0:
        return NO_ROOM
    indices_at = payload_bytes + bases * BASE_BYTES
    externals.memcpy(tables.index.ctypes.data, start + indices_at, pages * 4)
    externals.memcpy(tables.length.ctypes.data, start + indices_at + pages * 4, pages * 2)

    base_at = start + payload_bytes
    offset = np.int64(0)
    for position in range(pages):
        kind = tables.kind[position]
        length = np.int64(tables.length[position])
        if kind == _ZERO:
            suits = length == 0
        elif kind == _RAW:
            suits = length == PAGE_BYTES
        elif kind == _COPY:
            suits = length == ORIGINAL_BYTES
        else:
            suits = 0 < length < PAGE_BYTES
        if not suits:
            return BAD_LENGTH
        tables.offset[position] = offset
        offset += length
        if kind >= _FIRST_WITH_BASE:
            externals.memcpy(tables.base.ctypes.data + position * BASE_BYTES, base_at, BASE_BYTES)
            base_at += BASE_BYTES
    if offset != payload_bytes:
        return BAD_SUM
    for position in range(pages):
        page = np.int64(tables.index[position])
        if page >= n_pages:
            return BAD_INDEX
        if page // STRIPE_PAGES % lanes != lane:
            return BAD_LANE
        if tables.kind[position] == _COPY:
            original = original_of_copy(body, np.int64(tables.offset[position]))
            if original >= n_pages or original // STRIPE_PAGES % lanes != lane:
                return BAD_ORIGINAL
    return payload_bytes
