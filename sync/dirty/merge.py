"""Several devices of one VM write to one memory: their dirty pages as one bitmap.

Owns the union. Each tracker is started and stopped by itself, with its own gateway.
"""

from collections.abc import Sequence

import numpy as np

from sync.dirty.tracker import Bitmap, DirtyError, Tracker, n_words


class MergedTrackers:
    """A tracker that is all of `trackers` together."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        if len({tracker.n_pages for tracker in trackers}) != 1:
            raise DirtyError(
                "the devices do not see the same guest memory: do their gateways serve the same VM?"
            )
        self._trackers = tuple(trackers)
        self.n_pages = trackers[0].n_pages
        self._found: Bitmap = np.zeros(n_words(self.n_pages), np.uint64)
        """What some trackers told in a call that was cancelled at another one."""

    @property
    def page_size(self) -> int:
        """Bytes of a page of the coarsest tracker."""
        return max(tracker.page_size for tracker in self._trackers)

    @property
    def complete(self) -> bool:
        return all(tracker.complete for tracker in self._trackers)

    @property
    def touched(self) -> Bitmap:
        touched: Bitmap = np.bitwise_or.reduce([tracker.touched for tracker in self._trackers])
        return touched

    async def collect(self) -> Bitmap:
        """The pages that any device wrote since the last call, as a bitmap (`Tracker.collect`)."""
        for tracker in self._trackers:
            self._found |= await tracker.collect()
        found = self._found
        self._found = np.zeros_like(found)
        return found

    async def stop(self) -> None:
        for tracker in self._trackers:
            await tracker.stop()
