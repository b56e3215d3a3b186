"""Devices with queues: the interface by which a class of devices is watched, brought to rest,
re-created and walked.

Owns the commands that a plan consists of and the three parts that a class of devices implements.
Nothing in a class touches a device, guest memory or a clock: a *watch* is given the guest's
register accesses and reads of guest memory; a *plan* is a generator that yields commands and is
sent their answers. Who executes them owns deadlines, scratch memory and the IOMMU.

    source                                          target
    inventory() before the guest has the device     the same; properties() compared in prepare
    watch: every access, from the first reset on
    watch.state() ------------------------------->  walk.ahead(state)      guest memory out of reach
    [VMM paused] watch.look() until AT_REST
    watch.state() ------------------------------->  walk.finish(state)     guest memory out of reach
                                                    [commit; guest memory mapped, interrupts on]
                                                    walk.start(state), then the doorbells held back

An interrupt of the device reaches nobody during `inventory`, `ahead` and `finish`; but MSI-X is
enabled if the guest enabled it, since a device may refuse a queue with a vector otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol, TypeVar

from sync.queues.errors import CannotMove
from sync.registers.errors import Difference
from sync.registers.profile.locate import DeviceView

PAGE_BYTES = 4096
"""What scratch memory and dirty pages are counted in."""
MAX_STATE_BYTES = 16 << 20
"""Of a state, and of an inventory."""


@dataclass(frozen=True, slots=True)
class ResetFunction:
    """Reset the device as a whole."""


@dataclass(frozen=True, slots=True)
class ReadRegister:
    """Read `length` bytes at `offset` of a region; the answer is the bytes."""

    offset: int
    length: int
    region: int = 0
    """A BAR, or `PciRegion.CONFIG`."""


@dataclass(frozen=True, slots=True)
class WriteRegister:
    """Write `data` at `offset` of a region."""

    offset: int
    data: bytes
    region: int = 0


@dataclass(frozen=True, slots=True)
class AwaitRegister:
    """Wait until a little-endian register is `value` under `mask`; the answer is its bytes."""

    offset: int
    length: int
    mask: int
    value: int
    region: int = 0


@dataclass(frozen=True, slots=True)
class MapScratch:
    """Show the device zeroed memory of ours at whole pages from `iova` on."""

    iova: int
    length: int


@dataclass(frozen=True, slots=True)
class UnmapScratch:
    """Take a whole range of scratch memory away again."""

    iova: int
    length: int


@dataclass(frozen=True, slots=True)
class ReadMemory:
    """Read what the device sees at `iova`: scratch, or in `start` the guest's memory."""

    iova: int
    length: int


@dataclass(frozen=True, slots=True)
class WriteMemory:
    """Write where the device reads: scratch, or in `start` the guest's memory."""

    iova: int
    data: bytes


@dataclass(frozen=True, slots=True)
class AwaitMemory:
    """Wait until a little-endian number in memory is `value` under `mask`."""

    iova: int
    length: int
    mask: int
    value: int


@dataclass(frozen=True, slots=True)
class Signal:
    """Fire an interrupt vector of the guest's; one too many does no harm."""

    vector: int


Command = (
    ResetFunction
    | ReadRegister
    | WriteRegister
    | AwaitRegister
    | MapScratch
    | UnmapScratch
    | ReadMemory
    | WriteMemory
    | AwaitMemory
    | Signal
)
T = TypeVar("T")
Plan = Generator[Command, bytes, T]
"""Yields commands; is sent the bytes asked for, or none."""


def run(plan: Plan[T], execute: Callable[[Command], bytes]) -> T:
    """Execute a plan to its end and return its result. Raises what either of the two raises."""
    answer = b""
    try:
        command = next(plan)
        while True:
            answer = execute(command)
            command = plan.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


class Memory(Protocol):
    """Reads of guest memory."""

    def read(self, iova: int, length: int) -> bytes:
        """Raises `MemoryUnreadable` for an address that is not the guest's."""


class Rest(Enum):
    """How far a device is from having nothing under way that is not in its state."""

    AT_REST = "at rest"
    BUSY = "commands under way"
    BLOCKED = "commands under way that end only once the guest takes completions"


class Watch(ABC):
    """Follows one device from what the guest does to it."""

    @abstractmethod
    def read(self, region: int, offset: int, data: bytes) -> None:
        """The guest has read `data` from a register."""

    @abstractmethod
    def write(self, region: int, offset: int, data: bytes) -> None:
        """The guest is about to write a register: called before the device sees it."""

    @abstractmethod
    def reset(self) -> None:
        """The device was reset as a whole."""

    @abstractmethod
    def look(self) -> None:
        """See in guest memory what the device has completed since."""

    @abstractmethod
    def rest(self) -> Rest:
        """As of the last `look`."""

    @abstractmethod
    def refusals(self) -> Sequence[str]:
        """Why the device cannot be moved as it is now, in words for a user; empty: it can."""

    @abstractmethod
    def state(self) -> bytes:
        """For the walk at the target. Raises `CannotMove`."""

    def lost(self) -> bytes:
        """The state of a device that has died, for the walk of another one: what it did not
        complete is in it, to be executed again. Raises `CannotMove`."""
        raise CannotMove(["what is under way in such a device is not known"])


class WriteWatch(Watch):
    """A watch that knows all that its device writes.

    Only where a driver cannot give its device a buffer without a doorbell. Where kicks may be
    suppressed, buffers come and go unseen however often one looks: then there is a `Watch` alone.
    """

    @abstractmethod
    def dirty(self) -> set[int]:
        """Numbers of the pages that the device may have written since the last call, or may still
        be writing; looks first. A page stays in it from its command's doorbell until the first call
        after its completion was seen (I1). The first call begins to track: it has what is under
        way."""

    @abstractmethod
    def forget_dirty(self) -> None:
        """Nobody asks for dirty pages any more."""


class Walk(ABC):
    """Brings one device, which nobody uses yet, to where another one stands."""

    @abstractmethod
    def ahead(self, state: bytes) -> Plan[None]:
        """Re-create and walk while the guest still runs; may be called again with later states.

        Raises `CannotMove`, `WalkFailed`, `StateError`.
        """

    @abstractmethod
    def finish(self, state: bytes) -> Plan[None]:
        """Walk the rest and take all scratch memory away. Raises as `ahead` does."""

    @abstractmethod
    def start(self, state: bytes) -> Plan[None]:
        """What has to wait until the device reaches guest memory."""


class DeviceClass(ABC):
    """A class of devices with queues; a plug-in of the group `vfio_ferry.queues`."""

    name: ClassVar[str]
    version: ClassVar[str]
    """Both sides need the same: it is that of the form of inventories and states."""
    tracks_writes: ClassVar[bool]
    """Whether its watch is a `WriteWatch`."""

    @abstractmethod
    def precision(self, view: DeviceView) -> int | None:
        """How narrowly the class fits a device; None: not at all."""

    @abstractmethod
    def inventory(self) -> Plan[bytes]:
        """What the device is and holds, told by itself. Resets it, before and afterwards."""

    @abstractmethod
    def properties(self, inventory: bytes) -> Mapping[str, str]:
        """What of it has to be the same on both sides, by name. Raises `StateError`."""

    def unfenced(self, inventory: bytes) -> str:
        """Why an IOMMU may not keep such a device from memory that it is not shown; '': it does."""
        return ""

    def differences(self, source: bytes, target: bytes) -> Sequence[Difference]:
        """What of two inventories keeps a guest from going on. Raises `StateError`."""
        theirs, ours = self.properties(source), self.properties(target)
        return [
            Difference(name, theirs.get(name, "nothing"), ours.get(name, "nothing"))
            for name in (*theirs, *(name for name in ours if name not in theirs))
            if theirs.get(name) != ours.get(name)
        ]

    @abstractmethod
    def watch(self, memory: Memory, inventory: bytes, state: bytes | None = None) -> Watch:
        """A watch from a reset on, or at a target from the state on that it was walked to."""

    @abstractmethod
    def walk(self, inventory: bytes) -> Walk: ...


def le(value: int, length: int) -> bytes:
    """A little-endian number."""
    return value.to_bytes(length, "little")


def number(data: bytes | bytearray) -> int:
    """What a little-endian number is."""
    return int.from_bytes(data, "little")
