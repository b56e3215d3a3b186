"""Which pieces of files guest memory is a mapping of."""

from collections.abc import Sequence

from transport.wire.frames import PAGE_BYTES

Extent = tuple[int, int, int, int]
"""Pages that are a piece of a file: first page, number of pages, descriptor, byte of the file."""


def check_extents(extents: Sequence[Extent], n_pages: int) -> None:
    """Raise ValueError unless each lies in a memory of `n_pages` pages, at a page of its file."""
    for first, count, _, offset in extents:
        if min(first, count, offset) < 0 or first + count > n_pages or offset % PAGE_BYTES:
            raise ValueError(f"{count} pages from {first} on, at {offset} of a file: of {n_pages}")
