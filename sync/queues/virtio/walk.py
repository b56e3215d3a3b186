"""Sets up another virtio device as a driver has, and walks its rings to where the guest's stand.

A device begins every ring at index 0 and has no register to say otherwise. So it is first shown
scratch memory at the IOVAs of the rings, and given requests that change nothing, until it has used
as many buffers as the source's device; then guest memory takes the place of the scratch memory. A
device that begins where the used ring stands finds 0 in scratch memory, and is walked like others.

    reset -> features -> configuration -> queues -> DRIVER_OK -> for each queue its requests

In `start` each queue is kicked once: the source's device may have been taken away after it had used
the last buffer and before it wanted to be kicked again. Each vector is fired once, for the source's
last interrupt may have come to nobody.
"""

from sync.queues.errors import CannotMove
from sync.queues.interface import (
    PAGE_BYTES,
    AwaitMemory,
    Plan,
    ResetFunction,
    Signal,
    Walk,
    WriteMemory,
    WriteRegister,
    le,
    number,
)
from sync.queues.scratch import Scratch
from sync.queues.virtio.inventory import Inventory, Registers
from sync.queues.virtio.specification import (
    EVENT_IDX,
    INDEXES,
    NEXT,
    NO_INTERRUPT,
    NO_VECTOR,
    WRITE,
    Common,
    Status,
)
from sync.queues.virtio.state import DeviceState, Ring

_SLOT_BYTES = 64
"""A request's buffers: what the device reads, and what it writes from the middle on."""
_SLOTS = PAGE_BYTES // _SLOT_BYTES


class VirtioWalk(Walk):
    """One device's walk; `inventory` is its own."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._common = Registers(inventory.common)
        self._scratch = Scratch()
        self._configuration: object = None
        self._positions: dict[int, int] = {}
        self._buffers = 0
        """IOVA of the page for them."""

    def ahead(self, state: bytes) -> Plan[None]:
        yield from self._to(DeviceState.unpack(state))

    def finish(self, state: bytes) -> Plan[None]:
        wanted = DeviceState.unpack(state)
        yield from self._to(wanted)
        yield from self._scratch.hide()
        self._configuration = None
        for register, value, length in (
            (Common.DEVICE_FEATURE_SELECT, wanted.device_feature_select, 4),
            (Common.DRIVER_FEATURE_SELECT, wanted.driver_feature_select, 4),
            (Common.QUEUE_SELECT, wanted.queue_select, 2),
        ):
            yield self._common.write(register, value, length)

    def start(self, state: bytes) -> Plan[None]:
        wanted = DeviceState.unpack(state)
        for ring in wanted.live_rings():
            yield self._kick(ring)
        vectors = {wanted.config_vector, *(ring.vector for ring in wanted.live_rings())}
        for vector in sorted(vectors - {NO_VECTOR}):
            yield Signal(vector)

    def _to(self, wanted: DeviceState) -> Plan[None]:
        if self._configuration is None or self._configuration != wanted.configuration():
            yield from self._build(wanted)
        for ring in wanted.live_rings():
            yield from self._walk(ring)

    # From a reset to rings that stand at 0.

    def _build(self, wanted: DeviceState) -> Plan[None]:
        yield from self._scratch.hide()
        self._configuration = None
        if any(index >= len(self._inventory.queues) for index in wanted.rings):
            raise CannotMove(["the guest uses a queue that the target's device does not have"])
        strange = self._inventory.kind.strange(wanted.features) if wanted.status else []
        if strange:
            raise CannotMove([f"features that are not carried: {', '.join(strange)}"])
        yield ResetFunction()
        yield self._set_status(0)
        yield self._common.until(Common.STATUS, 1, 0)
        if wanted.is_live:
            self._buffers = yield from self._scratch.show(wanted.parts(), PAGE_BYTES)
            for slot in range(0, PAGE_BYTES, _SLOT_BYTES):
                yield WriteMemory(self._buffers + slot, self._inventory.kind.readable)
        if wanted.status:
            yield from self._negotiate(wanted)
            for offset, data in wanted.config.items():
                yield from self._configure(offset, data)
            yield self._common.write(Common.CONFIG_VECTOR, wanted.config_vector, 2)
            for ring in wanted.rings.values():
                yield from self._set_up(ring, wanted)
            yield self._set_status(wanted.status)
        self._positions = dict.fromkeys(wanted.rings, 0)
        self._configuration = wanted.configuration()

    def _negotiate(self, wanted: DeviceState) -> Plan[None]:
        yield self._set_status(Status.ACKNOWLEDGE)
        yield self._set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        for part in range(2):
            yield self._common.write(Common.DRIVER_FEATURE_SELECT, part, 4)
            word = wanted.features >> 32 * part & 0xFFFF_FFFF
            yield self._common.write(Common.DRIVER_FEATURE, word, 4)
        if wanted.status & Status.FEATURES_OK:
            yield self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
            status = number((yield self._common.read(Common.STATUS, 1)))
            if not status & Status.FEATURES_OK:
                raise CannotMove(["the target's device does not take the guest's features"])

    def _configure(self, offset: int, data: bytes) -> Plan[None]:
        device = self._inventory.device
        if device is None or offset + len(data) > device.size:
            raise CannotMove(["the target's device has no such configuration"])
        yield WriteRegister(device.offset + offset, data, device.region)

    def _set_up(self, ring: Ring, wanted: DeviceState) -> Plan[None]:
        write = self._common.write
        yield write(Common.QUEUE_SELECT, ring.index, 2)
        yield write(Common.QUEUE_SIZE, ring.size, 2)
        yield write(Common.QUEUE_VECTOR, ring.vector, 2)
        if ring.vector != NO_VECTOR:
            taken = number((yield self._common.read(Common.QUEUE_VECTOR, 2)))
            if taken != ring.vector:
                raise CannotMove([f"the target's device does not take vector {ring.vector}"])
        for register, address in (
            (Common.QUEUE_DESC, ring.desc),
            (Common.QUEUE_DRIVER, ring.driver),
            (Common.QUEUE_DEVICE, ring.device),
        ):
            yield self._address(register, address)
            yield self._address(register, address, 4)
        if not ring.enabled:
            return
        if wanted.is_live:
            yield from self._write_descriptors(ring, event_idx=bool(wanted.features & EVENT_IDX))
        yield write(Common.QUEUE_ENABLE, 1, 2)

    def _address(self, register: Common, address: int, at: int = 0) -> WriteRegister:
        common = self._inventory.common
        half = le(address >> 8 * at & 0xFFFF_FFFF, 4)
        return WriteRegister(common.offset + register + at, half, common.region)

    def _write_descriptors(self, ring: Ring, *, event_idx: bool) -> Plan[None]:
        """One chain for each request that can be under way, each with buffers of its own."""
        kind = self._inventory.kind
        content = b""
        for slot in range(self._batch(ring)):
            at = self._buffers + slot * _SLOT_BYTES
            if kind.readable:
                following = len(content) // 16 + 1
                content += le(at, 8) + le(len(kind.readable), 4) + le(NEXT, 2) + le(following, 2)
            content += le(at + _SLOT_BYTES // 2, 8) + le(kind.writable, 4) + le(WRITE, 2) + le(0, 2)
        yield WriteMemory(ring.desc, content)
        yield WriteMemory(ring.driver, le(0 if event_idx else NO_INTERRUPT, 2))

    # From there to where the guest's stand.

    def _walk(self, ring: Ring) -> Plan[None]:
        batch, at = self._batch(ring), self._positions[ring.index]
        each = self._descriptors_of_a_request
        while left := (ring.position - at) % INDEXES:
            count = min(left, batch)
            entries = b"".join(le(slot * each, 2) for slot in range(count))
            first = at % ring.size
            room = 2 * (ring.size - first)
            yield WriteMemory(ring.driver + 4 + 2 * first, entries[:room])
            if len(entries) > room:
                yield WriteMemory(ring.driver + 4, entries[room:])
            at = (at + count) % INDEXES
            yield WriteMemory(ring.driver + 2, le(at, 2))
            yield self._kick(ring)
            yield AwaitMemory(ring.device + 2, 2, INDEXES - 1, at)
            self._positions[ring.index] = at

    @property
    def _descriptors_of_a_request(self) -> int:
        return 2 if self._inventory.kind.readable else 1

    def _batch(self, ring: Ring) -> int:
        """Requests under way at a time."""
        count = min(ring.size // self._descriptors_of_a_request, _SLOTS)
        if not count:
            raise CannotMove([f"queue {ring.index} has too few entries for a request"])
        return count

    def _kick(self, ring: Ring) -> WriteRegister:
        at = self._inventory.queues[ring.index].notify_offset
        return WriteRegister(at, le(ring.index, 2), self._inventory.notify.region)

    def _set_status(self, status: int) -> WriteRegister:
        return self._common.write(Common.STATUS, status, 1)
