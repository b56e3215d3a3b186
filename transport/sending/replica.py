"""What the sender knows of the receiver's memory: a digest for each page, pages by their digests,
and a cache of bases.

Owns the arrays and their size; the loop that reads and updates them page by page is in
`transport.kernels.pages`. A digest is known only for a page that this sender has sent or that was
proven equal. The cache holds exact snapshots that were sent, which is what the receiver holds once
it has applied them in order; a slot is valid as long as its page's digest is known. Pages are found
by their digest as far as an entry for each suffices, which the next page with the same last bits
overwrites.

Memory: at most 16 bytes a page, and 4101 bytes a slot, nearly all of it touched only when first
used, or shortly before.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from transport.kernels.pages import NO_PAGE, PAGE_WORDS, UNKNOWN, Knowledge
from transport.wire.frames import MAX_LANES, PAGE_BYTES, STRIPE_PAGES

AHEAD_SLOTS: Final = 1024
"""Of a lane, that are touched before they are needed: what a round with little left may take."""
STEP_SLOTS: Final = 512
"""That are touched at once: a page of 2 MiB where the kernel has such, else 512 page faults."""


class Replica:
    """The sender's knowledge of all pages, shared by the encoders of all lanes.

    Lanes own disjoint stripes of pages and an equal share of the cache each, so encoders of
    different lanes may run at the same time without a lock. Whatever concerns the pages of one
    lane (`Encoder.encode`, `forget`) must come from one thread at a time.
    """

    def __init__(self, n_pages: int, cache_bytes: int, lanes: int = 1) -> None:
        """Know nothing of `n_pages` pages; with a cache of 0 bytes only pages of zeros
        are bases.

        ValueError for numbers out of range.
        """
        if not 0 <= n_pages <= NO_PAGE:
            raise ValueError(f"{n_pages} pages do not fit into 32-bit page numbers")
        if not 1 <= lanes <= MAX_LANES:
            raise ValueError(f"{lanes} lanes; there can be 1 to {MAX_LANES}")
        if cache_bytes < 0:
            raise ValueError(f"a cache of {cache_bytes} bytes")
        self._lanes = lanes
        # More slots than pages would never be used.
        stripes_of_a_lane = -(-n_pages // (STRIPE_PAGES * lanes))
        self._lane_slots = min(cache_bytes // PAGE_BYTES // lanes, stripes_of_a_lane * STRIPE_PAGES)
        slots = self._lane_slots * lanes
        self._digests = np.zeros(n_pages, np.uint64)
        self._slots = np.zeros(n_pages if slots else 0, np.uint32)
        self._cache = np.empty((lanes, self._lane_slots * PAGE_WORDS), np.uint64)
        self._owners = np.full((lanes, self._lane_slots), NO_PAGE, np.uint32)
        self._referenced = np.zeros((lanes, self._lane_slots), np.uint8)
        self._hands = np.zeros((lanes, 1), np.int64)
        self._touched = [0] * lanes
        entries = 1 << max(0, (n_pages // lanes).bit_length() - 1)
        self._originals = np.zeros((lanes, entries), np.uint32)

    @property
    def n_pages(self) -> int:
        """Pages of the flat page space."""
        return self._digests.size

    @property
    def lanes(self) -> int:
        """Lanes among which the pages are dealt."""
        return self._lanes

    def knowledge_of_lane(self, lane: int) -> Knowledge:
        """The arrays as the encoding kernel of `lane` wants them. For one `Encoder`."""
        return Knowledge(
            digests=self._digests,
            slots=self._slots,
            cache=self._cache[lane],
            owners=self._owners[lane],
            referenced=self._referenced[lane],
            hand=self._hands[lane],
            originals=self._originals[lane],
        )

    def touch_ahead(self, lane: int) -> None:
        """Touch some of the slots that `lane` takes next, unless enough of them have been.

        The first use of memory is a page fault, which costs more than to encode a page, and a
        machine that is virtual itself pays several times that. For a time when nothing is to be
        sent.
        """
        # Slots are taken from the first to the last before any is taken again.
        first = max(self._touched[lane], int(self._hands[lane, 0]))
        last = min(self._lane_slots, int(self._hands[lane, 0]) + AHEAD_SLOTS, first + STEP_SLOTS)
        if first < last:
            free = np.flatnonzero(self._owners[lane, first:last] == NO_PAGE) + first
            self._cache[lane, free * PAGE_WORDS] = 0
            self._touched[lane] = last

    def forget(self, indices: npt.NDArray[np.uint32]) -> None:
        """Make these pages (uint32, 1-D) unknown: the next encode sends them, and not as a change;
        until then nothing is sent as a copy of them."""
        self._digests[indices] = UNKNOWN
