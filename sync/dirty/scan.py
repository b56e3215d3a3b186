"""The tracker for a device that can neither log nor be made to send messages: compare everything.

Owns the digests of the last time. The scan itself is a compiled loop that the caller brings along.
"""

import os
from collections.abc import Callable

import numpy as np
import trio
from numpy.typing import NDArray

from sync.dirty.tracker import Bitmap, DirtyError, Mediation, Tracker, n_words
from sync.memory import PAGE_BYTES

PIECE_PAGES = 1 << 15
"""Pages that are read without a chance to give up, some 10 ms; a multiple of 64."""

Scan = Callable[[NDArray[np.uint8], NDArray[np.uint64]], Bitmap]
"""(memory, digests) -> bitmap of the pages whose digest differs, and puts the new digests in."""


class ScanTracker(Tracker):
    """Sees the vCPUs' writes, too: it cannot tell who wrote. 8 bytes of digest for each page."""

    method = "scan"
    asks_gateway_for = "none"

    def __init__(self, memory: NDArray[np.uint8], scan: Scan) -> None:
        super().__init__(len(memory) // PAGE_BYTES)
        self._memory = memory
        self._scan = scan
        self._digests: NDArray[np.uint64] | None = None
        self._found: Bitmap = np.zeros(n_words(self.n_pages), np.uint64)
        """What a reading that was given up had found."""

    async def start(self, mediation: Mediation) -> None:
        """Takes the digests that the first `collect` compares with."""
        if mediation.dirty_fd is not None:
            os.close(mediation.dirty_fd)
        self._digests = np.zeros(self.n_pages, np.uint64)
        await self._read_and_clear()

    async def _read_and_clear(self) -> Bitmap:
        digests = self._digests
        if digests is None:
            raise DirtyError("the scan has not been started")
        # The digest is taken of what is there now: a page written from here on differs from it
        # the next time, whatever the caller copies in between (I1).
        for first in range(0, self.n_pages, PIECE_PAGES):
            piece = digests[first : first + PIECE_PAGES]
            memory = self._memory[first * PAGE_BYTES : (first + len(piece)) * PAGE_BYTES]
            bitmap = await trio.to_thread.run_sync(self._scan, memory, piece)
            if len(bitmap) != n_words(len(piece)):
                raise DirtyError("the scan does not cover the guest's memory")
            self._found[first // 64 : first // 64 + len(bitmap)] |= bitmap
        found = self._found
        self._found = np.zeros_like(found)
        return found

    async def stop(self) -> None:
        self._digests = None
