"""virtio-blk: requests on a disk image.

Owns what a request means and how its data gets between the image and guest memory: straight into
our own mapping of it, or by message where there is none. Does not own rings, registers or the file.

Source: virtio 1.2, section 5.2.
"""

import logging
import struct
from collections.abc import Iterator
from enum import IntEnum

from lab.devices.disk import SECTOR_BYTES, Disk
from lab.devices.errors import DeviceError
from lab.devices.memory import Segment
from lab.devices.virtio.pci_transport import MAX_QUEUES, VirtioDevice
from lab.devices.virtio.virtqueue import Chain, RingError

logger = logging.getLogger(__name__)

DEVICE_ID = 2
SERIAL_BYTES = 20
QUEUE_SIZE = 256
SEGMENT_MAX = QUEUE_SIZE - 2
"""Data segments in a request: a queue's worth without header and status."""
SEGMENT_MAX_BYTES = 1 << 20
REQUEST_MAX_BYTES = SEGMENT_MAX * SEGMENT_MAX_BYTES
"""What a driver that keeps to both limits can ask for; it bounds the time of one request."""

_CLASS_CODE = 0x01_00_00
_PIECE_BYTES = 1 << 20
"""How much data of a region without a descriptor is copied at a time."""

_F_SIZE_MAX = 1 << 1
_F_SEG_MAX = 1 << 2
_F_RO = 1 << 5
_F_BLK_SIZE = 1 << 6
_F_FLUSH = 1 << 9
_F_TOPOLOGY = 1 << 10
_F_MQ = 1 << 12

_HEADER = struct.Struct("<I4xQ")
_CONFIG = struct.Struct("<QIIHBBIBBHIBxH")
_PHYSICAL_BLOCK_EXPONENT = 3


class RequestType(IntEnum):
    """What a request is for (virtio specification 1.2, 5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8


class RequestStatus(IntEnum):
    """How a request ended (virtio specification 1.2, 5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class VirtioBlk(VirtioDevice):
    """A disk with `n_queues` request queues. `serial`: up to 20 ASCII characters.

    The other arguments are those of `VirtioDevice`. Raises `DeviceError` for bad ones.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        serial: str = "",
        n_queues: int = 1,
        n_workers: int = 4,
        v2: bool = False,
        logging_page_bytes: int | None = None,
        express: bool = False,
    ) -> None:
        if not serial.isascii() or len(serial) > SERIAL_BYTES:
            raise DeviceError(f"a serial has up to {SERIAL_BYTES} ASCII characters: {serial!r}")
        if not 1 <= n_queues <= MAX_QUEUES:
            raise DeviceError(f"the device can have 1 to {MAX_QUEUES} queues, not {n_queues}")
        self._disk = disk
        self._serial = serial.encode().ljust(SERIAL_BYTES, b"\0")
        self._config = _CONFIG.pack(
            disk.capacity_sectors,
            SEGMENT_MAX_BYTES,
            SEGMENT_MAX,
            *(0, 0, 0),
            SECTOR_BYTES,
            _PHYSICAL_BLOCK_EXPONENT,
            *(0, 1, 0, 0),
            n_queues,
        )
        features = _F_SIZE_MAX | _F_SEG_MAX | _F_BLK_SIZE | _F_FLUSH | _F_TOPOLOGY | _F_MQ
        super().__init__(
            DEVICE_ID,
            _CLASS_CODE,
            features=features | (_F_RO if disk.read_only else 0),
            config_bytes=len(self._config),
            n_queues=n_queues,
            queue_size=QUEUE_SIZE,
            n_workers=n_workers,
            v2=v2,
            logging_page_bytes=logging_page_bytes,
            express=express,
        )

    def close(self) -> None:
        super().close()
        self._disk.close()

    def device_config(self) -> bytes:
        return self._config

    def execute(self, chain: Chain) -> int:
        raw, outgoing = _split_front(chain.readable, _HEADER.size)
        incoming, status_byte = _split_last_byte(chain.writable)
        header = b"".join(self.memory.read_segment(segment) for segment in raw)
        kind, sector = _HEADER.unpack(header)
        try:
            status, written = self._perform(kind, sector, outgoing, incoming)
        except OSError as error:
            reason = error.strerror
            logger.warning("request of type %d at sector %d failed: %s", kind, sector, reason)
            status, written = RequestStatus.IOERR, 0
        self.memory.write_segment(status_byte, bytes([status]))
        # The number counts from the first writable byte on, without a gap.
        return written + 1 if written == _length(incoming) else written

    def _perform(
        self, kind: int, sector: int, outgoing: list[Segment], incoming: list[Segment]
    ) -> tuple[RequestStatus, int]:
        if kind == RequestType.IN:
            length = _length(incoming)
            if not self._is_on_disk(sector, length):
                return RequestStatus.IOERR, 0
            self._read(incoming, sector * SECTOR_BYTES)
            return RequestStatus.OK, length
        if kind == RequestType.OUT:
            if self._disk.read_only or not self._is_on_disk(sector, _length(outgoing)):
                return RequestStatus.IOERR, 0
            self._write(outgoing, sector * SECTOR_BYTES)
            if not self.common.driver_features & _F_FLUSH:
                # A driver that cannot flush counts on every write being safe.
                self._disk.flush()
            return RequestStatus.OK, 0
        if kind == RequestType.FLUSH:
            self._disk.flush()
            return RequestStatus.OK, 0
        if kind == RequestType.GET_ID:
            return RequestStatus.OK, self._fill(incoming, self._serial)
        return RequestStatus.UNSUPP, 0

    def _is_on_disk(self, sector: int, length: int) -> bool:
        if length % SECTOR_BYTES or length > REQUEST_MAX_BYTES:
            return False
        return sector + length // SECTOR_BYTES <= self._disk.capacity_sectors

    def _read(self, segments: list[Segment], offset: int) -> None:
        for batch in _batches(segments):
            self.memory.require_client()
            first = batch[0]
            if first.view is None:
                data = memoryview(bytearray(first.length))
                self._disk.read([data], offset)
                self.memory.write_segment(first, data)
            else:
                try:
                    self._disk.read([s.view for s in batch if s.view is not None], offset)
                finally:
                    # A read that failed may have written, too.
                    for segment in batch:
                        self.memory.mark(segment.address, segment.length)
            offset += _length(batch)

    def _write(self, segments: list[Segment], offset: int) -> None:
        for batch in _batches(segments):
            self.memory.require_client()
            first = batch[0]
            if first.view is None:
                self._disk.write([memoryview(self.memory.read_segment(first))], offset)
            else:
                self._disk.write([s.view for s in batch if s.view is not None], offset)
            offset += _length(batch)

    def _fill(self, segments: list[Segment], data: bytes) -> int:
        written = 0
        for segment in segments:
            piece, _ = _split_at(segment, min(segment.length, len(data) - written))
            if piece.length:
                self.memory.write_segment(piece, data[written : written + piece.length])
                written += piece.length
        return written


def _length(segments: list[Segment]) -> int:
    return sum(segment.length for segment in segments)


def _split_at(segment: Segment, at: int) -> tuple[Segment, Segment]:
    address, length, view = segment
    return (
        Segment(address, at, None if view is None else view[:at]),
        Segment(address + at, length - at, None if view is None else view[at:]),
    )


def _split_front(segments: list[Segment], count: int) -> tuple[list[Segment], list[Segment]]:
    """The first `count` bytes and the rest. Raises `RingError` if there are fewer."""
    front: list[Segment] = []
    for number, segment in enumerate(segments):
        if segment.length > count:
            head, tail = _split_at(segment, count)
            return [*front, head], [tail, *segments[number + 1 :]]
        front.append(segment)
        count -= segment.length
        if not count:
            return front, segments[number + 1 :]
    raise RingError("a request without a complete header")


def _split_last_byte(segments: list[Segment]) -> tuple[list[Segment], Segment]:
    """Everything but the last byte, and that. Raises `RingError` if there is none."""
    if not segments:
        raise RingError("a request without room for its status")
    head, tail = _split_at(segments[-1], segments[-1].length - 1)
    return [*segments[:-1], *([head] if head.length else [])], tail


def _batches(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Runs of segments in our mapping; those without one alone and in pieces."""
    batch: list[Segment] = []
    for segment in segments:
        if segment.view is not None:
            batch.append(segment)
            continue
        if batch:
            yield batch
            batch = []
        while segment.length > _PIECE_BYTES:
            piece, segment = _split_at(segment, _PIECE_BYTES)
            yield [piece]
        yield [segment]
    if batch:
        yield batch
