"""The common configuration structure of a virtio PCI device: features, status, queue registers.

Owns what these registers read as, which writes they take, and the order in which a driver may
initialise a device. Does not own what follows from it: the device is told by `on_reset` and
`on_driver_ok`.

Source: virtio 1.2, sections 2.1 (device status), 2.2 (features), 3.1 (initialisation), 4.1.4.3
(the structure).
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag

from lab.devices.errors import StateStreamError
from lab.devices.virtio.virtqueue import Virtqueue

COMMON_BYTES = 0x38
NO_VECTOR = 0xFFFF

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32

_STATE = struct.Struct("<IIQHBH")


class Status(IntFlag):
    """Bits of device_status."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


_SET_BY_DRIVER = Status.ACKNOWLEDGE | Status.DRIVER | Status.FAILED


@dataclass(frozen=True, slots=True)
class _Register:
    """`size` bytes at `offset`. Without `write` it is read-only."""

    offset: int
    size: int
    read: Callable[["CommonConfiguration"], int]
    write: Callable[["CommonConfiguration", int], None] | None = None


class CommonConfiguration:
    """The registers of a device that offers `features` and has `queues`.

    For one thread, but for `needs_reset`, which any thread may set.
    """

    def __init__(
        self,
        features: int,
        queues: list[Virtqueue],
        n_vectors: int,
        *,
        on_reset: Callable[[], None],
        on_driver_ok: Callable[[], None],
    ) -> None:
        self.offered = features
        self.queues = queues
        self._n_vectors = n_vectors
        self._on_reset = on_reset
        self._on_driver_ok = on_driver_ok
        self.reset()

    def reset(self) -> None:
        """What a driver finds after it wrote 0 to the status. Queues included."""
        self.needs_reset = False
        self.driver_features = 0
        self.config_vector = NO_VECTOR
        self._status = Status(0)
        self._device_select = 0
        self._driver_select = 0
        self._queue_select = 0
        for queue in self.queues:
            queue.reset()

    @property
    def status(self) -> Status:
        return self._status | Status.NEEDS_RESET if self.needs_reset else self._status

    @property
    def is_live(self) -> bool:
        """Whether the driver has finished its initialisation and nothing is broken."""
        return bool(self._status & Status.DRIVER_OK) and not self.needs_reset

    def read(self, offset: int, count: int) -> bytes:
        """Any bytes of the structure; what is behind it reads as 0."""
        data = bytearray(count)
        for register in _REGISTERS:
            low = max(offset, register.offset)
            high = min(offset + count, register.offset + register.size)
            if low < high:
                value = register.read(self).to_bytes(register.size, "little")
                data[low - offset : high - offset] = value[
                    low - register.offset : high - register.offset
                ]
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Any bytes of the structure; a part of a register leaves its other bytes as they are."""
        for register in _REGISTERS:
            low = max(offset, register.offset)
            high = min(offset + len(data), register.offset + register.size)
            if low >= high or register.write is None:
                continue
            value = bytearray(register.read(self).to_bytes(register.size, "little"))
            value[low - register.offset : high - register.offset] = data[
                low - offset : high - offset
            ]
            register.write(self, int.from_bytes(value, "little"))

    def save(self) -> bytes:
        """Everything but the queues."""
        return _STATE.pack(
            self._device_select,
            self._driver_select,
            self.driver_features,
            self.config_vector,
            self.status,
            self._queue_select,
        )

    def load(self, state: bytes, queues: list[Virtqueue]) -> Callable[[], None]:
        """Check what `save` returned; the result takes it over, and `queues`.

        Raises `StateStreamError`.
        """
        if len(state) != _STATE.size:
            raise StateStreamError("the common configuration has another length")
        device_select, driver_select, features, vector, bits, queue_select = _STATE.unpack(state)
        status = Status(bits & ~int(Status.NEEDS_RESET))
        if features & ~self.offered and status & Status.FEATURES_OK:
            raise StateStreamError("the driver uses features that are not offered here")
        if not self._is_vector(vector):
            raise StateStreamError(f"there is no vector {vector}")

        def take_over() -> None:
            self._device_select, self._driver_select = device_select, driver_select
            self.driver_features, self.config_vector = features, vector
            self._status, self._queue_select = status, queue_select
            self.needs_reset = bool(bits & Status.NEEDS_RESET)
            self.queues[:] = queues
            self._apply_features()

        return take_over

    def _apply_features(self) -> None:
        for queue in self.queues:
            queue.indirect = bool(self.driver_features & F_INDIRECT_DESC)
            queue.event_index = bool(self.driver_features & F_EVENT_IDX)

    def _is_vector(self, vector: int) -> bool:
        return vector < self._n_vectors or vector == NO_VECTOR

    def _selected(self) -> Virtqueue | None:
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def _idle_queue(self) -> Virtqueue | None:
        """The queue selected, if its registers may still be changed."""
        queue = self._selected()
        return None if queue is None or queue.enabled else queue

    def _set_device_select(self, value: int) -> None:
        self._device_select = value

    def _device_feature(self) -> int:
        return self._feature_word(self.offered, self._device_select)

    def _set_driver_select(self, value: int) -> None:
        self._driver_select = value

    def _driver_feature(self) -> int:
        return self._feature_word(self.driver_features, self._driver_select)

    def _set_driver_feature(self, value: int) -> None:
        if self._driver_select > 1 or self._status & Status.FEATURES_OK:
            return
        shift = 32 * self._driver_select
        self.driver_features &= ~(0xFFFF_FFFF << shift)
        self.driver_features |= value << shift

    @staticmethod
    def _feature_word(features: int, select: int) -> int:
        return features >> 32 * select & 0xFFFF_FFFF if select <= 1 else 0

    def _set_config_vector(self, value: int) -> None:
        self.config_vector = value if self._is_vector(value) else NO_VECTOR

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._on_reset()
            return
        # A driver only ever adds bits; to take one away it has to reset.
        self._status |= value & _SET_BY_DRIVER
        acceptable = not self.driver_features & ~self.offered
        if value & Status.FEATURES_OK and acceptable and self.driver_features & F_VERSION_1:
            self._status |= Status.FEATURES_OK
            self._apply_features()
        if (
            value & Status.DRIVER_OK
            and self._status & Status.FEATURES_OK
            and not self._status & Status.DRIVER_OK
        ):
            self._status |= Status.DRIVER_OK
            self._on_driver_ok()

    def _set_queue_select(self, value: int) -> None:
        self._queue_select = value

    def _queue_size(self) -> int:
        queue = self._selected()
        return 0 if queue is None else queue.size

    def _set_queue_size(self, value: int) -> None:
        queue = self._idle_queue()
        if queue is not None and queue.is_valid_size(value):
            queue.size = value

    def _queue_vector(self) -> int:
        queue = self._selected()
        return NO_VECTOR if queue is None else queue.vector

    def _set_queue_vector(self, value: int) -> None:
        # Unlike the other registers of a queue this one may change while the queue is in use.
        queue = self._selected()
        if queue is not None:
            queue.vector = value if self._is_vector(value) else NO_VECTOR

    def _queue_enable(self) -> int:
        queue = self._selected()
        return 0 if queue is None else int(queue.enabled)

    def _set_queue_enable(self, value: int) -> None:
        queue = self._idle_queue()
        if queue is not None and value == 1:
            queue.enabled = True

    def _notify_off(self) -> int:
        queue = self._selected()
        return 0 if queue is None else queue.index


def _area(offset: int, name: str) -> _Register:
    def read(common: CommonConfiguration) -> int:
        queue = common._selected()
        return 0 if queue is None else int(getattr(queue, name))

    def write(common: CommonConfiguration, value: int) -> None:
        queue = common._idle_queue()
        if queue is not None:
            setattr(queue, name, value)

    return _Register(offset, 8, read, write)


_C = CommonConfiguration
_REGISTERS = (
    _Register(0x00, 4, lambda common: common._device_select, _C._set_device_select),
    _Register(0x04, 4, _C._device_feature),
    _Register(0x08, 4, lambda common: common._driver_select, _C._set_driver_select),
    _Register(0x0C, 4, _C._driver_feature, _C._set_driver_feature),
    _Register(0x10, 2, lambda common: common.config_vector, _C._set_config_vector),
    _Register(0x12, 2, lambda common: len(common.queues)),
    _Register(0x14, 1, lambda common: int(common.status), _C._set_status),
    # config_generation: no device here changes its configuration while it is served.
    _Register(0x15, 1, lambda common: 0),
    _Register(0x16, 2, lambda common: common._queue_select, _C._set_queue_select),
    _Register(0x18, 2, _C._queue_size, _C._set_queue_size),
    _Register(0x1A, 2, _C._queue_vector, _C._set_queue_vector),
    _Register(0x1C, 2, _C._queue_enable, _C._set_queue_enable),
    _Register(0x1E, 2, _C._notify_off),
    _area(0x20, "descriptors"),
    _area(0x28, "driver_area"),
    _area(0x30, "device_area"),
)
