"""Proving that both sides hold the same pages, with little on the wire.

Owns both halves: the sender's tasks, which digest, ask and narrow down, and the receiver's answers.
Both memories must be quiet meanwhile.

A comparison asks in two steps: for each 256 pages one digest over the pages' digests (8 bytes a
MiB of memory), then, only for blocks that differ, a digest for each page. A region's digest for the
report is BLAKE2b over BLAKE2b digests of `MAX_COMPARE_PAGES` pages' digests each.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from transport.errors import RecordError
from transport.lanes import Outgoing, Task
from transport.records import (
    COMPARE_BLOCK_PAGES,
    MAX_COMPARE_PAGES,
    REGION_DIGEST_BYTES,
    Compare,
    CompareReply,
    Digest,
    DigestReply,
    LaneAnswer,
    LaneRequest,
)
from transport.rounds import Indices, LaneSource, Memory

if TYPE_CHECKING:
    from transport.extents import Extent

Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A COMPARE under way."""

    request: int
    pages: Indices
    digests: Digests
    """Of each page."""
    block_pages: int


class CompareShare(Task):
    """Compare these pages; those that differ are to be sent in full next time."""

    def __init__(self, lane: LaneSource, indices: Indices) -> None:
        """`indices` uint32, strictly ascending, each of this lane."""
        super().__init__()
        self._lane = lane
        self._todo = deque(
            indices[start : start + MAX_COMPARE_PAGES]
            for start in range(0, indices.size, MAX_COMPARE_PAGES)
        )
        self._narrow: deque[tuple[Indices, Digests]] = deque()
        self._differing: list[Indices] = []
        self._requests = 0

    def _has_more(self) -> bool:
        return bool(self._todo or self._narrow)

    def _produce(self, buffer: Memory) -> Outgoing | None:
        if self._narrow:
            pages, digests = self._narrow.popleft()
            return self._ask(pages, digests, digests, 1)
        pages = self._todo.popleft()
        seed = self._lane.source.seed
        source = self._lane.source
        digests = _digest_pages(source.memory, source.files, pages, seed)
        return self._ask(pages, digests, _digest_blocks(digests, seed), COMPARE_BLOCK_PAGES)

    def _on_answer(self, context: _Asked, answer: LaneAnswer) -> None:
        expected = -(-context.pages.size // context.block_pages)
        if (
            not isinstance(answer, CompareReply)
            or answer.request != context.request
            or answer.differs.size != expected
        ):
            raise RecordError("the receiver answers a comparison that it was not asked for")
        differs = np.repeat(answer.differs, context.block_pages)[: context.pages.size]
        if not differs.any():
            return
        pages = context.pages[differs]
        if context.block_pages == 1:
            self._lane.forget(pages)
            self._differing.append(pages)
        else:
            self._narrow.append((pages, context.digests[differs]))

    def differing(self) -> Indices:
        """Pages that differ; once finished."""
        return np.concatenate([np.empty(0, np.uint32), *self._differing])

    def _ask(self, pages: Indices, digests: Digests, asked: Digests, block_pages: int) -> Outgoing:
        context = _Asked(self._requests, pages, digests, block_pages)
        self._requests += 1
        message = Compare(context.request, block_pages, _runs_of(pages), asked)
        return Outgoing(message.pack(), context)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a region, at most `MAX_COMPARE_PAGES` long."""

    region: int
    """Its region's place in the list of regions."""
    first_page: int
    n_pages: int


class DigestShare(Task):
    """Digest these chunks on both sides."""

    def __init__(self, lane: LaneSource, chunks: Sequence[Chunk]) -> None:
        super().__init__()
        self.digests: dict[Chunk, tuple[bytes, bytes]] = {}
        """Of each chunk, here and at the receiver; once finished."""
        self._lane = lane
        self._todo = deque(chunks)
        self._requests = 0

    def _has_more(self) -> bool:
        return bool(self._todo)

    def _produce(self, buffer: Memory) -> Outgoing | None:
        chunk = self._todo.popleft()
        message = Digest(self._requests, chunk.first_page, chunk.n_pages)
        self._requests += 1
        return Outgoing(message.pack(), (message.request, chunk))

    def _on_answer(self, context: tuple[int, Chunk], answer: LaneAnswer) -> None:
        request, chunk = context
        if not isinstance(answer, DigestReply) or answer.request != request:
            raise RecordError("the receiver answers a digest that it was not asked for")
        source = self._lane.source
        local = _chunk_digest(
            source.memory, source.files, chunk.first_page, chunk.n_pages, source.seed
        )
        self.digests[chunk] = (local, answer.digest)


def chunks_of(regions: Sequence[tuple[int, int]]) -> list[Chunk]:
    """Regions (first page, number of pages) in pieces."""
    return [
        Chunk(number, start, min(MAX_COMPARE_PAGES, first + n_pages - start))
        for number, (first, n_pages) in enumerate(regions)
        for start in range(first, first + n_pages, MAX_COMPARE_PAGES)
    ]


def region_digest(chunk_digests: Sequence[bytes]) -> str:
    """The digest of a region, hex, from those of its chunks in order."""
    return hashlib.blake2b(b"".join(chunk_digests), digest_size=REGION_DIGEST_BYTES).hexdigest()


def answer_request(
    request: LaneRequest, memory: Memory, files: Sequence[Extent], seed: int
) -> LaneAnswer:
    """The receiver's half. `RecordError` for pages outside `memory`."""
    try:
        if isinstance(request, Digest):
            digest = _chunk_digest(memory, files, request.first_page, request.n_pages, seed)
            return DigestReply(request.request, digest)
        digests = _digest_pages(memory, files, _pages_of(request.runs), seed)
        if request.block_pages != 1:
            digests = _digest_blocks(digests, seed)
        return CompareReply(request.request, digests != request.digests)
    except IndexError as error:
        raise RecordError(f"a comparison of pages that are not there: {error}") from None


def _chunk_digest(
    memory: Memory, files: Sequence[Extent], first_page: int, n_pages: int, seed: int
) -> bytes:
    pages = np.arange(first_page, first_page + n_pages, dtype=np.int64)
    if first_page + n_pages > 1 << 32:
        raise IndexError(f"page {first_page + n_pages - 1}")
    digests = _digest_pages(memory, files, pages.astype(np.uint32), seed)
    return hashlib.blake2b(digests.tobytes(), digest_size=REGION_DIGEST_BYTES).digest()


def _digest_pages(memory: Memory, files: Sequence[Extent], pages: Indices, seed: int) -> Digests:
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
