"""Proving that both sides hold the same pages, with little on the wire.

Owns both halves: the sender's tasks, which ask, digest meanwhile, compare and narrow down, and the
receiver's answers. Both memories must be quiet meanwhile.

A comparison asks in two steps: for each 256 pages one digest over the pages' digests (8 bytes a
MiB of memory), then, only for blocks that differ, a digest for each page. A region's digest for the
report is BLAKE2b over BLAKE2b digests of `MAX_COMPARE_PAGES` pages' digests each.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transport.page_digests import (
    Digests,
    _chunk_digest,
    _digest_blocks,
    _digest_pages,
    _pages_from,
    _runs_of,
)
from transport.sending.lanes import Outgoing, Task
from transport.sending.rounds import LaneSource
from transport.wire.arrays import Indices, Memory
from transport.wire.errors import RecordError
from transport.wire.records import (
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

AHEAD = 2
"""Requests whose pages this side has not digested yet: the receiver does not run out of them."""


class _Asked:
    """Pages that the receiver digests, and this side, too."""

    def __init__(
        self, lane: LaneSource, request: int, pages: Indices, digests: Digests | None = None
    ) -> None:
        self.request = request
        self.pages = pages
        self._lane = lane
        self._digests = digests

    def digests(self) -> Digests:
        """Of each page here; takes its time when it is called first."""
        if self._digests is None:
            source = self._lane.source
            self._digests = _digest_pages(source.memory, self._lane.files, self.pages, source.seed)
        return self._digests


_Request = tuple[LaneRequest, _Asked]


class _BothDigest(Task):
    """Asks the receiver for digests, and makes the same here while it works."""

    def __init__(self, lane: LaneSource) -> None:
        super().__init__()
        self._lane = lane
        self._not_digested: deque[_Asked] = deque()
        self._again: deque[_Request] = deque()
        """Requests that were lost with a link."""
        self._requests = 0

    def _has_more(self) -> bool:
        return bool(self._again or self._not_digested) or self._has_requests()

    def _produce(self, buffer: Memory) -> Outgoing | None:
        if self._again:
            request, asked = self._again.popleft()
            return Outgoing(request.pack(), (request, asked))
        if self._has_requests() and len(self._not_digested) < AHEAD:
            request, asked = self._next_request(self._requests)
            self._requests += 1
            self._not_digested.append(asked)
            return Outgoing(request.pack(), (request, asked))
        self._not_digested.popleft().digests()
        return None

    def _lose(self, context: _Request) -> None:
        self._again.append(context)

    @abstractmethod
    def _has_requests(self) -> bool: ...

    @abstractmethod
    def _next_request(self, number: int) -> _Request: ...


class CompareShare(_BothDigest):
    """Compare these pages; those that differ are to be sent again."""

    def __init__(self, lane: LaneSource, indices: Indices) -> None:
        """`indices` uint32, strictly ascending, each of this lane."""
        super().__init__(lane)
        self._todo = deque(
            indices[start : start + MAX_COMPARE_PAGES]
            for start in range(0, indices.size, MAX_COMPARE_PAGES)
        )
        self._narrow: deque[tuple[Indices, Digests]] = deque()
        self._differing: list[Indices] = []

    def _has_requests(self) -> bool:
        return bool(self._todo or self._narrow)

    def _next_request(self, number: int) -> _Request:
        if self._narrow:
            asked = _Asked(self._lane, number, *self._narrow.popleft())
            return Compare(number, 1, _runs_of(asked.pages)), asked
        asked = _Asked(self._lane, number, self._todo.popleft())
        return Compare(number, COMPARE_BLOCK_PAGES, _runs_of(asked.pages)), asked

    def _on_answer(self, context: tuple[Compare, _Asked], answer: LaneAnswer) -> None:
        request, asked = context
        block_pages = request.block_pages
        if (
            not isinstance(answer, CompareReply)
            or answer.request != request.request
            or answer.digests.size != -(-asked.pages.size // block_pages)
        ):
            raise RecordError("the receiver answers a comparison that it was not asked for")
        ours = asked.digests()
        if block_pages != 1:
            ours = _digest_blocks(ours, self._lane.source.seed)
        differs = np.repeat(answer.digests != ours, block_pages)[: asked.pages.size]
        if not differs.any():
            return
        pages = asked.pages[differs]
        if block_pages == 1:
            self._lane.forget(pages)
            self._differing.append(pages)
        else:
            self._narrow.append((pages, asked.digests()[differs]))

    def differing(self) -> Indices:
        """Pages that differ; once finished."""
        return np.concatenate([np.empty(0, np.uint32), *self._differing])


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a region, at most `MAX_COMPARE_PAGES` long."""

    region: int
    """Its region's place in the list of regions."""
    first_page: int
    n_pages: int


class DigestShare(_BothDigest):
    """Digest these chunks on both sides."""

    def __init__(self, lane: LaneSource, chunks: Sequence[Chunk]) -> None:
        super().__init__(lane)
        self.digests: dict[Chunk, tuple[bytes, bytes]] = {}
        """Of each chunk, here and at the receiver; once finished."""
        self._todo = deque(chunks)
        self._asked: dict[int, Chunk] = {}
        """By the number of the request."""

    def _has_requests(self) -> bool:
        return bool(self._todo)

    def _next_request(self, number: int) -> _Request:
        chunk = self._todo.popleft()
        self._asked[number] = chunk
        pages = _pages_from(chunk.first_page, chunk.n_pages)
        return Digest(number, chunk.first_page, chunk.n_pages), _Asked(self._lane, number, pages)

    def _on_answer(self, context: tuple[Digest, _Asked], answer: LaneAnswer) -> None:
        request, asked = context
        if not isinstance(answer, DigestReply) or answer.request != request.request:
            raise RecordError("the receiver answers a digest that it was not asked for")
        self.digests[self._asked.pop(request.request)] = (
            _chunk_digest(asked.digests()),
            answer.digest,
        )


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
