"""What a virtio device is made of besides guest memory: what its driver wrote, and ring positions.

Owns the form in which it goes to the target, and the check of one that came from a peer (I9).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from sync.queues.errors import StateError
from sync.queues.interface import MAX_STATE_BYTES
from sync.queues.virtio.inventory import MAX_QUEUES
from sync.queues.virtio.specification import (
    INDEXES,
    MAX_QUEUE_SIZE,
    NO_VECTOR,
    Status,
    desc_bytes,
    device_bytes,
    driver_bytes,
)

MAX_RING_BYTES = 64 << 20
"""All rings of a device."""
MAX_CONFIG_BYTES = 4096


@dataclass(slots=True)
class Ring:
    """A queue as its driver has set it up. `position`: as many buffers it has used, modulo 65536;
    a device at rest has taken as many."""

    index: int
    size: int
    vector: int = NO_VECTOR
    enabled: bool = False
    desc: int = 0
    driver: int = 0
    device: int = 0
    position: int = 0

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """IOVA and length in bytes."""
        return (
            (self.desc, desc_bytes(self.size)),
            (self.driver, driver_bytes(self.size)),
            (self.device, device_bytes(self.size)),
        )

    @property
    def is_sound(self) -> bool:
        return (
            0 < self.size <= MAX_QUEUE_SIZE
            and self.size.bit_count() == 1
            and not (self.desc % 16 or self.driver % 2 or self.device % 4)
        )


@dataclass(slots=True)
class DeviceState:
    """What the driver wrote, and where the rings stand."""

    status: int = 0
    features: int = 0
    config_vector: int = NO_VECTOR
    device_feature_select: int = 0
    driver_feature_select: int = 0
    queue_select: int = 0
    rings: dict[int, Ring] = field(default_factory=dict)
    """Those of which the driver wrote a register."""
    config: dict[int, bytes] = field(default_factory=dict)
    """What it wrote to the configuration of the device itself, by offset."""

    @property
    def is_live(self) -> bool:
        return bool(self.status & Status.DRIVER_OK)

    def live_rings(self) -> list[Ring]:
        """Those that the device uses."""
        return [ring for ring in self.rings.values() if ring.enabled] if self.is_live else []

    def parts(self) -> Iterator[tuple[int, int]]:
        """IOVA and length of every part of a ring that the device uses."""
        for ring in self.live_rings():
            yield from ring.parts

    def configuration(self) -> object:
        """What does not change while buffers just come and go."""
        rings = [replace(ring, position=0) for ring in self.rings.values()]
        return self.status, self.features, self.config_vector, rings, list(self.config.items())

    def pack(self) -> bytes:
        document = {
            "status": self.status,
            "features": self.features,
            "config_vector": self.config_vector,
            "selects": [
                self.device_feature_select,
                self.driver_feature_select,
                self.queue_select,
            ],
            "rings": [asdict(ring) for ring in self.rings.values()],
            "config": [[offset, data.hex()] for offset, data in self.config.items()],
        }
        return json.dumps(document).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "DeviceState":
        """Raises `StateError` unless everything in it makes sense."""
        try:
            if len(data) > MAX_STATE_BYTES:
                raise ValueError(f"{len(data)} bytes")
            document = json.loads(data)
            rings = [_ring(each) for each in document["rings"]]
            config = {
                _number(offset, MAX_CONFIG_BYTES): bytes.fromhex(text)
                for offset, text in document["config"]
            }
            device_select, driver_select, queue_select = document["selects"]
            state = cls(
                _number(document["status"], 256),
                _number(document["features"], 1 << 64),
                _number(document["config_vector"], 1 << 16),
                _number(device_select, 1 << 32),
                _number(driver_select, 1 << 32),
                _number(queue_select, 1 << 16),
                {ring.index: ring for ring in rings},
                config,
            )
            if len(state.rings) < len(rings) or len(rings) > MAX_QUEUES:
                raise ValueError("its queues make no sense")
            if any(not ring.is_sound for ring in state.live_rings()):
                raise ValueError("a ring has no sound size or address")
            if sum(length for _, length in state.parts()) > MAX_RING_BYTES:
                raise ValueError("its rings are too large")
            if any(len(each) not in (1, 2, 4, 8) for each in config.values()):
                raise ValueError("it writes what no driver writes")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StateError(f"the state of a device is malformed: {error!r}") from error
        return state


def _ring(document: dict[str, object]) -> Ring:
    return Ring(
        _number(document["index"], MAX_QUEUES),
        _number(document["size"], 1 << 16),
        _number(document["vector"], 1 << 16),
        document["enabled"] is True,
        _number(document["desc"], 1 << 63),
        _number(document["driver"], 1 << 63),
        _number(document["device"], 1 << 63),
        _number(document["position"], INDEXES),
    )


def _number(value: object, below: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise ValueError(f"{value!r} is no number below {below}")
    return value
