"""What the virtio specification numbers, as far as it is used, and the kinds of devices known.

Owns no behaviour. Source: virtio 1.2, sections 2.1 (status), 2.7 (split virtqueues), 4.1 (PCI), 5
(device types), 6 (reserved feature bits).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag

VENDOR = 0x1AF4
_MODERN = 0x1040
_TRANSITIONAL = {0x1001: 2, 0x1005: 4}
"""Section 4.1.2.1; other types have ids of their own, and are not known here."""
TRANSITIONAL_BELOW = _MODERN


class Common(IntEnum):
    """Offsets in the common configuration structure (section 4.1.4.3)."""

    DEVICE_FEATURE_SELECT = 0x00
    DEVICE_FEATURE = 0x04
    DRIVER_FEATURE_SELECT = 0x08
    DRIVER_FEATURE = 0x0C
    CONFIG_VECTOR = 0x10
    NUM_QUEUES = 0x12
    STATUS = 0x14
    QUEUE_SELECT = 0x16
    QUEUE_SIZE = 0x18
    QUEUE_VECTOR = 0x1A
    QUEUE_ENABLE = 0x1C
    QUEUE_NOTIFY_OFF = 0x1E
    QUEUE_DESC = 0x20
    QUEUE_DRIVER = 0x28
    QUEUE_DEVICE = 0x30


class Status(IntFlag):
    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


NO_VECTOR = 0xFFFF
NO_INTERRUPT = 1
"""In the flags of an available ring."""
INDEXES = 1 << 16
"""An index of a ring runs modulo this, whatever the ring's size."""
MAX_QUEUE_SIZE = 32768
DESCRIPTOR = 16
NEXT, WRITE = 1, 2
"""Flags of a descriptor."""
EVENT_IDX = 1 << 29
ACCESS_PLATFORM = 1 << 33

_RESERVED = {
    28: "indirect descriptors",
    29: "event index",
    32: "version 1",
    33: "access platform",
    36: "order platform",
}
"""What of the reserved feature bits leaves nothing in a device but rings and registers."""
_FEATURE_NAMES = {
    34: "packed rings",
    35: "in-order use",
    37: "SR-IOV",
    38: "notification data",
    39: "notification configuration data",
    40: "ring reset",
    41: "admin queue",
}


def desc_bytes(size: int) -> int:
    return DESCRIPTOR * size


def driver_bytes(size: int) -> int:
    """Of an available ring: flags, idx, entries, used_event."""
    return 6 + 2 * size


def device_bytes(size: int) -> int:
    """Of a used ring: flags, idx, entries, avail_event."""
    return 6 + 8 * size


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of device of which all queues take requests, in any order and from any driver.

    A request that changes nothing is `readable`, and `writable` bytes for the device.
    """

    type_id: int
    name: str
    features: frozenset[int]
    """Bits of its own that leave nothing in the device but rings and registers."""
    refused: Mapping[int, str]
    """Names of other bits of its own."""
    config: Mapping[str, tuple[int, int]]
    """What of its configuration has to be the same on both sides: offset and length."""
    readable: bytes
    writable: int

    def strange(self, features: int) -> list[str]:
        """Names of the bits in `features` that are not known to be carried."""
        bits = [bit for bit in range(features.bit_length()) if features >> bit & 1]
        names = {**_FEATURE_NAMES, **self.refused}
        return [
            names.get(bit, f"bit {bit}")
            for bit in bits
            if bit not in self.features and bit not in _RESERVED
        ]


_BLOCK = Kind(
    type_id=2,
    name="virtio-blk",
    # size_max, seg_max, geometry, ro, blk_size, flush, topology, config_wce, mq, discard,
    # write_zeroes, lifetime, secure_erase (section 5.2.3)
    features=frozenset({1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16}),
    refused={0: "barrier", 7: "SCSI commands", 17: "zoned"},
    config={
        "capacity": (0, 8),
        "largest segment": (8, 4),
        "segments": (12, 4),
        "geometry": (16, 4),
        "block size": (20, 4),
        "topology": (24, 8),
        "number of queues": (34, 2),
        "discard and write zeroes": (36, 24),
    },
    # VIRTIO_BLK_T_GET_ID: 20 bytes and a status.
    readable=(8).to_bytes(16, "little"),
    writable=21,
)
_ENTROPY = Kind(4, "virtio-rng", frozenset(), {}, {}, b"", 1)
KINDS = {kind.type_id: kind for kind in (_BLOCK, _ENTROPY)}


def kind_of(device_id: int) -> Kind | None:
    """By the PCI device id."""
    return KINDS.get(_TRANSITIONAL.get(device_id, device_id - _MODERN))
