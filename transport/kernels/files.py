"""Files behind guest memory: where they have holes, and writing to them.

Owns the two system calls that are cheaper than touching memory for the first time, for use inside
kernels. A hole of a file in memory (memfd, tmpfs) is a page that nobody has touched: it reads as
zeros, and to read it through a mapping would allocate it. Written through a mapping it is cleared
first, at a page fault for each page; pwrite(2) does neither. Pages that are there already are
better written through the mapping.

Whatever a file does not support (a hugetlbfs, say) is answered with "no hole", and memory is then
used through its mapping alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from transport.kernels import externals
from transport.kernels.declare import inlined, named_tuple, writable
from transport.wire.extents import Extent, check_extents
from transport.wire.frames import PAGE_BYTES

_LOOK_PAGES: Final = 16  # what Linux maps at a fault, unless told otherwise (fault_around_bytes)
_SEEK_DATA: Final = os.SEEK_DATA
_SEEK_HOLE: Final = os.SEEK_HOLE


class Files(NamedTuple):
    """The extents of a memory, each an int64 array (extents), and what was found out about its
    pages. For one thread."""

    first_page: Any
    n_pages: Any
    descriptor: Any
    offset: Any
    hole: Any
    """int64 (3), what `in_hole` remembers of a pass: the `_LOOK_PAGES` it looked at last, a hole's
    first page and end."""
    there: Any
    """uint64 bitmap (pages): found to lie in no hole, so that no system call has to tell it again.
    If its owner makes it a hole after that, it is touched, which costs memory and nothing else."""


FILES = named_tuple((*(writable(types.int64),) * 5, writable(types.uint64)), Files)


def new_files(extents: Sequence[Extent], n_pages: int) -> Files:
    """The extents of a memory of `n_pages` pages. ValueError as of `check_extents`.

    Allocates a bit a page, with extents.
    """
    check_extents(extents, n_pages)
    table = np.array(extents, np.int64).reshape(-1, 4)
    columns: list[npt.NDArray[Any]] = [np.ascontiguousarray(column) for column in table.T]
    columns.append(np.full(3, -1, np.int64))
    columns.append(np.zeros(-(-n_pages // 64) if len(table) else 0, np.uint64))
    return Files(*columns)


def was_found(files: Files, page: int) -> bool:
    """Whether `page` is known to lie in no hole, where there are extents. From Python."""
    return bool(int(files.there[page >> 6]) >> (page & 63) & 1)


@inlined
def _extent_of(files, page):  # type: ignore[no-untyped-def]
    for extent in range(files.first_page.size):
        if 0 <= page - files.first_page[extent] < files.n_pages[extent]:
            return extent
    return -1


@inlined
def end_of_hole(files, page):  # type: ignore[no-untyped-def]
    """The first page behind the hole that `page` lies in; `page` itself if it is in none."""
    extent = _extent_of(files, page)
    if extent < 0:
        return page
    end = files.first_page[extent] + files.n_pages[extent]
    at = files.offset[extent] + (page - files.first_page[extent]) * PAGE_BYTES
    data = externals.lseek(files.descriptor[extent], at, _SEEK_DATA)
    if data >= 0:
        return min(end, page + (data - at) // PAGE_BYTES)
    # No data up to the file's end, or an error: only the former is a hole here.
    return end if externals.lseek(files.descriptor[extent], at, _SEEK_HOLE) == at else page


@inlined
def forget_hole(files):  # type: ignore[no-untyped-def]
    """To be called before each pass over pages: holes have been filled since the last one."""
    for field in range(files.hole.size):
        files.hole[field] = -1


@inlined
def in_hole(files, page):  # type: ignore[no-untyped-def]
    """Whether `page` lies in a hole, as far as one system call for each `_LOOK_PAGES` can tell.

    Who is told that it does not may touch it. Who writes a page that does calls `fill_hole`.
    """
    word, bit = page >> 6, np.uint64(1) << np.uint64(page & 63)
    if files.there.size == 0 or files.there[word] & bit:
        return False
    hole = files.hole
    if not hole[1] <= page < hole[2] and hole[0] != page // _LOOK_PAGES:
        hole[0] = page // _LOOK_PAGES
        hole[1] = page
        hole[2] = end_of_hole(files, page)
    if hole[1] <= page < hole[2]:
        return True
    files.there[word] |= bit
    return False


@inlined
def fill_hole(files, page, count):  # type: ignore[no-untyped-def]
    """`count` pages of the hole that `in_hole` has just found have been written, from its start."""
    files.hole[1] = page + count
    for each in range(page, page + count):
        files.there[each >> 6] |= np.uint64(1) << np.uint64(each & 63)


@inlined
def write_pages(files, page, source, count):  # type: ignore[no-untyped-def]
    """Write `count` pages, all of one extent, from address `source`. False if that failed.

    One copy of 4096 bytes a page, by the kernel.
    """
    extent = _extent_of(files, page)
    at = files.offset[extent] + (page - files.first_page[extent]) * PAGE_BYTES
    n_bytes = count * PAGE_BYTES
    return np.int64(externals.pwrite(files.descriptor[extent], source, n_bytes, at)) == n_bytes
