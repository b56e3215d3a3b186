"""The tracker for a device that can neither log nor be made to send messages: compare everything.

Owns the digests of the last time. The scan itself is a compiled loop that the caller brings along.
"""

import os
from collections.abc import Callable

import numpy as np
import trio
from numpy.typing import NDArray

from sync.dirty.tracker import PAGE_BYTES, Bitmap, DirtyError, Mediation, Tracker, n_words

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
        bitmap = await trio.to_thread.run_sync(self._scan, self._memory, digests)
        if len(bitmap) != n_words(self.n_pages):
            raise DirtyError("the scan does not cover the guest's memory")
        return bitmap

    async def stop(self) -> None:
        self._digests = None
