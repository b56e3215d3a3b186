"""Bitmaps of pages: count, merge, scan, build.

A bitmap is a 1-D contiguous uint64 array; bit i of word w is page 64 * w + i. With `n_pages`, a
function ignores the bits behind it, which a device may set as it likes; without, all bits count.
Page numbers are uint32. All loops run without the GIL.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from transport.kernels.declare import inlined, kernel, readonly, writable
from transport.kernels.externals import count_ones, store_sums, trailing_zeros

Bitmap = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.uint32]

MAX_PAGES = (1 << 32) - 1  # so that a run of all pages has a length of 32 bits, too
_BLOCK_WORDS = 64  # words counted at once; large enough to be vectorised
_SPARSE_BITS = 1  # with more bits in a word, eight numbers at once are faster than one by one
_SLACK = 8  # numbers are written eight at a time
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)

# Entry b: the positions of the set bits of byte b, ascending from the lowest byte on, then zeros.
_BIT_POSITIONS = np.zeros(256, np.uint64)
for _byte in range(256):
    _set = [bit for bit in range(8) if _byte >> bit & 1]
    _BIT_POSITIONS[_byte] = sum(bit << 8 * place for place, bit in enumerate(_set))


def words_for(n_pages: int) -> int:
    """Length in words of a bitmap of `n_pages` pages."""
    return (n_pages + 63) // 64


def empty_bitmap(n_pages: int) -> Bitmap:
    """A bitmap of `n_pages` pages, none set."""
    return np.zeros(words_for(n_pages), np.uint64)


def count(bitmap: Bitmap, n_pages: int | None = None) -> int:
    """Number of pages set below `n_pages`. ValueError if the bitmap is too short."""
    return int(_count(*_limited(bitmap, n_pages)))


def merge_bitmaps(target: Bitmap, source: Bitmap) -> None:
    """Set in `target` what is set in `source`, of the same length."""
    if target.shape != source.shape:
        raise ValueError(f"bitmaps of {target.size} and {source.size} words cannot be merged")
    np.bitwise_or(target, source, out=target)


def bitmap_to_indices(bitmap: Bitmap, n_pages: int | None = None) -> Indices:
    """The pages set below `n_pages`, ascending. ValueError if the bitmap is too short."""
    words, tail = _limited(bitmap, n_pages)
    found = _count(words, tail)
    if found == 0:
        return np.empty(0, np.uint32)
    indices = np.empty(found + _SLACK, np.uint32)
    _to_indices(words, tail, indices)
    return indices[:found]


def bitmap_to_runs(bitmap: Bitmap, n_pages: int | None = None) -> tuple[Indices, Indices]:
    """Runs of neighbouring pages set below `n_pages`: first page and length of each, ascending."""
    words, tail = _limited(bitmap, n_pages)
    n_runs = _count_runs(words, tail)
    if n_runs == 0:
        return np.empty(0, np.uint32), np.empty(0, np.uint32)
    starts, lengths = np.empty((2, n_runs + _SLACK), np.uint32)
    _to_runs(words, tail, starts, lengths)
    return starts[:n_runs], lengths[:n_runs]


def runs_to_indices(starts: Indices, lengths: Indices) -> Indices:
    """The pages of runs, in order. ValueError for unequal lists or a run behind the last page."""
    if starts.shape != lengths.shape or starts.ndim != 1:
        raise ValueError("starts and lengths must be lists of the same length")
    if np.any(starts.astype(np.uint64) + lengths > MAX_PAGES):
        raise ValueError("a run ends behind the last page number")
    indices = np.empty(int(lengths.sum(dtype=np.uint64)), np.uint32)
    _fill_runs(np.ascontiguousarray(starts), np.ascontiguousarray(lengths), indices)
    return indices


def indices_to_bitmap(indices: Indices, n_pages: int) -> Bitmap:
    """A bitmap of `n_pages` pages with these set. IndexError for one that is not below it."""
    bitmap = empty_bitmap(n_pages)
    _set_or_fail(bitmap, indices, n_pages, True)
    return bitmap


def set_pages(bitmap: Bitmap, indices: Indices, n_pages: int) -> None:
    """Set these pages. IndexError, and nothing behind it set, for one not below `n_pages`."""
    _set_or_fail(_words(bitmap, n_pages), indices, n_pages, True)


def clear_pages(bitmap: Bitmap, indices: Indices, n_pages: int) -> None:
    """Clear these pages. IndexError, and nothing behind it cleared, for one not below `n_pages`."""
    _set_or_fail(_words(bitmap, n_pages), indices, n_pages, False)


def test_page(bitmap: Bitmap, page: int) -> bool:
    """Whether `page` is set. IndexError if the bitmap does not reach that far."""
    if not 0 <= page < bitmap.size * 64:
        raise IndexError(f"page {page} is outside a bitmap of {bitmap.size * 64} pages")
    return bool(int(bitmap[page >> 6]) >> (page & 63) & 1)


def expand_coarse(coarse: Bitmap, pages_per_bit: int, n_pages: int) -> Bitmap:
    """A bitmap of pages from one whose every bit stands for `pages_per_bit` pages.

    Bit i sets pages i * pages_per_bit to (i + 1) * pages_per_bit - 1, as far as they are below
    `n_pages`. ValueError if the coarse bitmap is too short.
    """
    if pages_per_bit < 1:
        raise ValueError(f"a bit cannot stand for {pages_per_bit} pages")
    coarse_bits = -(-n_pages // pages_per_bit)
    bitmap = empty_bitmap(n_pages)
    words, tail = _limited(coarse, coarse_bits)
    _expand(words, tail, pages_per_bit, n_pages, bitmap)
    return bitmap


def _words(bitmap: Bitmap, n_pages: int) -> Bitmap:
    """The words of `bitmap` that hold `n_pages` pages."""
    if not 0 <= n_pages <= MAX_PAGES:
        raise ValueError(f"{n_pages} pages do not fit into 32-bit page numbers")
    if bitmap.dtype != np.uint64 or bitmap.ndim != 1 or not bitmap.flags.c_contiguous:
        raise ValueError("a bitmap is a contiguous 1-D array of uint64")
    if bitmap.size < words_for(n_pages):
        raise ValueError(f"a bitmap of {bitmap.size} words cannot hold {n_pages} pages")
    return bitmap[: words_for(n_pages)]


def _limited(bitmap: Bitmap, n_pages: int | None) -> tuple[Bitmap, np.uint64]:
    """The words of `bitmap` that hold `n_pages` pages, and the mask of these pages in the last."""
    if n_pages is None:
        n_pages = bitmap.size * 64
    rest = n_pages & 63
    return _words(bitmap, n_pages), np.uint64((1 << rest) - 1) if rest else _ALL


def _set_or_fail(bitmap: Bitmap, indices: Indices, n_pages: int, value: bool) -> None:
    if indices.dtype != np.uint32 or indices.ndim != 1:
        raise ValueError("page numbers are a 1-D array of uint32")
    done = _assign(bitmap, np.ascontiguousarray(indices), n_pages, value)
    if done != indices.size:
        raise IndexError(f"page {indices[done]} of {n_pages}")


_WORDS = readonly(types.uint64)
_INDICES = readonly(types.uint32)
_OUT_INDICES = writable(types.uint32)


@inlined
def _count_block(words, first, last):  # type: ignore[no-untyped-def]
    total = 0
    for w in range(first, last):
        total += count_ones(words[w])
    return total


@kernel(_WORDS, types.uint64)
def _count(words, tail):  # type: ignore[no-untyped-def]
    if words.size == 0:
        return 0
    total = 0
    for w in range(words.size):
        total += count_ones(words[w])
    return total - count_ones(words[words.size - 1] & ~tail)


@inlined
def _write_by_table(word, page, indices, found):  # type: ignore[no-untyped-def]
    """Eight numbers are written whether they count or not, which spares the branches."""
    at = np.uint64(indices.ctypes.data) + np.uint64(4 * found)
    for byte in range(8):
        bits = (word >> np.uint64(8 * byte)) & np.uint64(255)
        store_sums(at, page + np.uint32(8 * byte), _BIT_POSITIONS[bits])
        at += np.uint64(4 * count_ones(bits))


@inlined
def _write_bits(word, page, indices, found):  # type: ignore[no-untyped-def]
    """Write the numbers of the bits set in a word from `found` on; returns how many there are then.

    Up to `_SLACK` numbers behind them are overwritten.
    """
    n_bits = count_ones(word)
    if n_bits > _SPARSE_BITS:
        _write_by_table(word, page, indices, found)
        return found + n_bits
    while word != 0:
        indices[np.uint64(found)] = page + np.uint32(trailing_zeros(word))
        word &= word - np.uint64(1)
        found += 1
    return found


@kernel(_WORDS, types.uint64, _OUT_INDICES)
def _to_indices(words, tail, indices):  # type: ignore[no-untyped-def]
    """One pass over the words, in blocks that cost a read only if they are empty."""
    found = 0
    for block in range(0, words.size, _BLOCK_WORDS):
        end = min(block + _BLOCK_WORDS, words.size)
        if _count_block(words, block, end) == 0:
            continue
        for w in range(block, end):
            word = words[w] if w < words.size - 1 else words[w] & tail
            found = _write_bits(word, np.uint32(w * 64), indices, found)


@kernel(_WORDS, types.uint64)
def _count_runs(words, tail):  # type: ignore[no-untyped-def]
    last = words.size - 1
    if last < 0:
        return 0
    # A run starts at each set bit behind a clear one.
    runs = count_ones(words[0] & ~(words[0] << np.uint64(1)) & (tail if last == 0 else _ALL))
    for w in range(1, last):
        runs += count_ones(
            words[w] & ~((words[w] << np.uint64(1)) | (words[w - 1] >> np.uint64(63)))
        )
    if last > 0:
        before = words[last - 1] >> np.uint64(63)
        runs += count_ones(words[last] & ~((words[last] << np.uint64(1)) | before) & tail)
    return runs


@kernel(_WORDS, types.uint64, _OUT_INDICES, _OUT_INDICES)
def _to_runs(words, tail, starts, lengths):  # type: ignore[no-untyped-def]
    """One pass over the words, as `_to_indices`, and one over the runs, block by block, while they
    are in the cache.

    The first bits of runs and the last ones are written apart; the k-th of both make a run.
    """
    last = words.size - 1
    n_starts = n_ends = n_runs = 0
    for block in range(0, words.size, _BLOCK_WORDS):
        stop = min(block + _BLOCK_WORDS, words.size)
        if _count_block(words, block, stop) == 0:
            continue
        for w in range(block, stop):
            word = words[w] if w < last else words[w] & tail
            before = words[w - 1] >> np.uint64(63) if w > 0 else np.uint64(0)
            behind = np.uint64(0)
            if w < last:
                behind = (words[w + 1] if w + 1 < last else words[w + 1] & tail) << np.uint64(63)
            page = np.uint32(w * 64)
            first = word & ~((word << np.uint64(1)) | before)
            final = word & ~((word >> np.uint64(1)) | behind)
            n_starts = _write_bits(first, page, starts, n_starts)
            n_ends = _write_bits(final, page, lengths, n_ends)
        begun, ended = starts[n_runs:n_ends], lengths[n_runs:n_ends]
        for run in range(ended.size):
            ended[run] += np.uint32(1) - begun[run]
        n_runs = n_ends


@kernel(_INDICES, _INDICES, _OUT_INDICES)
def _fill_runs(starts, lengths, indices):  # type: ignore[no-untyped-def]
    filled = np.int64(0)
    for run in range(starts.size):
        for k in range(lengths[run]):
            indices[filled + k] = starts[run] + np.uint32(k)
        filled += np.int64(lengths[run])


@kernel(writable(types.uint64), _INDICES, types.int64, types.boolean)
def _assign(bitmap, indices, n_pages, value):  # type: ignore[no-untyped-def]
    for position in range(indices.size):
        page = np.int64(indices[position])
        if page >= n_pages:
            return position
        bit = np.uint64(1) << np.uint64(page & 63)
        if value:
            bitmap[page >> 6] |= bit
        else:
            bitmap[page >> 6] &= ~bit
    return indices.size


@kernel(_WORDS, types.uint64, types.int64, types.int64, writable(types.uint64))
def _expand(coarse, tail, pages_per_bit, n_pages, bitmap):  # type: ignore[no-untyped-def]
    for w in range(coarse.size):
        word = coarse[w]
        if w == coarse.size - 1:
            word &= tail
        while word != 0:
            first = (np.int64(w) * 64 + trailing_zeros(word)) * pages_per_bit
            last = min(first + pages_per_bit, n_pages) - 1
            word &= word - np.uint64(1)
            low = _ALL << np.uint64(first & 63)
            high = _ALL >> np.uint64(63 - (last & 63))
            if first >> 6 == last >> 6:
                bitmap[first >> 6] |= low & high
                continue
            bitmap[first >> 6] |= low
            for middle in range((first >> 6) + 1, last >> 6):
                bitmap[middle] = _ALL
            bitmap[last >> 6] |= high
