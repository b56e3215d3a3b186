"""Follows a virtio device from what its driver writes, and from its rings in guest memory.

Owns what is known of one device. Which pages it writes is not known: a device may tell its driver
not to kick, and then buffers come and go unseen.
"""

from collections.abc import Sequence
from enum import Enum

from sync.queues.errors import CannotMove, MemoryUnreadable
from sync.queues.interface import Memory, Rest, Watch, number
from sync.queues.virtio.inventory import Inventory
from sync.queues.virtio.specification import NO_VECTOR, Common, Status
from sync.queues.virtio.state import MAX_CONFIG_BYTES, DeviceState, Ring
from sync.vfio_user.protocol import PciRegion

_LENGTHS = {
    Common.DEVICE_FEATURE_SELECT: 4,
    Common.DRIVER_FEATURE_SELECT: 4,
    Common.DRIVER_FEATURE: 4,
    Common.CONFIG_VECTOR: 2,
    Common.STATUS: 1,
    Common.QUEUE_SELECT: 2,
    Common.QUEUE_SIZE: 2,
    Common.QUEUE_VECTOR: 2,
    Common.QUEUE_ENABLE: 2,
}
_ADDRESSES = {
    Common.QUEUE_DESC: "desc",
    Common.QUEUE_DRIVER: "driver",
    Common.QUEUE_DEVICE: "device",
}


class Refusal(Enum):
    """Why a device cannot be moved as it is now, in words for a user."""

    UNSEEN = "its driver was at work before the gateway saw it: let the guest load its driver anew"
    NEEDS_RESET = "it says that it needs a reset, or its driver that it has failed"
    LOST_TRACK = "its registers were written in a way that no driver writes them"
    LEGACY = "its guest uses the registers of before virtio 1.0"
    WINDOW = "its registers were written through configuration space"
    FOREIGN = "a ring does not lie in guest memory"
    RINGS = "a ring has no sound size or address"
    NO_MSIX = "it is used without MSI-X: whether an interrupt is pending cannot be carried"


class VirtioWatch(Watch):
    """`state`: what a device was walked to, which the watch goes on from."""

    def __init__(self, memory: Memory, inventory: Inventory, state: DeviceState | None) -> None:
        self._memory = memory
        self._inventory = inventory
        self._state = DeviceState() if state is None else state
        self._faults: set[Refusal] = {Refusal.UNSEEN} if state is None else set()
        self._busy: set[int] = set()

    def read(self, region: int, offset: int, data: bytes) -> None:
        common = self._inventory.common
        at = common.offset + Common.STATUS - offset
        if region != common.region or not 0 <= at < len(data) or not data[at]:
            return
        status = Status(data[at])
        if status & (Status.NEEDS_RESET | Status.FAILED):
            self._faults.add(Refusal.NEEDS_RESET)
        if not status & Status.FEATURES_OK:
            # The device does not take what the driver wants.
            self._state.status &= ~Status.FEATURES_OK

    def write(self, region: int, offset: int, data: bytes) -> None:
        inventory = self._inventory
        common, device, window = inventory.common, inventory.device, inventory.window
        if region == common.region and 0 <= offset - common.offset < common.size:
            self._write_common(offset - common.offset, data)
        elif device and region == device.region and 0 <= offset - device.offset < device.size:
            self._write_config(offset - device.offset, data)
        elif region == PciRegion.CONFIG:
            if window and window.offset < offset + len(data) and offset < window.offset + 4:
                self._faults.add(Refusal.WINDOW)
        elif region == 0 and inventory.has_legacy_registers:
            self._faults.add(Refusal.LEGACY)

    def reset(self) -> None:
        self._state = DeviceState()
        self._faults.clear()
        self._busy.clear()

    def look(self) -> None:
        self._busy.clear()
        self._faults.discard(Refusal.FOREIGN)
        for ring in self._state.live_rings():
            try:
                available = number(self._memory.read(ring.driver + 2, 2))
                ring.position = number(self._memory.read(ring.device + 2, 2))
            except MemoryUnreadable:
                self._faults.add(Refusal.FOREIGN)
                return
            if available != ring.position:
                self._busy.add(ring.index)

    def rest(self) -> Rest:
        return Rest.BUSY if self._busy else Rest.AT_REST

    def refusals(self) -> Sequence[str]:
        state = self._state
        faults = set(self._faults)
        vectors = {state.config_vector, *(ring.vector for ring in state.live_rings())}
        if state.is_live and vectors == {NO_VECTOR}:
            faults.add(Refusal.NO_MSIX)
        if any(not ring.is_sound for ring in state.live_rings()):
            faults.add(Refusal.RINGS)
        strange = self._inventory.kind.strange(state.features) if state.status else []
        return [
            *(each.value for each in Refusal if each in faults),
            *(f"its driver uses a feature that is not carried: {name}" for name in strange),
        ]

    def state(self) -> bytes:
        refusals = self.refusals()
        if refusals:
            raise CannotMove(refusals)
        return self._state.pack()

    def _write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > MAX_CONFIG_BYTES or len(data) not in (1, 2, 4, 8):
            self._faults.add(Refusal.LOST_TRACK)
            return
        # The order is that in which they came.
        self._state.config.pop(offset, None)
        self._state.config[offset] = data

    def _write_common(self, at: int, data: bytes) -> None:
        address = next((each for each in _ADDRESSES if 0 <= at - each < 8), None)
        if address is not None:
            self._write_address(address, at - address, data)
        elif at in set(_LENGTHS) and len(data) == _LENGTHS[Common(at)]:
            self._write_register(Common(at), number(data))
        else:
            self._faults.add(Refusal.LOST_TRACK)

    def _write_register(self, register: Common, value: int) -> None:
        state = self._state
        match register:
            case Common.DEVICE_FEATURE_SELECT:
                state.device_feature_select = value
            case Common.DRIVER_FEATURE_SELECT:
                state.driver_feature_select = value
            case Common.DRIVER_FEATURE if state.driver_feature_select < 2:
                shift = 32 * state.driver_feature_select
                state.features = state.features & ~(0xFFFF_FFFF << shift) | value << shift
            case Common.DRIVER_FEATURE if value:
                self._faults.add(Refusal.LOST_TRACK)
            case Common.CONFIG_VECTOR:
                state.config_vector = value
            case Common.STATUS if not value:
                self.reset()
            case Common.STATUS:
                state.status = value
                if value & Status.FAILED:
                    self._faults.add(Refusal.NEEDS_RESET)
            case Common.QUEUE_SELECT:
                state.queue_select = value
            case Common.QUEUE_SIZE | Common.QUEUE_VECTOR | Common.QUEUE_ENABLE:
                ring = self._selected()
                if ring is not None and register is Common.QUEUE_SIZE:
                    ring.size = value
                elif ring is not None and register is Common.QUEUE_VECTOR:
                    ring.vector = value
                elif ring is not None:
                    ring.enabled = value == 1

    def _write_address(self, register: Common, at: int, data: bytes) -> None:
        ring = self._selected()
        if ring is None:
            return
        if (at, len(data)) not in ((0, 4), (4, 4), (0, 8)):
            self._faults.add(Refusal.LOST_TRACK)
            return
        name = _ADDRESSES[register]
        value = bytearray(getattr(ring, name).to_bytes(8, "little"))
        value[at : at + len(data)] = data
        setattr(ring, name, number(value))

    def _selected(self) -> Ring | None:
        index, queues = self._state.queue_select, self._inventory.queues
        if index >= len(queues):
            return None
        return self._state.rings.setdefault(index, Ring(index, queues[index].max_size))
