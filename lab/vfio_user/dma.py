"""The DMA regions of one client: the table of what is mapped, and access to it by message.

`DmaTable` is sans-IO and thread-safe; `DmaPort` is what a device uses. Mapping descriptors is the
device's own business. Source: vfio-user specification, VFIO_USER_DMA_MAP, _UNMAP, _READ, _WRITE.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST, EFAULT, EINVAL, ENOENT, ENOSPC

from lab.vfio_user.access import DmaAccess
from lab.vfio_user.channel import Channel
from sync.vfio_user.access import DmaFlags, DmaMap
from sync.vfio_user.errors import Disconnected, ProtocolError, VfioUserError
from sync.vfio_user.framing import close_fds
from sync.vfio_user.wire import Command


class DmaTable:
    """Regions sorted by address, no two overlapping, at most `max_regions`.

    `page_bytes`: addresses and sizes have to be multiples of it.
    """

    def __init__(self, max_regions: int, page_bytes: int) -> None:
        self._max_regions = max_regions
        self._page_bytes = page_bytes
        self._changed = threading.Condition()
        self._regions: list[DmaMap] = []
        self._starts: list[int] = []
        self._in_use: list[tuple[int, int]] = []

    @property
    def regions(self) -> tuple[DmaMap, ...]:
        with self._changed:
            return tuple(self._regions)

    def check(self, region: DmaMap) -> None:
        """Raise `VfioUserError` if `region` cannot be added: EINVAL, EEXIST or ENOSPC."""
        if (region.address | region.size) % self._page_bytes:
            raise VfioUserError(EINVAL, "DMA region does not consist of whole pages")
        with self._changed:
            place = bisect_right(self._starts, region.address)
            if place and self._regions[place - 1].end > region.address:
                raise VfioUserError(EEXIST)
            if place < len(self._starts) and self._starts[place] < region.end:
                raise VfioUserError(EEXIST)
            if len(self._regions) >= self._max_regions:
                raise VfioUserError(ENOSPC, "no room for another DMA region")

    def add(self, region: DmaMap) -> None:
        """Add a region that `check` has accepted."""
        with self._changed:
            place = bisect_right(self._starts, region.address)
            self._starts.insert(place, region.address)
            self._regions.insert(place, region)

    def find(self, address: int, size: int) -> DmaMap:
        """Return the region with exactly this address and size; `VfioUserError` ENOENT if none."""
        with self._changed:
            place = bisect_right(self._starts, address) - 1
            if place >= 0:
                region = self._regions[place]
                if (region.address, region.size) == (address, size):
                    return region
        raise VfioUserError(ENOENT, "no DMA region has this address and size")

    def remove(self, region: DmaMap) -> None:
        """Remove a region that `find` has returned; return when no access to it is under way."""
        with self._changed:
            place = bisect_right(self._starts, region.address) - 1
            del self._starts[place], self._regions[place]
            while any(start < region.end and region.address < end for start, end in self._in_use):
                self._changed.wait()

    @contextmanager
    def using(self, address: int, count: int, flag: DmaFlags) -> Iterator[None]:
        """Keep [address, address + count) from being removed. `VfioUserError` EFAULT if some of it
        is not mapped with `flag`."""
        span = (address, address + count)
        with self._changed:
            self._require(address, address + count, flag)
            self._in_use.append(span)
        try:
            yield
        finally:
            with self._changed:
                self._in_use.remove(span)
                self._changed.notify_all()

    def _require(self, address: int, end: int, flag: DmaFlags) -> None:
        place = bisect_right(self._starts, address) - 1
        while address < end:
            region = self._regions[place] if 0 <= place < len(self._regions) else None
            if region is None or not region.address <= address < region.end:
                raise VfioUserError(EFAULT, f"DMA address {address:#x} is not mapped")
            if not region.flags & flag:
                raise VfioUserError(EFAULT, f"DMA address {address:#x} is not mapped for this")
            address = region.end
            place += 1


class DmaPort:
    """The client's memory, reached by message. Usable from any thread while the client is there.

    Accesses are split into transfers of the size agreed on. All methods raise `VfioUserError` when
    the client refuses or the range is not mapped that way (EFAULT), `Disconnected` when it has
    gone.
    """

    def __init__(
        self, channel: Channel, table: DmaTable, max_transfer_bytes: int, connection: Channel
    ) -> None:
        """Use `channel` (main or twin socket) for the messages; when it is lost, end `connection`
        (the main socket)."""
        self._channel = channel
        self._table = table
        self._max_transfer_bytes = max_transfer_bytes
        self._connection = connection

    def read(self, address: int, count: int) -> bytes:
        """Return `count` bytes of client memory at a DMA address."""
        with self._table.using(address, count, DmaFlags.READ):
            parts = []
            for start in range(address, address + count, self._max_transfer_bytes):
                length = min(address + count - start, self._max_transfer_bytes)
                parts.append(self._transfer(Command.DMA_READ, DmaAccess(start, length)).data)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` into client memory at a DMA address."""
        view = memoryview(data).cast("B")
        with self._table.using(address, len(view), DmaFlags.WRITE):
            for start in range(0, len(view), self._max_transfer_bytes):
                part = bytes(view[start : start + self._max_transfer_bytes])
                self._transfer(Command.DMA_WRITE, DmaAccess(address + start, len(part), part))

    def _transfer(self, command: Command, request: DmaAccess) -> DmaAccess:
        try:
            message = self._channel.call(command, request.pack())
            close_fds(message.fds)
            reply = DmaAccess.unpack(message.body)
            carried = request.count if command == Command.DMA_READ else 0
            if (reply.address, reply.count) != (request.address, request.count):
                raise ProtocolError("DMA reply does not answer the request")
            if len(reply.data) != carried:
                raise ProtocolError(f"DMA reply carries {len(reply.data)} bytes, not {carried}")
        except (Disconnected, ProtocolError) as error:
            self._connection.fail(error)
            raise Disconnected(str(error)) from error
        return reply
