"""Register-state synchronisation: the interface that hides what is particular to a device.

Owns the order of the calls and the shapes that cross the interface. The two methods behind it are
`capture` (a profile, capture and replay) and `v2` (the device's own state stream); `choose` picks.

    phase        source                                      target
    prepare      offer() ------------- one payload --------> choose.target_for(offer), check()
                                                             gateway.standby
    pre-copy     gateway.mediate(capture=.capture,
                     snapshot=await snapshot())
                 begin(values, journal_seq) -- payloads ---> receive(payload), each in order
                 precopy(), once a round ----- payloads ---> receive(payload)
    switchover   [VMM paused] quiesce()
                 gateway.stop(fence=.fence,
                     resume=resume_records())
                 final() --------------------- payloads ---> receive(payload); finish()
    commit                                                   gateway.own
                                                             gateway.start(start_records())
    abort        rollback(), then gateway.passthrough

Payloads go through whatever link there is, in order and complete. All methods raise
`RegisterError` and let what the gateway raises pass.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

from sync.vfio_user.features import MigrationState

Method = Literal["v2", "replay"]


class GatewayPort(Protocol):
    """What of a gateway's client (`sync.gateway.control.client`) the methods use."""

    async def batch(self, records: bytes) -> bytes: ...

    async def journal(self, max_records: int = ...) -> tuple[bytes, bool]: ...

    async def recapture(self, snapshot: bytes) -> tuple[bytes, int]: ...

    async def mig_state(self, state: MigrationState) -> None:
        """Raises `DeviceRefusal`."""

    async def mig_size(self) -> int | None:
        """None if the device does not tell how much state it has."""

    async def mig_read(self, max_bytes: int) -> bytes: ...

    async def mig_write(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class RegisterReport:
    """What became of a device's register state, on either side."""

    method: Method
    captured: int = 0
    """The guest's register accesses while the device was mediated."""
    replayed: int = 0
    """Of these: writes and resets executed on the target."""
    read_backs: int = 0
    """Of these: reads executed on the target."""
    held: int = 0
    """Of these: kept back until the target owned the guest."""
    ignored: int = 0
    divergences: Mapping[str, int] = field(default_factory=dict)
    """By register: accesses that ended otherwise on the target than on the source."""
    compared: int = 0
    """Registers proven equal at the end."""
    state_bytes: int = 0
    """Length of the device's own state stream."""
    start_writes: int = 0
    """Register writes that start the device at the target."""


class StateLeft(NamedTuple):
    """State of a device's own that has to move while the guest stands still."""

    bytes: int
    ns_per_byte: float
    """What moving it takes, as far as that was measured: reading, sending, and writing at the
    target."""


NOTHING_LEFT = StateLeft(0, 0.0)


class SourceRegisters(ABC):
    """The source's half for one device."""

    method: ClassVar[Method]
    capture: ClassVar[bool]
    """Whether the gateway has to capture the guest's accesses."""
    fence: ClassVar[bool]
    """Whether the gateway has to take guest memory from the device in order to stop it."""

    @abstractmethod
    async def offer(self) -> bytes:
        """What the target has to judge: one payload. The device is not disturbed."""

    @abstractmethod
    async def snapshot(self) -> bytes:
        """The records for `mediate` to execute in one with the switch; ask right before it."""

    @abstractmethod
    def begin(self, values: bytes, journal_seq: int) -> AsyncIterator[bytes]:
        """Payloads of the first state. `values` and `journal_seq` come from `mediate`."""

    @abstractmethod
    def precopy(self) -> AsyncIterator[bytes]:
        """Payloads of what has come up since; bounded, so that a busy device cannot hold us. What
        could not be kept until it was fetched is made up for by a state as that of `begin`."""

    async def state_left(self) -> "StateLeft | None":
        """What is left for `final`, as far as it grows with the device; None if nobody knows."""
        return NOTHING_LEFT

    @abstractmethod
    async def quiesce(self) -> None:
        """The VMM is paused: bring the device to rest as far as it can do so by itself."""

    @abstractmethod
    def resume_records(self) -> bytes:
        """What the gateway executes when it starts the device on the source again."""

    @abstractmethod
    def final(self) -> AsyncIterator[bytes]:
        """Payloads of everything that is left, with what the target needs to verify it."""

    @abstractmethod
    async def rollback(self) -> None:
        """Undo what was done to the device itself, in any phase before the gateway released."""

    @abstractmethod
    def report(self) -> RegisterReport:
        """What has become of the registers so far."""


class TargetRegisters(ABC):
    """The target's half for one device."""

    method: ClassVar[Method]

    @abstractmethod
    async def check(self) -> None:
        """Compare what needs reading the device. Raises `IdentityMismatch`; touches nothing."""

    @abstractmethod
    async def receive(self, payload: bytes) -> None:
        """Apply one payload. Raises `PayloadError` if the peer is at fault."""

    @abstractmethod
    async def finish(self) -> RegisterReport:
        """Complete and verify the state. Raises `RegisterMismatch`, `RestartRefused`,
        `PayloadError` (the state is not complete). May be called again."""

    @abstractmethod
    def start_records(self) -> bytes:
        """What the gateway executes when it starts the device, after `finish`."""
