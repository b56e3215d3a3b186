"""VFIO migration v2 and a log of writes for a function that offers neither, made of its queues.

Owns the migration state, the stream, and which pages were written but not told of yet. What the
queues are is the business of `sync.queues`. The stream is a series of states, each complete:

     0        4         6            8      9      10      12      16
    +--------+---------+------------+------+------+-------+-------+------- - -+------- - -
    | length | command | cache line | INTx | zero | MSI-X | bytes | inventory | state of the class
    +--------+---------+------------+------+------+-------+-------+------- - -+------- - -

Little-endian; `length` counts what is behind it, `bytes` the inventory. Of the configuration space
go the registers that a guest sets and the kernel does not keep for itself: command, cache line size
and latency, INTx line; the control word of MSI-X, if a write there switches it. A target whose
inventory differs refuses.

Each state that comes before the last is walked to ahead of time; the last one is taken with the
device at rest, and is walked to when the stream has ended.
"""

import errno
import struct
import time
from collections.abc import Callable

from sync.pci import CACHE_LINE, COMMAND, INTERRUPT_LINE
from sync.queues.errors import CannotMove, WalkTimeout
from sync.queues.interface import MAX_STATE_BYTES, DeviceClass, Rest, WriteWatch, number
from sync.registers.errors import IdentityMismatch
from sync.vfio.device import VfioDevice
from sync.vfio.executor import PAUSE_S, Executor, Work
from sync.vfio.guest_memory import PinnedMemory
from sync.vfio.user_device import UserDevice
from sync.vfio_user.protocol import MigrationState, MigrationSupport, PciRegion, VfioUserError

REST_DEADLINE_S = 2.0
"""With the guest paused: a storage device that takes longer for a command is in trouble."""
TYPICAL_STATE_BYTES = 64 << 10
_LENGTH = struct.Struct("<I")
_CONFIG = struct.Struct("<HHBxH")
_HEAD_BYTES = _CONFIG.size + _LENGTH.size
_SPACE = PciRegion.CONFIG
_REGISTERS = ((COMMAND, 2), (CACHE_LINE, 2), (INTERRUPT_LINE, 1))
"""Offset and length."""
_N_REGISTERS = 4


class QueueMigration:
    """One function's, which told `inventory` of itself before anybody used it.

    What may take long is work (`executor`): nothing else is asked of this object until it is done,
    but for `reset`, and what the guest does to its device.
    """

    support = MigrationSupport.STOP_COPY | MigrationSupport.PRE_COPY

    def __init__(
        self,
        device_class: DeviceClass,
        inventory: bytes,
        executor: Executor,
        device: VfioDevice | UserDevice,
        memory: PinnedMemory,
        restore_interrupts: Callable[[], None],
    ) -> None:
        self._class = device_class
        self._executor = executor
        self._device = device
        self._restore_interrupts = restore_interrupts
        self._memory = memory
        self._inventory = inventory
        self.holds = {
            "queues": f"{device_class.name} {device_class.version}",
            **device_class.properties(inventory),
        }
        self.watch = device_class.watch(memory, inventory)
        self._written: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """The function was reset; what is logged goes on being logged."""
        self._executor.drop_scratch()
        self.watch.reset()
        self.state = MigrationState.RUNNING
        self._walk = self._class.walk(self._inventory)
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._config = bytes(_CONFIG.size)
        self._arrived = b""
        """The state that was walked to last."""
        self._space: dict[int, int] = {}
        """What the guest wrote to the configuration space, by byte."""
        self.went_on = False
        """Whether it goes on from where another one stood."""

    def set_state(self, wanted: MigrationState) -> Work[None]:
        """Raises `QueueError`, `VfioError`, `VfioUserError`."""
        match self.state, wanted:
            case (before, after) if before is after:
                return
            case (MigrationState.RUNNING, MigrationState.PRE_COPY):
                self._add_state()
            case ((MigrationState.RUNNING | MigrationState.PRE_COPY), MigrationState.STOP):
                yield from self._come_to_rest()
            case ((MigrationState.RUNNING | MigrationState.PRE_COPY), MigrationState.STOP_COPY):
                yield from self._come_to_rest()
                self._add_state()
            case (MigrationState.STOP, MigrationState.STOP_COPY):
                self._add_state()
            case ((MigrationState.RUNNING | MigrationState.STOP), MigrationState.RESUMING):
                self._incoming.clear()
                self._arrived = b""
            case (MigrationState.RESUMING, MigrationState.STOP):
                yield from self._finish()
            case (MigrationState.STOP, MigrationState.RUNNING) if self._arrived:
                yield from self._go_on()
            case (
                (MigrationState.STOP | MigrationState.STOP_COPY | MigrationState.PRE_COPY),
                (MigrationState.RUNNING | MigrationState.STOP),
            ):
                self._outgoing.clear()
            case _:
                raise VfioUserError(errno.EINVAL, f"no way to {wanted.name}")
        self.state = wanted

    def size(self) -> int | None:
        """What a state has, in bytes, at the most that is usual."""
        return TYPICAL_STATE_BYTES

    def read(self, size: int) -> Work[bytes]:
        """Up to `size` bytes of the stream."""
        yield from ()
        data = bytes(self._outgoing[:size])
        del self._outgoing[:size]
        return data

    def write(self, data: bytes) -> Work[None]:
        """More of the stream; states that are complete are walked to. Raises as `set_state`."""
        if self.state is not MigrationState.RESUMING:
            raise VfioUserError(errno.EINVAL)
        self._incoming += data
        while len(self._incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming)
            if length > MAX_STATE_BYTES:
                raise VfioUserError(errno.EFBIG)
            end = _LENGTH.size + length
            if len(self._incoming) < end:
                return
            body = bytes(self._incoming[_LENGTH.size : end])
            del self._incoming[:end]
            if len(body) < _HEAD_BYTES:
                raise VfioUserError(errno.EINVAL)
            (inventory_bytes,) = _LENGTH.unpack_from(body, _CONFIG.size)
            inventory = body[_HEAD_BYTES : _HEAD_BYTES + inventory_bytes]
            self._config = body[: _CONFIG.size]
            self._arrived = body[_HEAD_BYTES + inventory_bytes :]
            differences = self._class.differences(inventory, self._inventory)
            if differences:
                raise IdentityMismatch("the target's device holds something else", differences)
            yield from self._executor.work(self._walk.ahead(self._arrived))

    def note(self, offset: int, data: bytes) -> None:
        """The guest writes to the configuration space."""
        self._space.update(enumerate(data, offset))

    def lost(self) -> bytes:
        """The device has died: the stream from which another one goes on. Raises `QueueError`."""
        values = [
            number(bytes(self._space.get(at, 0) for at in range(offset, offset + length)))
            for offset, length in self._registers()
        ]
        return self._state(values, self.watch.lost())

    # Dirty pages.

    @property
    def tracks_writes(self) -> bool:
        return self._class.tracks_writes

    def start_tracking(self) -> None:
        self._written = self._look_for_writes()

    def take_written(self) -> list[int]:
        written, self._written = self._written | self._look_for_writes(), set()
        return sorted(written)

    def stop_tracking(self) -> None:
        if isinstance(self.watch, WriteWatch):
            self.watch.forget_dirty()

    def _look_for_writes(self) -> set[int]:
        return self.watch.dirty() if isinstance(self.watch, WriteWatch) else set()

    # States.

    def _add_state(self) -> None:
        self.watch.look()
        registers = [number(self._device.read(_SPACE, *each)) for each in self._registers()]
        self._outgoing += self._state(registers, self.watch.state())

    def _state(self, registers: list[int], of_class: bytes) -> bytes:
        registers = registers + [0] * (_N_REGISTERS - len(registers))
        inventory = _LENGTH.pack(len(self._inventory)) + self._inventory
        state = _CONFIG.pack(*registers) + inventory + of_class
        return _LENGTH.pack(len(state)) + state

    def _registers(self) -> list[tuple[int, int]]:
        msix = self._device.msix_control
        return [*_REGISTERS, *([] if msix is None else [(msix, 2)])]

    def _come_to_rest(self) -> Work[None]:
        refusals = self.watch.refusals()
        if refusals:
            raise CannotMove(refusals)
        end = time.monotonic() + REST_DEADLINE_S
        while True:
            self.watch.look()
            rest = self.watch.rest()
            if rest is Rest.AT_REST:
                return
            if rest is Rest.BLOCKED:
                raise CannotMove([rest.value])
            if time.monotonic() > end:
                raise WalkTimeout(f"commands do not complete within {REST_DEADLINE_S:g} s")
            yield PAUSE_S

    def _finish(self) -> Work[None]:
        if self._incoming or not self._arrived:
            raise VfioUserError(errno.EINVAL, "the stream is not complete")
        yield from self._executor.work(self._walk.finish(self._arrived))

    def _go_on(self) -> Work[None]:
        state, self._arrived = self._arrived, b""
        values = _CONFIG.unpack(self._config)
        for (offset, length), value in zip(self._registers(), values, strict=False):
            data = value.to_bytes(length, "little")
            self.note(offset, data)
            self._device.write(_SPACE, offset, data)
        self._restore_interrupts()
        self.watch = self._class.watch(self._memory, self._inventory, state)
        self.went_on = True
        self._executor.guest = self._memory
        try:
            yield from self._executor.work(self._walk.start(state))
        finally:
            self._executor.guest = None
