"""Digests of pages, blocks and regions, as both ends of the link compute them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from transport.wire.arrays import Indices, Memory
from transport.wire.records import (
    REGION_DIGEST_BYTES,
)

if TYPE_CHECKING:
    from transport.kernels.files import Files


Digests = npt.NDArray[np.uint64]


def _chunk_digest(digests: Digests) -> bytes:
    return hashlib.blake2b(digests.tobytes(), digest_size=REGION_DIGEST_BYTES).digest()


def _pages_from(first_page: int, n_pages: int) -> Indices:
    """IndexError for pages that cannot be."""
    if first_page + n_pages > 1 << 32:
        raise IndexError(f"page {first_page + n_pages - 1}")
    return np.arange(first_page, first_page + n_pages, dtype=np.int64).astype(np.uint32)


def _digest_pages(memory: Memory, files: Files, pages: Indices, seed: int) -> Digests:
    # Imported here: only lanes' threads come here, and the import costs up to a second.
    from transport.kernels.digests import digest_pages

    return digest_pages(memory, pages, seed, files)


def _digest_blocks(digests: Digests, seed: int) -> Digests:
    from transport.kernels.digests import digest_blocks

    return digest_blocks(digests, seed)


def _runs_of(pages: Indices) -> npt.NDArray[np.uint32]:
    """Ascending pages as runs, uint32 (n, 2): first and length."""
    breaks = np.flatnonzero(np.diff(pages.astype(np.int64)) != 1) + 1
    starts = np.concatenate([[0], breaks])
    lengths = np.diff(np.concatenate([starts, [pages.size]]))
    return np.stack([pages[starts], lengths.astype(np.uint32)], axis=1)


def _pages_of(runs: npt.NDArray[np.uint32]) -> Indices:
    """The pages of runs, in order."""
    lengths = runs[:, 1].astype(np.int64)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    pages: Indices = (np.repeat(runs[:, 0], lengths) + within).astype(np.uint32)
    return pages
