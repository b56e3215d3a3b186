"""DEVICE_FEATURE with its payloads, and migration data.

Source: vfio-user specification, sections VFIO_USER_DEVICE_FEATURE, _MIG_DATA_READ and
_MIG_DATA_WRITE. Which migration state may follow which is the business of whoever sets them.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Self

from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.wire import require_argsz, unpack_exactly, unpack_start

_FEATURE: Final = struct.Struct("<II")
_MIGRATION: Final = struct.Struct("<Q")
_STATE: Final = struct.Struct("<Ii")
_DATA_SIZE: Final = struct.Struct("<Q")
_CONTROL: Final = struct.Struct("<QII")
_RANGE: Final = struct.Struct("<QQ")
_REPORT: Final = struct.Struct("<QQQ")
_MIG_DATA: Final = struct.Struct("<II")

_INDEX_MASK: Final = 0xFFFF
_ADDRESS_LIMIT: Final = 1 << 64
_BITMAP_WORD_BITS: Final = 64


class FeatureIndex(IntEnum):
    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9
    """Numbered as the kernel does (linux/vfio.h); devices may offer it."""


class FeatureFlags(IntFlag):
    """What to do with a feature. GET and SET go together only with PROBE."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


# A plain number: inverting an IntFlag loses the bits that have no name.
_OPERATIONS: Final = int(FeatureFlags.GET | FeatureFlags.SET | FeatureFlags.PROBE)


class MigrationSupport(IntFlag):
    """Flags of feature MIGRATION: states that exist beside RUNNING, STOP and ERROR."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


class MigrationState(IntEnum):
    """States of a device (v2 migration); the P2P states (5 and 7) are not used in vfio-user."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    PRE_COPY = 6


@dataclass(frozen=True, slots=True)
class Feature:
    """DEVICE_FEATURE, request and reply.

    `flags`: feature index in the low 16 bits, `FeatureFlags` above.
    `argsz`: in a request the largest reply body that its sender can take, in a reply the length of
    the whole body; 0 stands for the length of this message's own body. A reply whose `argsz` is
    greater than its body was cut to the 8 bytes before `data`.
    """

    flags: int
    data: bytes = b""
    argsz: int = 0

    def __post_init__(self) -> None:
        if not self.argsz:
            object.__setattr__(self, "argsz", _FEATURE.size + len(self.data))

    @property
    def index(self) -> int:
        return self.flags & _INDEX_MASK

    @property
    def is_get(self) -> bool:
        """Whether data is asked for (and not only probed)."""
        return bool(self.flags & FeatureFlags.GET) and not self.is_probe

    @property
    def is_set(self) -> bool:
        """Whether data is to be set (and not only probed)."""
        return bool(self.flags & FeatureFlags.SET) and not self.is_probe

    @property
    def is_probe(self) -> bool:
        return bool(self.flags & FeatureFlags.PROBE)

    @classmethod
    def get(cls, index: int, reply_data_bytes: int, data: bytes = b"") -> Self:
        """Return a request for a feature's data, of which there are up to `reply_data_bytes`."""
        argsz = _FEATURE.size + max(reply_data_bytes, len(data))
        return cls(index | FeatureFlags.GET, data, argsz)

    @classmethod
    def set(cls, index: int, data: bytes = b"") -> Self:
        """Return a request to set a feature's data."""
        return cls(index | FeatureFlags.SET, data)

    @classmethod
    def probe(cls, index: int, methods: int = 0) -> Self:
        """Return a request that asks whether a feature has these methods (GET, SET)."""
        return cls(index | FeatureFlags.PROBE | methods)

    def pack(self) -> bytes:
        return _FEATURE.pack(self.argsz, self.flags) + self.data

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, flags = unpack_start(_FEATURE, body, "DEVICE_FEATURE")
        require_argsz(argsz, len(body), "DEVICE_FEATURE")
        operation = flags & ~_INDEX_MASK
        if operation & ~_OPERATIONS or not operation:
            raise ProtocolError(f"DEVICE_FEATURE with flags {flags:#x}")
        if operation == FeatureFlags.GET | FeatureFlags.SET:
            raise ProtocolError("DEVICE_FEATURE with both GET and SET")
        return cls(flags, bytes(body[_FEATURE.size :]), argsz)


@dataclass(frozen=True, slots=True)
class MigrationFlags:
    """Data of feature MIGRATION: `MigrationSupport` flags."""

    flags: int

    def pack(self) -> bytes:
        return _MIGRATION.pack(self.flags)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        (flags,) = unpack_exactly(_MIGRATION, body, "feature MIGRATION")
        if not flags & MigrationSupport.STOP_COPY:
            raise ProtocolError("feature MIGRATION without STOP_COPY")
        return cls(flags)


@dataclass(frozen=True, slots=True)
class MigState:
    """Data of feature MIG_DEVICE_STATE. vfio-user makes no use of `data_fd`."""

    device_state: MigrationState
    data_fd: int = -1

    def pack(self) -> bytes:
        return _STATE.pack(self.device_state, self.data_fd)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        state, data_fd = unpack_exactly(_STATE, body, "feature MIG_DEVICE_STATE")
        try:
            return cls(MigrationState(state), data_fd)
        except ValueError:
            raise ProtocolError(f"device state {state} is unknown") from None


@dataclass(frozen=True, slots=True)
class DataSize:
    """Data of feature MIG_DATA_SIZE: how many bytes of state are left to read once the device is
    at rest, as it estimates it."""

    length: int

    def pack(self) -> bytes:
        return _DATA_SIZE.pack(self.length)

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        return cls(*unpack_exactly(_DATA_SIZE, body, "feature MIG_DATA_SIZE"))


@dataclass(frozen=True, slots=True)
class LoggingControl:
    """Data of features DMA_LOGGING_START and DMA_LOGGING_STOP.

    `page_size`: granularity wished for (request) or chosen (reply), in bytes.
    `ranges`: (iova, length) in bytes; none means that every write is logged.
    """

    page_size: int
    ranges: tuple[tuple[int, int], ...] = ()

    def pack(self) -> bytes:
        return _CONTROL.pack(self.page_size, len(self.ranges), 0) + b"".join(
            _RANGE.pack(*logged) for logged in self.ranges
        )

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        page_size, count, _ = unpack_start(_CONTROL, body, "DMA logging control")
        if len(body) != _CONTROL.size + count * _RANGE.size:
            raise ProtocolError(f"{count} logging ranges in {len(body)} bytes")
        _require_page_size(page_size)
        ranges = tuple(_RANGE.iter_unpack(body[_CONTROL.size :]))
        if any(not length or iova + length > _ADDRESS_LIMIT for iova, length in ranges):
            raise ProtocolError("logging range is empty or exceeds the address space")
        return cls(page_size, ranges)


@dataclass(frozen=True, slots=True)
class LoggingReport:
    """Data of feature DMA_LOGGING_REPORT: which pages of [iova, iova + length) were written.

    `page_size`: bytes for each bit. `bitmap`: empty in a request; in a reply little-endian uint64
    words, bit i of word w is page 64 * w + i of the range, bits behind the range are 0.
    """

    iova: int
    length: int
    page_size: int
    bitmap: bytes = b""

    @property
    def bitmap_bytes(self) -> int:
        """Length of the bitmap in a reply to this."""
        pages = -(-self.length // self.page_size)
        return -(-pages // _BITMAP_WORD_BITS) * 8

    def pack(self) -> bytes:
        return _REPORT.pack(self.iova, self.length, self.page_size) + self.bitmap

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        iova, length, page_size = unpack_start(_REPORT, body, "DMA logging report")
        _require_page_size(page_size)
        if not length or iova + length > _ADDRESS_LIMIT:
            raise ProtocolError(f"DMA logging report of {length:#x} bytes at {iova:#x}")
        report = cls(iova, length, page_size, bytes(body[_REPORT.size :]))
        if report.bitmap:
            report._check_bitmap()
        return report

    def _check_bitmap(self) -> None:
        if len(self.bitmap) != self.bitmap_bytes:
            raise ProtocolError(f"dirty bitmap of {len(self.bitmap)} bytes for {self.bitmap_bytes}")
        used = -(-self.length // self.page_size) % _BITMAP_WORD_BITS
        if used and int.from_bytes(self.bitmap[-8:], "little") >> used:
            raise ProtocolError("dirty bitmap with bits behind its range")


@dataclass(frozen=True, slots=True)
class MigData:
    """MIG_DATA_READ request (`data` empty) and reply, MIG_DATA_WRITE request.

    `size`: bytes of migration data asked for or carried; a read reply with less than was asked for
    is the last one.
    """

    size: int
    data: bytes = b""

    def pack(self) -> bytes:
        # A read request announces room for its reply, which has this length too.
        return _MIG_DATA.pack(_MIG_DATA.size + self.size, self.size) + self.data

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        argsz, size = unpack_start(_MIG_DATA, body, "migration data")
        require_argsz(argsz, _MIG_DATA.size + size, "migration data")
        # libvfio-user pads a short read reply to the length asked for.
        data = bytes(body[_MIG_DATA.size : _MIG_DATA.size + size])
        if data and len(data) != size:
            raise ProtocolError(f"migration data of {size} bytes carries {len(data)}")
        return cls(size, data)


def _require_page_size(page_size: int) -> None:
    if page_size.bit_count() != 1:
        raise ProtocolError(f"page size {page_size} is not a power of two")
