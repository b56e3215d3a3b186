"""Digests of pages and of blocks of pages, and the tracker that compares them.

A digest is XXH3-64 (xxhash.h) of the page's 4096 bytes with the migration's seed, uint64. `memory`
is a 1-D contiguous uint8 array, a whole number of pages long, 8-byte aligned, read-only or not. A
slice of it on a page boundary does as well, which is how work is split among threads: the loops
run without the GIL.

These functions read memory in place, once or, for some bytes, twice. A digest of a page that is
written meanwhile may be that of no state of the page. It then differs from the digest of whatever
the page holds afterwards, which is all that a comparison needs; nothing is sent from here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from transport.kernels.bitmap import Bitmap, Indices, empty_bitmap
from transport.kernels.declare import kernel, readonly, writable
from transport.kernels.externals import xxh3_64
from transport.kernels.files import FILES, Files, forget_hole, in_hole, new_files
from transport.wire.frames import PAGE_BYTES

Digests = npt.NDArray[np.uint64]

BLOCK_PAGES = 256  # pages for each digest of the upper level: 1 MiB of memory


def digest_all(memory: npt.NDArray[np.uint8], seed: int) -> Digests:
    """The digest of every page of `memory`."""
    page_count(memory)
    return digest_payload(memory, seed)


def digest_payload(payload: npt.NDArray[np.uint8], seed: int) -> Digests:
    """`digest_all` of pages at any address."""
    digests = np.empty(payload.size // PAGE_BYTES, np.uint64)
    _digest_all(payload, np.uint64(seed), digests)
    return digests


def digest_pages(
    memory: npt.NDArray[np.uint8], indices: Indices, seed: int, files: Files | None = None
) -> Digests:
    """The digests of these pages, in their order. IndexError for one outside `memory`.

    `files` says what lies behind it; None: nothing that is known. What nobody has touched is not
    touched there.
    """
    n_pages = page_count(memory)
    if indices.size and int(indices.max()) >= n_pages:
        raise IndexError(f"page {indices.max()} of {n_pages}")
    digests = np.empty(indices.size, np.uint64)
    zero_digest = digest_all(np.zeros(PAGE_BYTES, np.uint8), seed)[0]
    _digest_pages(
        memory,
        new_files((), n_pages) if files is None else files,
        np.ascontiguousarray(indices, np.uint32),
        np.uint64(seed),
        zero_digest,
        digests,
    )
    return digests


def digest_blocks(digests: Digests, seed: int) -> Digests:
    """The digest over the digests of each `BLOCK_PAGES` pages; the last block may be shorter.

    Applied to its own result it gives the next level up.
    """
    blocks = np.empty(-(-digests.size // BLOCK_PAGES), np.uint64)
    _digest_blocks(np.ascontiguousarray(digests, np.uint64), np.uint64(seed), blocks)
    return blocks


def scan_changed(memory: npt.NDArray[np.uint8], seen: Digests, seed: int) -> Bitmap:
    """Pages whose digest is not the one in `seen` (uint64, a page each), which is updated.

    With `seen` all zero at first, the first scan finds every page. `memory` may be written
    meanwhile: a write that this scan misses is found by the next. ValueError if `seen` does not
    fit.
    """
    n_pages = page_count(memory)
    if seen.shape != (n_pages,):
        raise ValueError(f"{seen.size} digests for {n_pages} pages")
    changed = empty_bitmap(n_pages)
    _scan_changed(memory, np.uint64(seed), seen, changed)
    return changed


def page_count(memory: npt.NDArray[np.uint8]) -> int:
    """Pages of `memory`. ValueError if it is no contiguous, aligned array of whole pages."""
    if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
        raise ValueError("memory is a contiguous 1-D array of uint8")
    if memory.size % PAGE_BYTES or memory.ctypes.data % 8:
        raise ValueError(f"memory must be whole pages of {PAGE_BYTES} bytes, 8-byte aligned")
    return memory.size // PAGE_BYTES


_MEMORY = readonly(types.uint8)
_OUT_WORDS = writable(types.uint64)


@kernel(_MEMORY, types.uint64, _OUT_WORDS)
def _digest_all(memory, seed, digests):  # type: ignore[no-untyped-def]
    for page in range(digests.size):
        digests[page] = xxh3_64(memory.ctypes.data + page * PAGE_BYTES, PAGE_BYTES, seed)


@kernel(_MEMORY, FILES, readonly(types.uint32), types.uint64, types.uint64, _OUT_WORDS)
def _digest_pages(memory, files, indices, seed, zero_digest, digests):  # type: ignore[no-untyped-def]
    forget_hole(files)
    for position in range(indices.size):
        page = np.int64(indices[position])
        if in_hole(files, page):
            digests[position] = zero_digest
        else:
            address = memory.ctypes.data + page * PAGE_BYTES
            digests[position] = xxh3_64(address, PAGE_BYTES, seed)


@kernel(readonly(types.uint64), types.uint64, _OUT_WORDS)
def _digest_blocks(digests, seed, blocks):  # type: ignore[no-untyped-def]
    for block in range(blocks.size):
        first = block * BLOCK_PAGES
        n_bytes = min(BLOCK_PAGES, digests.size - first) * 8
        blocks[block] = xxh3_64(digests.ctypes.data + first * 8, n_bytes, seed)


@kernel(_MEMORY, types.uint64, _OUT_WORDS, _OUT_WORDS)
def _scan_changed(memory, seed, seen, changed):  # type: ignore[no-untyped-def]
    for page in range(seen.size):
        digest = xxh3_64(memory.ctypes.data + page * PAGE_BYTES, PAGE_BYTES, seed)
        if digest != seen[page]:
            seen[page] = digest
            changed[page >> 6] |= np.uint64(1) << np.uint64(page & 63)
