"""What the receiver answers to a request for digests of its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transport.page_digests import (
    _chunk_digest,
    _digest_blocks,
    _digest_pages,
    _pages_from,
    _pages_of,
)
from transport.wire.arrays import Memory
from transport.wire.errors import RecordError
from transport.wire.records import (
    CompareReply,
    Digest,
    DigestReply,
    LaneAnswer,
    LaneRequest,
)

if TYPE_CHECKING:
    from transport.kernels.files import Files


def answer_request(request: LaneRequest, memory: Memory, files: Files, seed: int) -> LaneAnswer:
    """The receiver's half. `RecordError` for pages outside `memory`."""
    try:
        if isinstance(request, Digest):
            pages = _pages_from(request.first_page, request.n_pages)
            digests = _digest_pages(memory, files, pages, seed)
            return DigestReply(request.request, _chunk_digest(digests))
        digests = _digest_pages(memory, files, _pages_of(request.runs), seed)
        if request.block_pages != 1:
            digests = _digest_blocks(digests, seed)
        return CompareReply(request.request, digests)
    except IndexError as error:
        raise RecordError(f"a comparison of pages that are not there: {error}") from None
