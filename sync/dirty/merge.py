"""Several devices of one VM write to one memory: their dirty pages as one bitmap.

Owns the union. Each tracker is started and stopped by itself, with its own gateway.
"""

from collections.abc import Sequence

import numpy as np

from sync.dirty.tracker import Bitmap, DirtyError, Tracker


class MergedTrackers:
    """What `Tracker` offers, of all of `trackers` together."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        if len({tracker.n_pages for tracker in trackers}) != 1:
            raise DirtyError(
                "the devices do not see the same guest memory: do their gateways serve the same VM?"
            )
        self._trackers = tuple(trackers)
        self.n_pages = trackers[0].n_pages

    @property
    def page_size(self) -> int:
        """The coarsest, in bytes."""
        return max(tracker.page_size for tracker in self._trackers)

    @property
    def complete(self) -> bool:
        return all(tracker.complete for tracker in self._trackers)

    @property
    def touched(self) -> Bitmap:
        return _union([tracker.touched for tracker in self._trackers])

    async def collect(self) -> Bitmap:
        """See `Tracker.collect`."""
        return _union([await tracker.collect() for tracker in self._trackers])

    async def stop(self) -> None:
        for tracker in self._trackers:
            await tracker.stop()


def _union(bitmaps: Sequence[Bitmap]) -> Bitmap:
    union: Bitmap = np.bitwise_or.reduce(bitmaps)
    return union
