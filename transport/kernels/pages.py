"""The sender's loop over pages: from live memory into a frame.

Owns what happens to one page: snapshot, zero test, digest, comparison with what the receiver holds,
choice of form, table of originals, cache of bases; the way back is `unpack`. Kernels trust their
arguments: sizes and ranges are checked by `Encoder`.

**Delta runs.** A page is written as its difference from a base that the receiver holds: pairs of
numbers (bytes to keep, bytes to replace), each pair followed by the replacing bytes; what is left
of the page is kept. A number is coded in 7 bits a byte, lowest first, in at most two bytes. It is
the idea of XBZRLE (QEMU, docs/xbzrle.txt).

**Choice of form.** Zero pages cost nothing. `EFFORT_RAW`: the others are sent as they are and are
no bases for later. `EFFORT_DELTA`: if there is a base and few words changed, delta runs are
tried, and taken if short; else the page is sent as it is. `EFFORT_PACKED`, for a body that is
compressed as a whole: likewise, with longer deltas. `EFFORT_LZ4`: as `EFFORT_DELTA`, but unless the
delta is very short LZ4 is tried, with the base as its dictionary if the page still has something of
it: that finds content that moved within the page, too, and on recorded guests it is never much
longer, and often shorter, than LZ4 of the page's XOR with the base. The shortest form wins; a page
that does not shrink by `_MIN_SAVING_BYTES` is sent raw, which is cheaper to apply.

**Copies.** Where pages are compressed, one whose bytes another page has is sent as that page's
number, if the lane has sent that page before, and with these bytes. A table of the lane says which
page was encoded last of those whose digests end in the same bits; what else shared the entry is not
found any more. An entry may be out of date: it counts only if the page's digest is the same, and if
it has the same bytes now, for of a TiB's 2^28 pages two that differ have one digest with a
probability of 1/512. That is live memory, but only to refuse by: what is sent is the snapshot. A
page with a very short delta is neither looked up nor entered: that would cost cache misses, and
gain nothing.

**Bases.** A page that is known to be zero at the receiver has zeros for its base, others have what
the cache holds of them: a slot has the snapshot that was sent last. Slots are reused in clock order
(second chance); the hand gives up after `_CLOCK_STEPS`, so that each page costs a bounded time.

**Holes.** A page of which nothing is known and that lies in a hole of its file is a page of zeros;
it is not touched, for that would make it a page of memory.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from transport.kernels import externals
from transport.kernels.declare import inlined, kernel, named_tuple, readonly, writable
from transport.kernels.externals import count_ones, prefetch, trailing_zeros
from transport.kernels.files import FILES, forget_hole, in_hole
from transport.wire.frames import (
    BASE_BYTES,
    ENTRY_BYTES,
    FIRST_KIND_WITH_BASE,
    MAX_FRAME_PAGES,
    ORIGINAL_BYTES,
    PAGE_BYTES,
    STRIPE_PAGES,
    PageKind,
)

PAGE_WORDS: Final = PAGE_BYTES // 8
UNKNOWN: Final = 0
"""Digest of a page of which nothing is known. A page that really has it is sent every time."""
NO_PAGE: Final = 0xFFFFFFFF
"""Owner of a free slot."""

# How much is done for a page, see "Choice of form".
EFFORT_RAW: Final = 0
EFFORT_LZ4: Final = 1
EFFORT_PACKED: Final = 2
EFFORT_DELTA: Final = 3

# What `encode_pages` counts: the number of pages by kind, then these.
COUNT_SAME: Final = len(PageKind)
COUNT_BODY_BYTES: Final = COUNT_SAME + 1
COUNTERS: Final = COUNT_BODY_BYTES + 1

# The workspace, in bytes. The base stands right in front of the snapshot because LZ4 is faster
# with a dictionary that its input continues.
BASE_AT: Final = 0
PAGE_AT: Final = BASE_AT + PAGE_BYTES
_MASK: Final = PAGE_AT + PAGE_BYTES
_DELTA: Final = _MASK + PAGE_BYTES // 8
_DELTA_ROOM: Final = 3072
WORKSPACE_BYTES: Final = _DELTA + _DELTA_ROOM

_MASK_WORDS: Final = PAGE_WORDS // 8  # a bit for each byte of the page
_CACHE_LINE_BYTES: Final = 64
_CLOCK_STEPS: Final = 32
_MIN_SAVING_BYTES: Final = 128
_SPARSE_WORDS: Final = 128  # with more words changed, LZ4 is nearly always shorter than runs
_SPARSE_DELTA_BYTES: Final = 1024  # likewise
_RELATED_WORDS: Final = 480  # with more words changed, a dictionary costs more time than it saves
_ACCELERATION: Final = 1  # LZ4's default
_SHORT_DELTA_BYTES: Final = 128  # so short that neither LZ4 nor an original is worth its time
_JOINED_GAP_BYTES: Final = 2  # a new run costs as much as bytes that did not change
_LONGEST_RUN_CODE_BYTES: Final = 4

_ZERO: Final = int(PageKind.ZERO)
_RAW: Final = int(PageKind.RAW)
_LZ4: Final = int(PageKind.LZ4)
_DELTA_RUNS: Final = int(PageKind.DELTA)
_LZ4_BASE: Final = int(PageKind.LZ4_BASE)
_COPY: Final = int(PageKind.COPY)
_FIRST_WITH_BASE: Final = int(FIRST_KIND_WITH_BASE)


class Knowledge(NamedTuple):
    """What is known of the receiver's pages; the last five are the part of one lane."""

    digests: Any
    """uint64 (pages), or `UNKNOWN`."""
    slots: Any
    """uint32 (pages): 1 + the page's slot in its lane's cache, or 0."""
    cache: Any
    """uint64 (slots * PAGE_WORDS): snapshots as sent."""
    owners: Any
    """uint32 (slots): the page in it, or `NO_PAGE`."""
    referenced: Any
    """uint8 (slots): used since the clock's hand came by."""
    hand: Any
    """int64 (1): the slot at which the clock's hand stands."""
    originals: Any
    """uint32 (a power of two): by the last bits of a digest, 1 + a page that had it, or 0."""


class Tables(NamedTuple):
    """The tables of a frame in the making, MAX_FRAME_PAGES long each: `transport.wire.frames`."""

    index: Any
    length: Any
    kind: Any
    base: Any
    digest: Any
    """Of the pages that `EFFORT_RAW` has put into the payload, in their order."""


class Workspace(NamedTuple):
    """The same memory as uint64 and as uint8: WORKSPACE_BYTES of scratch for one encoder or
    decoder, or the body of a frame, whose last bytes may be too few for a word.

    Numba could look at words as bytes by itself, at the price of a module of its own that takes
    long to import.
    """

    words: Any
    bytes: Any


def new_workspace() -> Workspace:
    """Aligned to a cache line."""
    words, line_words = WORKSPACE_BYTES // 8, _CACHE_LINE_BYTES // 8
    space = np.zeros(words + line_words, np.uint64)
    first = -space.ctypes.data % _CACHE_LINE_BYTES // 8
    return words_and_bytes(space[first : first + words].view(np.uint8))


def words_and_bytes(memory: npt.NDArray[np.uint8]) -> Workspace:
    """`memory` (uint8, 1-D, 8-byte aligned) in both ways."""
    return Workspace(memory[: memory.size // 8 * 8].view(np.uint64), memory)


_BYTES = readonly(types.uint8)
_OUT_BYTES = writable(types.uint8)
_OUT_U16 = writable(types.uint16)
_OUT_U32 = writable(types.uint32)
_OUT_U64 = writable(types.uint64)
_OUT_I64 = writable(types.int64)
_KNOWLEDGE = named_tuple(
    (_OUT_U64, _OUT_U32, _OUT_U64, _OUT_U32, _OUT_BYTES, _OUT_I64, _OUT_U32), Knowledge
)
WORKSPACE = named_tuple((_OUT_U64, _OUT_BYTES), Workspace)
_TABLES = named_tuple((_OUT_U32, _OUT_U16, _OUT_BYTES, _OUT_U64, _OUT_U64), Tables)


@inlined
def _snapshot(memory, page, words, first):  # type: ignore[no-untyped-def]
    """Copy a live page to `words[first:]`, reading each word once. True if it was all zero."""
    start = np.uint64(page) * np.uint64(PAGE_WORDS)
    seen = np.uint64(0)
    for word in range(PAGE_WORDS):
        value = memory[start + np.uint64(word)]
        words[np.uint64(first) + np.uint64(word)] = value
        seen |= value
    return seen == 0


@inlined
def prefetch_page(address):  # type: ignore[no-untyped-def]
    """Have a page fetched into the caches, without waiting for it."""
    for line in range(0, PAGE_BYTES, _CACHE_LINE_BYTES):
        prefetch(np.uint64(address) + np.uint64(line))


@inlined
def _load_base(cache, slot, workspace):  # type: ignore[no-untyped-def]
    """Copy a base from the cache into the workspace. Returns in how many words the page differs."""
    start = np.uint64(slot) * np.uint64(PAGE_WORDS)
    changed = 0
    for word in range(PAGE_WORDS):
        value = cache[start + np.uint64(word)]
        changed += value != workspace[PAGE_AT // 8 + word]
        workspace[BASE_AT // 8 + word] = value
    return changed


@inlined
def _load_zero_base(workspace):  # type: ignore[no-untyped-def]
    """Make a page of zeros the base. Returns in how many words the page differs."""
    changed = 0
    for word in range(PAGE_WORDS):
        changed += workspace[PAGE_AT // 8 + word] != 0
        workspace[BASE_AT // 8 + word] = 0
    return changed


@inlined
def _mark_changes(workspace):  # type: ignore[no-untyped-def]
    """Set a bit of the mask for each byte in which page and base differ; returns their number."""
    changed = 0
    for m in range(_MASK_WORDS):
        # Most of a page is as it was, which eight words at a time tell in one comparison.
        differs = np.uint64(0)
        for word in range(m * 8, m * 8 + 8):
            differs |= workspace[BASE_AT // 8 + word] ^ workspace[PAGE_AT // 8 + word]
        mask = np.uint64(0)
        if differs != 0:
            for k in range(8):
                word = m * 8 + k
                x = workspace[BASE_AT // 8 + word] ^ workspace[PAGE_AT // 8 + word]
                # The high bit of each byte that is not zero, then these eight bits side by side.
                low = np.uint64(0x7F7F7F7F7F7F7F7F)
                high = ((((x & low) + low) | x) & ~low) >> np.uint64(7)
                bits = (high * np.uint64(0x0102040810204080)) >> np.uint64(56)
                mask |= bits << np.uint64(8 * k)
            changed += count_ones(mask)
        workspace[_MASK // 8 + m] = mask
    return changed


@inlined
def _next_byte(workspace, start, flip):  # type: ignore[no-untyped-def]
    """First byte from `start` on whose bit in the mask, turned by `flip`, is set; or PAGE_BYTES."""
    if start >= PAGE_BYTES:
        return PAGE_BYTES
    m = start >> 6
    mask = (workspace[_MASK // 8 + m] ^ flip) & (
        np.uint64(0xFFFFFFFFFFFFFFFF) << np.uint64(start & 63)
    )
    while mask == 0:
        m += 1
        if m == _MASK_WORDS:
            return PAGE_BYTES
        mask = workspace[_MASK // 8 + m] ^ flip
    return m * 64 + trailing_zeros(mask)


@inlined
def _put_number(space, at, number):  # type: ignore[no-untyped-def]
    if number < 128:
        space[at] = number
        return at + 1
    space[at] = (number & 127) | 128
    space[at + 1] = number >> 7
    return at + 2


@inlined
def _make_delta(workspace, space, room):  # type: ignore[no-untyped-def]
    """Write the delta runs into the workspace; returns their length, 0 if they need more room."""
    same, differs = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0)
    at = _DELTA
    kept_from = 0
    start = _next_byte(workspace, 0, differs)
    while start < PAGE_BYTES:
        end = _next_byte(workspace, start, same)
        following = _next_byte(workspace, end, differs)
        while following < PAGE_BYTES and following - end <= _JOINED_GAP_BYTES:
            end = _next_byte(workspace, following, same)
            following = _next_byte(workspace, end, differs)
        if at + _LONGEST_RUN_CODE_BYTES + end - start > _DELTA + room:
            return 0
        at = _put_number(space, at, start - kept_from)
        at = _put_number(space, at, end - start)
        externals.memcpy(space.ctypes.data + at, space.ctypes.data + PAGE_AT + start, end - start)
        at += end - start
        kept_from = end
        start = following
    return at - _DELTA


@inlined
def _claim_slot(known, page):  # type: ignore[no-untyped-def]
    """A slot for `page`, taken from its owner if it has one."""
    slot = known.hand[0]
    for _ in range(_CLOCK_STEPS):
        if known.referenced[slot] == 0:
            break
        known.referenced[slot] = 0
        slot = slot + 1 if slot + 1 < known.owners.size else 0
    known.hand[0] = slot + 1 if slot + 1 < known.owners.size else 0
    owner = known.owners[slot]
    if owner != NO_PAGE:
        known.slots[owner] = 0
    known.owners[slot] = page
    known.referenced[slot] = 0
    known.slots[page] = slot + 1
    return slot


@inlined
def _release_slot(known, page):  # type: ignore[no-untyped-def]
    slot = np.int64(known.slots[page]) - 1
    if slot >= 0:
        known.slots[page] = 0
        known.owners[slot] = NO_PAGE
        known.referenced[slot] = 0


@inlined
def _keep_snapshot(known, page, workspace):  # type: ignore[no-untyped-def]
    slot = np.int64(known.slots[page]) - 1
    if slot < 0:
        slot = _claim_slot(known, page)
    start = np.uint64(slot) * np.uint64(PAGE_WORDS)
    for word in range(PAGE_WORDS):
        known.cache[start + np.uint64(word)] = workspace[PAGE_AT // 8 + word]


@inlined
def _keep_changes(known, page, workspace):  # type: ignore[no-untyped-def]
    """As `_keep_snapshot`, for a page whose slot holds its base and whose changes are marked."""
    slot = np.int64(known.slots[page]) - 1
    start = np.uint64(slot) * np.uint64(PAGE_WORDS)
    for m in range(_MASK_WORDS):
        if workspace[_MASK // 8 + m] != 0:
            for word in range(m * 8, m * 8 + 8):
                known.cache[start + np.uint64(word)] = workspace[PAGE_AT // 8 + word]


@inlined
def _entry_of(known, digest):  # type: ignore[no-untyped-def]
    return digest & np.uint64(known.originals.size - 1)


@inlined
def _find_original(memory, known, digest, workspace):  # type: ignore[no-untyped-def]
    """A page whose bytes at the receiver are those of the snapshot, or -1. Not the page itself,
    which had then been left out as equal."""
    original = np.int64(known.originals[_entry_of(known, digest)]) - 1
    if original < 0 or known.digests[original] != digest:
        return np.int64(-1)
    start = np.uint64(original) * np.uint64(PAGE_WORDS)
    differs = np.uint64(0)
    for word in range(PAGE_WORDS):
        differs |= memory[start + np.uint64(word)] ^ workspace[PAGE_AT // 8 + word]
    return original if differs == 0 else np.int64(-1)


@inlined
def _put_original(out, at, original):  # type: ignore[no-untyped-def]
    for byte in range(ORIGINAL_BYTES):
        out[at + byte] = (original >> (8 * byte)) & 0xFF


@inlined
def _compress(workspace, lz4_state, address, room):  # type: ignore[no-untyped-def]
    """LZ4 of the snapshot to `address`; returns its length, 0 if it does not fit."""
    page = workspace.ctypes.data + PAGE_AT
    return np.int64(
        externals.lz4_compress(
            lz4_state.ctypes.data, page, address, PAGE_BYTES, room, _ACCELERATION
        )
    )


@inlined
def _compress_with_base(workspace, lz4_state, address, room):  # type: ignore[no-untyped-def]
    """As `_compress`, with the base as dictionary."""
    space = workspace.ctypes.data
    state = lz4_state.ctypes.data
    externals.lz4_load_dictionary(state, space + BASE_AT, PAGE_BYTES)
    return np.int64(
        externals.lz4_compress_with_dictionary(
            state, space + PAGE_AT, address, PAGE_BYTES, room, _ACCELERATION
        )
    )


@inlined
def _compare_with_base(known, page, held, zero_digest, effort, workspace, space):  # type: ignore[no-untyped-def]
    """Load what the receiver holds of the page, if that is known byte by byte: from the cache, or
    zeros. Returns how many words changed, all of them if there is no base, and the length of the
    delta, 0 if there is none."""
    slot = np.int64(-1)
    if known.slots.size and held != UNKNOWN:
        slot = np.int64(known.slots[page]) - 1
    if slot >= 0:
        known.referenced[slot] = 1
        changed_words = _load_base(known.cache, slot, workspace)
    elif held == zero_digest:
        changed_words = _load_zero_base(workspace)
    else:
        return PAGE_WORDS, 0
    most_words, room = _SPARSE_WORDS, _SPARSE_DELTA_BYTES
    if effort == EFFORT_PACKED:
        most_words, room = PAGE_WORDS, _DELTA_ROOM
    if changed_words <= most_words and _mark_changes(workspace) < room:
        return changed_words, _make_delta(workspace, space, room)
    return changed_words, 0


@inlined
def _write_page(  # type: ignore[no-untyped-def]
    out, at, effort, changed_words, delta, workspace, lz4_state
):
    """Write the snapshot to `out` in its shortest form; returns its kind and length.

    `changed_words` is PAGE_WORDS if there is no base, `delta` 0 if there is no delta.
    """
    address = out.ctypes.data + at
    kind = _RAW
    length = PAGE_BYTES - _MIN_SAVING_BYTES
    if delta > 0:
        kind = _DELTA_RUNS
        length = delta
    if effort == EFFORT_LZ4 and length > _SHORT_DELTA_BYTES:
        # Given one byte less room than the best so far, LZ4 stops early if it is no better.
        if changed_words <= _RELATED_WORDS:
            form = _LZ4_BASE
            shorter = _compress_with_base(workspace, lz4_state, address, length - 1)
        else:
            form = _LZ4
            shorter = _compress(workspace, lz4_state, address, length - 1)
        if shorter > 0:
            return form, shorter
    if kind == _RAW:
        length = PAGE_BYTES
    source = PAGE_AT if kind == _RAW else _DELTA
    externals.memcpy(address, workspace.ctypes.data + source, length)
    return kind, length


@inlined
def _put_tables(out, at, tables, pages, bases):  # type: ignore[no-untyped-def]
    """Copy the tables to `out[at:]`, behind the payload. Returns where they end."""
    start = out.ctypes.data
    externals.memcpy(start + at, tables.base.ctypes.data, bases * BASE_BYTES)
    at += bases * BASE_BYTES
    externals.memcpy(start + at, tables.index.ctypes.data, pages * 4)
    externals.memcpy(start + at + pages * 4, tables.length.ctypes.data, pages * 2)
    externals.memcpy(start + at + pages * 6, tables.kind.ctypes.data, pages)
    return at + pages * ENTRY_BYTES


@kernel(
    readonly(types.uint64),
    readonly(types.uint32),
    types.int64,
    types.int64,
    types.int64,
    types.int64,
    types.uint64,
    types.uint64,
    types.int64,
    types.boolean,
    FILES,
    _KNOWLEDGE,
    WORKSPACE,
    _TABLES,
    WORKSPACE,
    _OUT_U64,
    _OUT_I64,
)
def encode_pages(  # type: ignore[no-untyped-def]
    memory,
    indices,
    start,
    stop,
    lane,
    lanes,
    seed,
    zero_digest,
    effort,
    full,
    files,
    known,
    body,
    tables,
    scratch,
    lz4_state,
    counters,
):
    """Encode pages `indices[start:stop]` into `body` until the frame is full.

    `memory` uint64 (live), `zero_digest` the digest of a page of zeros, `effort` EFFORT_*, `full`
    whether to make no copies, `files` what lies behind `memory`, `known` a `Knowledge`, `body` and
    `scratch` a `Workspace` each, `tables` a `Tables`, `lz4_state` uint64 (clib.LZ4_STATE_WORDS),
    `counters` int64 (COUNTERS), zeroed by the caller.
    Returns the position of the first index that was not encoded; for an index that is out of range
    or of another lane, -1 minus its position.

    Cost of a page, whose 4096 bytes are read from memory once and then stay in the first-level
    cache: one copy and a digest, which is all if it is equal, or if it is raw by `EFFORT_RAW`;
    otherwise also one into the cache of bases (with a delta, of the lines that changed), the
    reading of the base, and either that of the original, or the compression and a copy to `body`.
    To look for an original costs up to two cache misses.
    """
    workspace, space = scratch.words, scratch.bytes
    out = body.bytes
    n_pages = memory.size // PAGE_WORDS
    compresses = effort in (EFFORT_LZ4, EFFORT_PACKED)
    pages = 0
    bases = 0
    at = 0
    forget_hole(files)
    changes = False  # a page is likely to have changed if the one in front of it had
    position = start
    while position < stop:
        page = np.int64(indices[position])
        if page >= n_pages or page // STRIPE_PAGES % lanes != lane:
            return -1 - position
        tables_bytes = (pages + 1) * ENTRY_BYTES + (bases + 1) * BASE_BYTES
        if pages == MAX_FRAME_PAGES or at + PAGE_BYTES + tables_bytes > out.size:
            break
        position += 1

        # A page that will be raw is copied to its place at once: nothing else is in the payload.
        words, first = (body.words, at // 8) if effort == EFFORT_RAW else (workspace, PAGE_AT // 8)
        held = known.digests[page]
        if changes and effort != EFFORT_RAW and known.slots.size and held != UNKNOWN:
            slot = np.int64(known.slots[page]) - 1
            if slot >= 0:
                # Fetches the base while the page is copied and digested.
                prefetch_page(known.cache.ctypes.data + slot * PAGE_BYTES)
        untouched = held == UNKNOWN and in_hole(files, page)
        is_zero = untouched or _snapshot(memory, page, words, first)
        if not untouched and position < stop and indices[position] < n_pages:
            # Fetches the next page while this one is worked on.
            prefetch_page(memory.ctypes.data + np.int64(indices[position]) * PAGE_BYTES)
        digest = zero_digest
        if not is_zero:
            digest = externals.xxh3_64(words.ctypes.data + first * 8, PAGE_BYTES, seed)
        changes = held != digest or held == UNKNOWN
        if not changes:
            counters[COUNT_SAME] += 1
            continue

        kind = _ZERO
        length = 0
        base = held
        if is_zero:
            if known.slots.size:
                _release_slot(known, page)
        elif effort == EFFORT_RAW:
            kind = _RAW
            length = PAGE_BYTES
            tables.digest[counters[_RAW]] = digest
            if known.slots.size:
                _release_slot(known, page)
        else:
            changed_words, delta = _compare_with_base(
                known, page, held, zero_digest, effort, workspace, space
            )
            original = np.int64(-1)
            if compresses and not 0 < delta <= _SHORT_DELTA_BYTES:
                if not full:
                    original = _find_original(memory, known, digest, workspace)
                known.originals[_entry_of(known, digest)] = page + 1
            if original >= 0:
                kind = _COPY
                length = ORIGINAL_BYTES
                base = digest
                _put_original(out, at, original)
            else:
                kind, length = _write_page(
                    out, at, effort, changed_words, delta, workspace, lz4_state
                )
            if delta > 0 and known.slots.size and known.slots[page] > 0:
                _keep_changes(known, page, workspace)
            elif known.slots.size:
                _keep_snapshot(known, page, workspace)

        if kind >= _FIRST_WITH_BASE:
            tables.base[bases] = base
            bases += 1
        tables.index[pages] = page
        tables.length[pages] = length
        tables.kind[pages] = kind
        pages += 1
        at += length
        counters[kind] += 1
        known.digests[page] = digest
    counters[COUNT_BODY_BYTES] = _put_tables(out, at, tables, pages, bases) if pages else 0
    return position
