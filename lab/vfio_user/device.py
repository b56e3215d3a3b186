"""What a device has to be so that a server can serve it."""

import os
from abc import ABC, abstractmethod
from errno import ENOTSUP

from lab.vfio_user.dma import DmaPort
from sync.vfio_user.protocol import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Feature,
    IrqInfo,
    RegionInfo,
    SetIrqs,
    VfioUserError,
)


class Device(ABC):
    """A device behind a server.

    Methods are called from the serving thread, one at a time, in the order of the client's
    requests. Each that serves a request may raise `VfioUserError(errno)`: the client gets an error
    reply. Arguments have been checked against the device's own description of itself. Descriptors
    passed in belong to the device once the method has returned; if it raises they are closed for
    it.
    """

    @abstractmethod
    def device_info(self) -> DeviceInfo:
        """Describe the device. Has to be the same for as long as a client is there."""

    @abstractmethod
    def region_info(self, index: int) -> RegionInfo:
        """Describe a region below `num_regions`. Has to be the same while a client is there."""

    @abstractmethod
    def irq_info(self, index: int) -> IrqInfo:
        """Describe an interrupt type below `num_irqs`. Has to be the same while a client is
        there."""

    @abstractmethod
    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Return exactly `count` (1 or more) bytes at `offset` of a region."""

    @abstractmethod
    def region_write(self, region: int, offset: int, data: bytes) -> None:
        """Write one or more bytes at `offset` of a region."""

    def region_fd(self, index: int) -> int | None:
        """Return the descriptor to map a region with flag MMAP; it stays the device's own."""
        return None

    def set_irqs(self, request: SetIrqs, fds: list[int]) -> None:
        """Set an interrupt action; `fds` has `request.count` descriptors, or none, with
        DATA_EVENTFD, and is empty otherwise."""
        raise VfioUserError(ENOTSUP)

    def dma_map(self, region: DmaMap, fd: int | None) -> None:
        """Learn of a DMA region; without a descriptor it is reached through the `DmaPort`."""
        if fd is not None:
            os.close(fd)

    def dma_unmap(self, request: DmaUnmap) -> None:  # noqa: B027
        """Give up one region (never flag ALL); return when nothing refers to it any more.

        Accesses through the `DmaPort` are waited for by the server.
        """

    def reset(self) -> None:
        """Reset the device (DEVICE_RESET)."""
        raise VfioUserError(ENOTSUP)

    def feature(self, request: Feature) -> bytes:
        """Get, set or probe a feature.

        Returns the feature's data for GET; for SET the data that is now in effect, or nothing if it
        is what was asked for; nothing for PROBE.
        """
        raise VfioUserError(ENOTSUP)

    def migration_read(self, size: int) -> bytes:
        """Return `size` bytes of migration data, or less if these are the last."""
        raise VfioUserError(ENOTSUP)

    def migration_write(self, data: bytes) -> None:
        """Take the next bytes of migration data."""
        raise VfioUserError(ENOTSUP)

    def attached(self, dma: DmaPort) -> None:  # noqa: B027
        """A client has come; its memory can be reached through `dma` until it goes."""

    def detached(self) -> None:  # noqa: B027
        """The client has gone: unmap all regions, close interrupts, keep the device's state."""
