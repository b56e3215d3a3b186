"""What a virtio device is and where its structures lie, asked of the device itself.

Owns the plan that asks, its result, and the comparison of two of them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from sync.pci import CONFIG_BYTES, word
from sync.queues.errors import CannotMove, StateError
from sync.queues.interface import (
    MAX_STATE_BYTES,
    AwaitRegister,
    Plan,
    ReadRegister,
    ResetFunction,
    WriteRegister,
    le,
    number,
)
from sync.queues.virtio.specification import TRANSITIONAL_BELOW, Common, Kind, kind_of
from sync.registers.profile.locate import DeviceView, Window
from sync.vfio_user.protocol import PciRegion

MAX_QUEUES = 1024
_ANY_SIZE = 1 << 62
_CONFIG = PciRegion.CONFIG


@dataclass(frozen=True, slots=True)
class Queue:
    """As the device offers it."""

    max_size: int
    notify_offset: int
    """In the region of the doorbells."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """A device as it is after a reset. `device_id` is that of PCI."""

    device_id: int
    features: int
    config: Mapping[str, str]
    queues: tuple[Queue, ...]
    common: Window
    notify: Window
    device: Window | None
    window: Window | None
    """The data of the window that configuration space has into the BARs."""

    @property
    def kind(self) -> Kind:
        """Raises `StateError` if there is none."""
        kind = kind_of(self.device_id)
        if kind is None:
            raise StateError(f"no virtio device that is known has the id {self.device_id:#x}")
        return kind

    @property
    def has_legacy_registers(self) -> bool:
        """In BAR 0, by which drivers of old reach the same queues."""
        return self.device_id < TRANSITIONAL_BELOW

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Inventory":
        """Raises `StateError`."""
        try:
            if len(data) > MAX_STATE_BYTES:
                raise ValueError(f"{len(data)} bytes")
            document = json.loads(data)
            windows = {
                name: None if document[name] is None else Window(*map(int, document[name]))
                for name in ("common", "notify", "device", "window")
            }
            if windows["common"] is None or windows["notify"] is None:
                raise ValueError("no registers")
            inventory = cls(
                int(document["device_id"]),
                int(document["features"]),
                {str(name): str(text) for name, text in document["config"].items()},
                tuple(
                    Queue(int(at["max_size"]), int(at["notify_offset"]))
                    for at in document["queues"]
                ),
                windows["common"],
                windows["notify"],
                windows["device"],
                windows["window"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StateError(f"the inventory of a device is malformed: {error!r}") from error
        _ = inventory.kind
        return inventory

    def properties(self) -> Iterator[tuple[str, str]]:
        """What has to be the same on both sides, by name."""
        yield "device", f"{self.device_id:#06x}"
        yield "features", f"{self.features:#x}"
        yield from self.config.items()
        yield "number of queues", str(len(self.queues))
        for index, queue in enumerate(self.queues):
            yield f"queue {index}", f"{queue.max_size} entries, doorbell {queue.notify_offset:#x}"
        for name in ("common", "notify", "device"):
            window: Window | None = getattr(self, name)
            yield f"structure {name}", "none" if window is None else window.describe()


def take_inventory() -> Plan[Inventory]:
    """Reset the device, ask it, and reset it again. Raises `CannotMove`."""
    yield ResetFunction()
    config = b""
    for at in range(0, CONFIG_BYTES, 4):
        config += yield ReadRegister(at, 4, _CONFIG)
    view = DeviceView(0, 0, 0, 0, 0, config, dict.fromkeys(range(6), _ANY_SIZE))
    kind = kind_of(word(config, 2))
    common, notify = view.locate("virtio:common"), view.locate("virtio:notify")
    if kind is None or common is None or notify is None:
        raise CannotMove(["it has no registers of virtio 1.x (legacy only?)"])
    window, device = view.locate("virtio:window"), view.locate("virtio:device")
    common_at = Registers(common)
    yield common_at.write(Common.STATUS, 0, 1)
    yield common_at.until(Common.STATUS, 1, 0)
    features = 0
    for part in range(2):
        yield common_at.write(Common.DEVICE_FEATURE_SELECT, part, 4)
        features |= number((yield common_at.read(Common.DEVICE_FEATURE, 4))) << 32 * part
    count = number((yield common_at.read(Common.NUM_QUEUES, 2)))
    if count > MAX_QUEUES:
        raise CannotMove([f"it has {count} queues"])
    queues = []
    for index in range(count):
        yield common_at.write(Common.QUEUE_SELECT, index, 2)
        size = number((yield common_at.read(Common.QUEUE_SIZE, 2)))
        step = number((yield common_at.read(Common.QUEUE_NOTIFY_OFF, 2)))
        queues.append(Queue(size, notify.offset + step * notify.multiplier))
    fields = {}
    for name, (offset, length) in kind.config.items():
        raw = b""
        for at in range(offset, offset + length, 2):
            if device is not None and at + 2 <= device.size:
                raw += yield ReadRegister(device.offset + at, 2, device.region)
        fields[name] = raw[::-1].hex()
    yield ResetFunction()
    return Inventory(
        word(config, 2), features, fields, tuple(queues), common, notify, device, window
    )


class Registers:
    """Accesses of the common configuration structure."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def read(self, register: Common, length: int) -> ReadRegister:
        return ReadRegister(self._window.offset + register, length, self._window.region)

    def write(self, register: Common, value: int, length: int) -> WriteRegister:
        return WriteRegister(self._window.offset + register, le(value, length), self._window.region)

    def until(self, register: Common, length: int, value: int) -> AwaitRegister:
        """Wait until it reads as `value`."""
        at = self._window.offset + register
        return AwaitRegister(at, length, (1 << 8 * length) - 1, value, self._window.region)
