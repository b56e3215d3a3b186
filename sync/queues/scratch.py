"""Scratch memory at the IOVAs of a guest's rings, and pages of our own beside them.

Owns which ranges a walk has shown its device.
"""

from collections.abc import Iterable, Sequence

from sync.queues.interface import PAGE_BYTES, MapScratch, Plan, UnmapScratch

_LOWEST_IOVA = 0x10_0000


class Scratch:
    """That of one walk."""

    def __init__(self) -> None:
        self._shown: list[tuple[int, int]] = []

    def show(self, rings: Iterable[tuple[int, int]], room_bytes: int) -> Plan[int]:
        """Show the pages of `rings` (IOVA, length), and room beside them, which is aligned to its
        own size. Returns the IOVA of the room."""
        pages = {
            page
            for base, length in rings
            for page in range(base // PAGE_BYTES, -(-(base + length) // PAGE_BYTES))
        }
        room = -(-_LOWEST_IOVA // room_bytes) * room_bytes
        while not pages.isdisjoint(range(room // PAGE_BYTES, (room + room_bytes) // PAGE_BYTES)):
            room += room_bytes
        for iova, length in (*_runs(pages), (room, room_bytes)):
            yield MapScratch(iova, length)
            self._shown.append((iova, length))
        return room

    def hide(self) -> Plan[None]:
        """Take everything away."""
        while self._shown:
            yield UnmapScratch(*self._shown[-1])
            self._shown.pop()


def _runs(pages: set[int]) -> Sequence[tuple[int, int]]:
    """IOVA and length of each run of adjoining pages."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        iova, length = runs[-1] if runs else (0, 0)
        if runs and iova + length == page * PAGE_BYTES:
            runs[-1] = iova, length + PAGE_BYTES
        else:
            runs.append((page * PAGE_BYTES, PAGE_BYTES))
    return runs
