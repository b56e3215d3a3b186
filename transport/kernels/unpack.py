"""The receiver's loop over pages: from a checked frame into guest memory.

Owns the decoding of a page's form (see `pages`) and how pages get into memory. The kernel trusts
its arguments, which are checked by `parse.parse_frame` and `Decoder`; what a page's own bytes say
(LZ4 block, delta runs) is checked here, because only decoding shows it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import types

from transport.kernels import externals
from transport.kernels.declare import inlined, kernel, readonly, writable
from transport.kernels.externals import prefetch
from transport.kernels.files import FILES, fill_hole, forget_hole, in_hole, write_pages
from transport.kernels.pages import BASE_AT, PAGE_AT, WORKSPACE, prefetch_page
from transport.kernels.tables import original_of_copy
from transport.wire.frames import PAGE_BYTES, PageKind

_ZERO: Final = int(PageKind.ZERO)
_RAW: Final = int(PageKind.RAW)
_LZ4: Final = int(PageKind.LZ4)
_LZ4_BASE: Final = int(PageKind.LZ4_BASE)
_DELTA_RUNS: Final = int(PageKind.DELTA)
_COPY: Final = int(PageKind.COPY)


@inlined
def _get_number(payload, at, end):  # type: ignore[no-untyped-def]
    """The number at `at` and where it ends; -1 if it is malformed."""
    if at >= end:
        return -1, at
    first = np.int64(payload[at])
    if first < 128:
        return first, at + 1
    if at + 1 >= end or payload[at + 1] >= 128:
        return -1, at
    return (first & 127) | (np.int64(payload[at + 1]) << 7), at + 2


@inlined
def _is_delta(payload, at, end):  # type: ignore[no-untyped-def]
    """Whether these bytes are delta runs that stay within a page."""
    byte = 0
    while at < end:
        keep, at = _get_number(payload, at, end)
        replace, at = _get_number(payload, at, end)
        if keep < 0 or replace <= 0:
            return False
        byte += keep + replace
        at += replace
        if byte > PAGE_BYTES or at > end:
            return False
    return True


@inlined
def _apply_delta(payload, at, end, page):  # type: ignore[no-untyped-def]
    """Apply delta runs that `_is_delta` has passed to the page at the address `page`."""
    while at < end:
        keep, at = _get_number(payload, at, end)
        replace, at = _get_number(payload, at, end)
        page += keep
        externals.memcpy(page, payload.ctypes.data + at, replace)
        page += replace
        at += replace


@inlined
def _run_of_raw(index, kind, start, limit):  # type: ignore[no-untyped-def]
    """How many pages from position `start` on are raw and neighbours, up to page `limit`."""
    end = start + 1
    while (
        end < index.size
        and kind[end] == _RAW
        and index[end] == index[end - 1] + 1
        and index[end] < limit
    ):
        end += 1
    return end - start


@inlined
def _decode(held_at, in_place, form, source, n_bytes, base, payload, seed, workspace):  # type: ignore[no-untyped-def]
    """Decode a page that is not as it is into the workspace: 1, 0: the base is not there, -1:
    malformed. `held_at` is the address of what has to be the base; `in_place`, for a delta: it is
    changed there."""
    work = workspace.words.ctypes.data
    if form == _LZ4:
        n_decoded = externals.lz4_decompress(source, work + PAGE_AT, n_bytes, PAGE_BYTES, 0, 0)
        return 1 if n_decoded == PAGE_BYTES else -1
    held = held_at
    if not in_place:
        held = work + (BASE_AT if form == _LZ4_BASE else PAGE_AT)
        externals.memcpy(held, held_at, PAGE_BYTES)
    if externals.xxh3_64(held, PAGE_BYTES, seed) != base:
        return 0
    if form == _COPY:
        return 1
    if form == _DELTA_RUNS:
        at = np.int64(source - payload.ctypes.data)
        if not _is_delta(payload, at, at + n_bytes):
            return -1
        _apply_delta(payload, at, at + n_bytes, held)
        return 1
    n_decoded = externals.lz4_decompress(
        source, work + PAGE_AT, n_bytes, PAGE_BYTES, work + BASE_AT, PAGE_BYTES
    )
    return 1 if n_decoded == PAGE_BYTES else -1


@kernel(
    writable(types.uint8),
    FILES,
    readonly(types.uint32),
    readonly(types.uint8),
    readonly(types.uint16),
    readonly(types.uint32),
    readonly(types.uint64),
    readonly(types.uint8),
    types.uint64,
    WORKSPACE,
    writable(types.uint32),
)
def apply_pages(  # type: ignore[no-untyped-def]
    memory, files, index, kind, length, offset, base, payload, seed, workspace, rejected
):
    """Decode the pages of a checked frame one by one and write them.

    The arrays are those of a `parse.Frame`; `files` is what lies behind `memory`. Pages that do
    not hold their base, or whose original does not, are left alone and listed in `rejected`
    (uint32, as long as `index`). An original in a hole is none, and is not touched.
    Returns how many these are; for a page whose bytes are malformed, -1 minus its position, the
    pages in front of it being written.

    A delta changes the page where it is. If somebody else, a VMM that loads its stream, writes to
    that page at the same time, it may be neither's afterwards, as any page that is written from two
    sides: its digest tells.

    Cost of a page: zero, nothing in a hole, else 4096 bytes cleared; raw, one copy; a delta, the
    digest of the page and a copy of what changed; by LZ4, two copies, one of them within the
    first-level cache, and with a base also the reading and digest of that, which is all that
    precedes the write of a copy. The next page is fetched meanwhile; of a raw one a line, because
    all of it is written without being read, but not before its address is translated.
    """
    work = workspace.words.ctypes.data
    n_rejected = 0
    forget_hole(files)
    position = 0
    while position < index.size:
        page = np.int64(index[position])
        target = memory.ctypes.data + page * PAGE_BYTES
        source = payload.ctypes.data + np.int64(offset[position])
        form = kind[position]
        base_page = page
        held = True
        if form == _COPY:
            # Asked first: what `in_hole` remembers has to be of the page that is written.
            base_page = original_of_copy(payload, np.int64(offset[position]))
            held = not in_hole(files, base_page)
        untouched = in_hole(files, page)
        if position + 1 < index.size:
            following = memory.ctypes.data + np.int64(index[position + 1]) * PAGE_BYTES
            if kind[position + 1] != _RAW:
                prefetch_page(following)
            else:
                prefetch(np.uint64(following))
        if form == _ZERO:
            if not untouched:
                memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = 0
            position += 1
            continue
        count = 1
        if form == _RAW:
            count = _run_of_raw(index, kind, position, files.hole[2] if untouched else page + 1)
        else:
            found = 0
            in_place = form == _DELTA_RUNS and not untouched
            if held:
                found = _decode(
                    memory.ctypes.data + base_page * PAGE_BYTES,
                    in_place,
                    form,
                    source,
                    np.int64(length[position]),
                    base[position],
                    payload,
                    seed,
                    workspace,
                )
            if found < 0:
                return -1 - position
            if found == 0:
                rejected[n_rejected] = page
                n_rejected += 1
            if found == 0 or in_place:
                position += 1
                continue
            source = work + PAGE_AT
        if not (untouched and write_pages(files, page, source, count)):
            externals.memcpy(target, source, count * PAGE_BYTES)
        if untouched:
            fill_hole(files, page, count)
        position += count
    return n_rejected
