"""The loop over records of the `ram` section, to be compiled by whoever uses it.

Owns no memory and no decision: it goes through the bytes of a window and stops at whatever the
reader (`sync.vmm.stream.reader`) has to decide, with a `Status`.
"""

from enum import IntEnum, auto
from typing import Any

import numpy as np
import numpy.typing as npt

from sync.vmm.stream.form import BLOCKS, CONTINUE, END_OF_RECORDS, PAGE, PAGE_BYTES, ZERO

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class Status(IntEnum):
    """Why the loop stopped. With the first three, the record at AT has been gone through."""

    NEEDS_BYTES = 0
    """The window's bytes are all gone through but for the beginning of a record."""
    RECORDS_END = auto()
    SAMPLE = auto()
    """Looking only: a page of an undecided block; its bytes are at SAMPLE_AT."""
    BLOCK_LIST = auto()
    PAGES_FULL = auto()
    OUT_FULL = auto()
    PASS_ENDED = auto()
    """The record's page is not behind the one before."""
    UNDECIDED = auto()
    """The record is of block ASKED, which is not decided."""
    UNKNOWN_FLAGS = auto()
    UNKNOWN_BLOCK = auto()
    OUTSIDE_BLOCK = auto()
    CONTINUES_NOTHING = auto()
    NOT_ZERO = auto()
    """A record of a page of zeros has another byte."""


class Fate(IntEnum):
    """What becomes of a block's pages."""

    UNDECIDED = 0
    CARRIED = 1
    """They are passed on."""
    TAKEN = 2
    """They are announced, and not passed on."""


# What the loop keeps from one window to the next, all of it in one array of int64.
AT, BLOCK, OUT_BLOCK, LAST_BLOCK, LAST_PAGE, PAYLOAD_LEFT, PAYLOAD_KEPT, N_PAGES, N_OUT = range(9)
N_DROPPED, ASKED, SAMPLE_PAGE, SAMPLE_AT = range(9, 13)
N_STATE = 13

# Columns of the table of blocks, and of the table of ranges.
BLOCK_PAGES, FATE, FIRST_RANGE, END_RANGE, NAME_BYTES = range(5)
RANGE_FIRST, RANGE_END, RANGE_FLAT = range(3)

# numba takes plain integers into the compiled code, and no members of an enum.
_NEEDS_BYTES, _RECORDS_END, _SAMPLE = map(int, list(Status)[:3])
_BLOCK_LIST, _PAGES_FULL, _OUT_FULL, _PASS_ENDED, _UNDECIDED = map(int, list(Status)[3:8])
_UNKNOWN_FLAGS, _UNKNOWN_BLOCK, _OUTSIDE_BLOCK = map(int, list(Status)[8:11])
_CONTINUES_NOTHING, _NOT_ZERO = map(int, list(Status)[11:])
_FATE_UNDECIDED, _FATE_TAKEN = int(Fate.UNDECIDED), int(Fate.TAKEN)

_KEEPS_NAME = 0xFF & ~CONTINUE


def new_state() -> Numbers:
    """The loop's state before the first record."""
    state = np.zeros(N_STATE, np.int64)
    state[[BLOCK, OUT_BLOCK, LAST_BLOCK]] = -1
    return state


def follow_records(
    data: Bytes,
    state: Numbers,
    blocks: Numbers,
    names: Bytes,
    ranges: Numbers,
    look: bool,
    pages: npt.NDArray[np.uint32],
    zeros: npt.NDArray[np.bool_],
    out: Bytes,
) -> int:
    """Goes through the records of `data` from byte `state[AT]` on and returns a `Status`.

    `blocks` is int64[n, 5], `names` uint8[n, 255], `ranges` int64[m, 3]: the block's first page
    and the one behind the last, and the flat number of the first. Pages of taken blocks inside of
    a range go to `pages` and `zeros`, all other records to `out`. With `look`, nothing is written.
    """
    at, end = state[AT], data.size
    block, left = state[BLOCK], state[PAYLOAD_LEFT]
    n_pages, n_out = state[N_PAGES], state[N_OUT]
    status = _NEEDS_BYTES
    while True:
        if left > 0:
            n = min(left, end - at)
            if state[PAYLOAD_KEPT]:
                n = min(n, out.size - n_out)
                out[n_out : n_out + n] = data[at : at + n]
                n_out += n
            at += n
            left -= n
            if left > 0:
                if at < end:
                    status = _OUT_FULL
                break
        if end - at < 8:
            break
        page = np.int64(data[at + 6]) >> 4
        for i in range(6):
            page |= np.int64(data[at + i]) << (44 - 8 * i)
        flags = (np.int64(data[at + 6]) & 15) << 8 | np.int64(data[at + 7])

        if flags == END_OF_RECORDS and page == 0:
            if not look:
                if out.size - n_out < 8:
                    status = _OUT_FULL
                    break
                out[n_out : n_out + 8] = data[at : at + 8]
                n_out += 8
            at += 8
            status = _RECORDS_END
            break
        if flags == BLOCKS:
            status = _BLOCK_LIST
            break
        kind = flags & ~CONTINUE
        if kind != PAGE and kind != ZERO:
            status = _UNKNOWN_FLAGS
            break

        body = at + 8
        named = flags & CONTINUE == 0
        this = block
        if named:
            if body == end or end - body - 1 < data[body]:
                break
            length = np.int64(data[body])
            this = -1
            for i in range(blocks.shape[0]):
                if blocks[i, NAME_BYTES] == length:
                    same = True
                    for j in range(length):
                        if names[i, j] != data[body + 1 + j]:
                            same = False
                            break
                    if same:
                        this = i
                        break
            if this < 0:
                status = _UNKNOWN_BLOCK
                break
            body += 1 + length
        elif this < 0:
            status = _CONTINUES_NOTHING
            break
        if page >= blocks[this, BLOCK_PAGES]:
            status = _OUTSIDE_BLOCK
            break
        if kind == ZERO:
            if body == end:
                break
            if data[body] != 0:
                status = _NOT_ZERO
                break
        fate = blocks[this, FATE]

        if look:
            if kind == ZERO:
                at = body + 1
            else:
                if end - body < PAGE_BYTES:
                    break
                at = body + PAGE_BYTES
            block = this
            if kind == PAGE and fate == _FATE_UNDECIDED:
                state[ASKED], state[SAMPLE_PAGE], state[SAMPLE_AT] = this, page, body
                status = _SAMPLE
                break
            continue

        if fate == _FATE_UNDECIDED:
            state[ASKED] = this
            status = _UNDECIDED
            break
        if this < state[LAST_BLOCK] or (this == state[LAST_BLOCK] and page <= state[LAST_PAGE]):
            state[LAST_BLOCK] = -1
            status = _PASS_ENDED
            break
        flat = np.int64(-1)
        if fate == _FATE_TAKEN:
            for i in range(blocks[this, FIRST_RANGE], blocks[this, END_RANGE]):
                if ranges[i, RANGE_FIRST] <= page < ranges[i, RANGE_END]:
                    flat = ranges[i, RANGE_FLAT] + page - ranges[i, RANGE_FIRST]
                    break
        if flat >= 0:
            if n_pages == pages.size:
                status = _PAGES_FULL
                break
            pages[n_pages] = flat
            zeros[n_pages] = kind == ZERO
            n_pages += 1
            state[N_DROPPED] += 1
            state[PAYLOAD_KEPT] = 0
        else:
            # The block of the record before may be another one among those that are passed on.
            named = named or state[OUT_BLOCK] != this
            length = blocks[this, NAME_BYTES]
            if out.size - n_out < 10 + length:
                status = _OUT_FULL
                break
            out[n_out : n_out + 8] = data[at : at + 8]
            n_out += 8
            if named:
                out[n_out - 1] &= _KEEPS_NAME
                out[n_out] = length
                out[n_out + 1 : n_out + 1 + length] = names[this, :length]
                n_out += 1 + length
            if kind == ZERO:
                out[n_out] = 0
                n_out += 1
            state[OUT_BLOCK] = this
            state[PAYLOAD_KEPT] = 1
        if kind == ZERO:
            at = body + 1
        else:
            at = body
            left = np.int64(PAGE_BYTES)
        block = this
        state[LAST_BLOCK], state[LAST_PAGE] = this, page
    state[AT], state[BLOCK], state[PAYLOAD_LEFT] = at, block, left
    state[N_PAGES], state[N_OUT] = n_pages, n_out
    return status


def signature() -> tuple[Any, ...]:
    """The types of the arguments of `follow_records`, for numba."""
    from numba import types

    readonly: Any = types.Array(types.uint8, 1, "C", readonly=True)
    numbers = types.int64[:, ::1]
    return (
        readonly,
        types.int64[::1],
        numbers,
        types.uint8[:, ::1],
        numbers,
        types.boolean,
        types.uint32[::1],
        types.boolean[::1],
        types.uint8[::1],
    )
