"""Which registers whole batches of accesses touch, looked up in one go.

Owns the lookup alone: `layout` has the addresses, and `touched` for a single access.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sync.registers.profile.layout import Layout

UNLISTED = -1
STRADDLES = -2
_REGION_SHIFT = 48


class Classifier:
    """Looks records up (`sync.registers.record`, as numpy has them) in `layout`."""

    def __init__(self, layout: Layout) -> None:
        ordered = sorted(layout.places, key=lambda place: (place.region, place.offset))
        self._starts = _keys(
            np.array([place.region for place in ordered], np.uint64),
            np.array([place.offset for place in ordered], np.uint64),
        )
        self._ends = self._starts + np.array([place.size for place in ordered], np.uint64)
        self._indices = np.array([place.index for place in ordered], np.int32)
        sizes = layout.view.region_sizes
        self._region_sizes = np.zeros(max(sizes, default=0) + 1, np.uint64)
        for region, size in sizes.items():
            self._region_sizes[region] = min(size, 1 << _REGION_SHIFT)

    def inside(self, records: NDArray[Any]) -> NDArray[np.bool_]:
        """Which records lie within a region that the device has."""
        known = records["region"] < len(self._region_sizes)
        sizes = self._region_sizes[np.where(known, records["region"], 0)]
        size = records["size"].astype(np.uint64)
        inside: NDArray[np.bool_] = (
            known & (size <= sizes) & (records["offset"] <= sizes - np.minimum(size, sizes))
        )
        return inside

    def classify(self, records: NDArray[Any]) -> NDArray[np.int32]:
        """The place that each record touches: its index, `UNLISTED`, or `STRADDLES`.

        `records` have passed `inside`. An access straddles if only part of it lies in a register.
        """
        if not len(self._starts):
            return np.full(len(records), UNLISTED, np.int32)
        first = _keys(records["region"].astype(np.uint64), records["offset"])
        end = first + records["size"]
        slot = np.searchsorted(self._starts, first, side="right").astype(np.int64) - 1
        before = np.maximum(slot, 0)
        after = np.minimum(slot + 1, len(self._starts) - 1)
        begins_in = (slot >= 0) & (first < self._ends[before])
        ends_in = begins_in & (end <= self._ends[before])
        reaches_next = (slot + 1 < len(self._starts)) & (end > self._starts[after])
        found = np.where(ends_in, self._indices[before], UNLISTED)
        return np.where(
            (begins_in & ~ends_in) | (~begins_in & reaches_next), STRADDLES, found
        ).astype(np.int32)


def _keys(regions: NDArray[np.uint64], offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return (regions << np.uint64(_REGION_SHIFT)) + offsets
