"""DMA dirty-page transmission: the interface that hides how a device's writes are found out.

Owns what every tracker offers, and the choice between them. A bitmap has one bit for each page of
4096 bytes of the flat page space: `uint64` words, little-endian, bit i of word w is page 64 w + i.

    tracker    finds writes by                                          misses
    logging    the device's own log (VFIO DMA logging)                  nothing
    queues     the commands that the guest gives the device             nothing
    message    the device's DMA going through the gateway as messages   nothing
    scan       comparing digests of all pages with the last time's      nothing, but costs the most

A tracker is started when the gateway has gone to mediated state, collected once a round and once
more when the device is at rest, and stopped at the end.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sync.errors import SyncError
from sync.memory import PAGE_BYTES

Bitmap = NDArray[np.uint64]
Method = Literal["logging", "queues", "message", "scan"]
RequestedTracker = Literal["auto", "logging", "queues", "message", "scan"]
GatewayTracking = Literal["logging", "queues", "message", "none"]
_LACKS = {
    "logging": "the device does not offer DMA logging",
    "queues": "which pages the device writes does not follow from what its guest tells it",
    "message": "the DMA of a device of the host cannot be had to pass the gateway",
}


class DirtyError(SyncError):
    """The pages that a device wrote cannot be told any more: the migration has to start again."""


class NoTracker(SyncError):
    """The device does not offer what the tracker that was asked for needs."""


class Mediation(Protocol):
    """What a tracker needs of the answer to `mediate` (`gateway.control.requests.Mediation`)."""

    @property
    def page_size(self) -> int: ...

    @property
    def dirty_fd(self) -> int | None: ...

    @property
    def n_pages(self) -> int: ...

    @property
    def half_bytes(self) -> int: ...

    @property
    def layout_generation(self) -> int: ...


class Offers(Protocol):
    """Which trackers can have a device (`gateway.control.info.Supports`)."""

    @property
    def logging(self) -> bool: ...

    @property
    def queues(self) -> bool: ...

    @property
    def message(self) -> bool: ...


class DirtyPort(Protocol):
    """What of a gateway's client a tracker uses."""

    async def dirty(self) -> tuple[int, int, bool]:
        """The half that is quiet now, the layout's generation, whether the log is complete."""


class Tracker(ABC):
    """One device's tracker, over a flat page space of `n_pages` pages."""

    method: ClassVar[Method]
    asks_gateway_for: ClassVar[GatewayTracking]
    """What to give to the gateway's `mediate` as its tracker."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.page_size = PAGE_BYTES
        """What the tracker can tell apart, in bytes. Bits are always those of 4096-byte pages."""
        self.complete = True
        """False: the device did not report all that it wrote; every page has to be compared."""
        self.touched: Bitmap = np.zeros(n_words(n_pages), np.uint64)
        """All pages ever collected: what has to be proven equal at the end (I6)."""

    @abstractmethod
    async def start(self, mediation: Mediation) -> None:
        """Begin. Owns and closes the descriptor in `mediation`. Raises `DirtyError`."""

    async def collect(self) -> Bitmap:
        """The pages written since the last call, and forget them.

        They are read and cleared here, before the caller reads the pages (I1): a page that is
        written while the caller copies it is in the next bitmap. Cancelled, it loses nothing: what
        it has read by then is in the next bitmap, too. Raises `DirtyError`.
        """
        bitmap = await self._read_and_clear()
        self.touched |= bitmap
        return bitmap

    @abstractmethod
    async def _read_and_clear(self) -> Bitmap: ...

    @abstractmethod
    async def stop(self) -> None:
        """Let go of everything. May be called in any state, and again."""


def n_words(n_pages: int) -> int:
    """Words in a bitmap of so many pages."""
    return -(-n_pages // 64)


def choose_method(method: RequestedTracker, offers: Offers) -> Method:
    """What to use for a device. `auto` prefers what leaves it at full speed. Raises `NoTracker`."""
    able: dict[Method, bool] = {
        "logging": offers.logging,
        "queues": offers.queues,
        "message": offers.message,
        "scan": True,
    }
    if method == "auto":
        return next(each for each, is_able in able.items() if is_able)
    if not able[method]:
        raise NoTracker(f"{_LACKS[method]}: use the tracker 'auto', or 'scan'")
    return method
