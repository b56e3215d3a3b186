"""Bitmaps of pages: count, scan, build.

A bitmap is a 1-D contiguous uint64 array; bit i of word w is page 64 * w + i. With `n_pages`, a
function ignores the bits behind it, which a device may set as it likes; without, all bits count.
Page numbers are uint32. All loops run without the GIL.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from transport.kernels.declare import kernel, readonly, writable
from transport.kernels.externals import count_ones, trailing_zeros

Bitmap = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.uint32]

MAX_PAGES = (1 << 32) - 1
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


def words_for(n_pages: int) -> int:
    """Length in words of a bitmap of `n_pages` pages."""
    return (n_pages + 63) // 64


def empty_bitmap(n_pages: int) -> Bitmap:
    """A bitmap of `n_pages` pages, none set."""
    return np.zeros(words_for(n_pages), np.uint64)


def count(bitmap: Bitmap, n_pages: int | None = None) -> int:
    """Number of pages set below `n_pages`. ValueError if the bitmap is too short."""
    return int(_count(*_limited(bitmap, n_pages)))


def bitmap_to_indices(bitmap: Bitmap, n_pages: int | None = None) -> Indices:
    """The pages set below `n_pages`, ascending. ValueError if the bitmap is too short."""
    words, tail = _limited(bitmap, n_pages)
    indices = np.empty(_count(words, tail), np.uint32)
    if indices.size:
        _to_indices(words, tail, indices)
    return indices


def indices_to_bitmap(indices: Indices, n_pages: int) -> Bitmap:
    """A bitmap of `n_pages` pages with these set. IndexError for one that is not below it."""
    if indices.dtype != np.uint32 or indices.ndim != 1:
        raise ValueError("page numbers are a 1-D array of uint32")
    bitmap = empty_bitmap(n_pages)
    done = _set(bitmap, np.ascontiguousarray(indices), n_pages)
    if done != indices.size:
        raise IndexError(f"page {indices[done]} of {n_pages}")
    return bitmap


def _limited(bitmap: Bitmap, n_pages: int | None) -> tuple[Bitmap, np.uint64]:
    """The words of `bitmap` that hold `n_pages` pages, and the mask of these pages in the last."""
    if n_pages is None:
        n_pages = bitmap.size * 64
    if not 0 <= n_pages <= MAX_PAGES:
        raise ValueError(f"{n_pages} pages do not fit into 32-bit page numbers")
    if bitmap.dtype != np.uint64 or bitmap.ndim != 1 or not bitmap.flags.c_contiguous:
        raise ValueError("a bitmap is a contiguous 1-D array of uint64")
    if bitmap.size < words_for(n_pages):
        raise ValueError(f"a bitmap of {bitmap.size} words cannot hold {n_pages} pages")
    rest = n_pages & 63
    return bitmap[: words_for(n_pages)], np.uint64((1 << rest) - 1) if rest else _ALL


_WORDS = readonly(types.uint64)


@kernel(_WORDS, types.uint64)
def _count(words, tail):  # type: ignore[no-untyped-def]
    if words.size == 0:
        return 0
    total = 0
    for w in range(words.size):
        total += count_ones(words[w])
    return total - count_ones(words[words.size - 1] & ~tail)


@kernel(_WORDS, types.uint64, writable(types.uint32))
def _to_indices(words, tail, indices):  # type: ignore[no-untyped-def]
    found = 0
    for w in range(words.size):
        word = words[w] if w < words.size - 1 else words[w] & tail
        while word != 0:
            indices[np.uint64(found)] = np.uint32(w * 64 + trailing_zeros(word))
            word &= word - np.uint64(1)
            found += 1


@kernel(writable(types.uint64), readonly(types.uint32), types.int64)
def _set(bitmap, indices, n_pages):  # type: ignore[no-untyped-def]
    """How many were set before the first that is too large."""
    for position in range(indices.size):
        page = np.int64(indices[position])
        if page >= n_pages:
            return position
        bitmap[page >> 6] |= np.uint64(1) << np.uint64(page & 63)
    return indices.size
