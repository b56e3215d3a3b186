"""The trackers whose bits the gateway writes: the device's log, its queues, and DMA by message.

Owns this side of the bitmap that both processes map: two halves, one of which the gateway writes
at any time. Not owned: how the gateway comes by the bits.
"""

import mmap
import os

import numpy as np
import trio

from sync.dirty.tracker import Bitmap, DirtyError, DirtyPort, Mediation, Tracker, n_words


class SharedBitmapTracker(Tracker):
    """A tracker whose bits the gateway writes into a bitmap that both map."""

    def __init__(self, port: DirtyPort, n_pages: int) -> None:
        super().__init__(n_pages)
        self._port = port
        self._mapping: mmap.mmap | None = None
        self._halves: list[Bitmap] = []
        self._generation = 0

    async def start(self, mediation: Mediation) -> None:
        if mediation.dirty_fd is None:
            raise DirtyError("the gateway tracks nothing")
        try:
            self._map(mediation, mediation.dirty_fd)
        finally:
            os.close(mediation.dirty_fd)
        self.page_size = mediation.page_size
        self._generation = mediation.layout_generation

    async def _read_and_clear(self) -> Bitmap:
        # Once the gateway is asked, the bits are in the half that it names, and nowhere else.
        with trio.CancelScope(shield=True):
            half, generation, complete = await self._port.dirty()
        if generation != self._generation:
            raise DirtyError(
                "the guest's memory map changed during the migration: try again, "
                "when the guest has finished booting or plugging"
            )
        if half not in range(len(self._halves)):
            raise DirtyError(f"the gateway named half {half} of the dirty bitmap")
        self.complete = self.complete and complete
        bitmap = self._halves[half].copy()
        # The gateway writes to this half again only after the next call.
        self._halves[half][:] = 0
        if self.n_pages % 64 and len(bitmap):
            bitmap[-1] &= np.uint64((1 << self.n_pages % 64) - 1)
        return bitmap

    async def stop(self) -> None:
        self._halves = []
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    def _map(self, mediation: Mediation, fd: int) -> None:
        words = n_words(self.n_pages)
        half_bytes = mediation.half_bytes
        if (
            mediation.n_pages != self.n_pages
            or half_bytes % 8
            or half_bytes < 8 * words
            or os.fstat(fd).st_size < 2 * half_bytes
        ):
            raise DirtyError(
                f"the gateway's dirty bitmap is not one of {self.n_pages} pages: "
                "its memory map is not the one that was asked for"
            )
        if not half_bytes:
            self._halves = [np.zeros(0, np.uint64)] * 2
            return
        self._mapping = mmap.mmap(fd, 2 * half_bytes)
        both = np.frombuffer(self._mapping, np.uint64, 2 * half_bytes // 8)
        second = half_bytes // 8
        self._halves = [both[:words], both[second : second + words]]


class LoggingTracker(SharedBitmapTracker):
    """The device logs its own writes; the gateway fetches the log (VFIO DMA logging)."""

    method = "logging"
    asks_gateway_for = "logging"


class QueueTracker(SharedBitmapTracker):
    """The gateway follows the device's queues: what is written is named by commands."""

    method = "queues"
    asks_gateway_for = "queues"


class MessageTracker(SharedBitmapTracker):
    """The device has no mapping of guest memory: each access is a message to the gateway."""

    method = "message"
    asks_gateway_for = "message"
