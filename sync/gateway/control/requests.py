"""The requests of a gateway's control protocol: one class for each, from which both ends are made.

Owned here: the name of a request, its fields with their bounds, its reply, who may ask for it in
which states, and what else holds for it. Not owned: how fields become bytes (`shapes`, `wire`),
what a request does (`server`; for whoever asks, the methods of `client` say it), and what the
states mean (`custody`).

`VERSION` goes up with any change of a request or a reply. Two ends of different versions part with
the first request, `hello`.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, get_args

from sync.gateway.control.info import GatewayInfo, Upgraded
from sync.gateway.control.shapes import AtMost, Matching, Part, PowerOfTwo, Range, Text
from sync.gateway.control.wire import MAX_BLOB_BYTES
from sync.gateway.engine.custody import TRANSITIONS, ClientRole, CustodyState, Event
from sync.gateway.engine.records import NO_TERMS, Fate, Terms
from sync.registers.record import RECORD_BYTES
from sync.vfio_user.protocol import MigrationState

VERSION = 7

MAX_JOURNAL_RECORDS = MAX_BLOB_BYTES // RECORD_BYTES
MAX_RECOVERY_S = 600.0
MAX_COMPANIONS = 64
MAX_PAGE_BYTES = 1 << 30
_PATH_CHARACTERS = 4096
_SETTINGS_CHARACTERS = 4096

Tracker = Literal["logging", "queues", "message", "none"]
Blob = Annotated[bytes, Part.BLOB]
Descriptors = Annotated[tuple[int, ...], Part.DESCRIPTORS]
Number = Annotated[int, Range(0, 1 << 32)]
SessionName = Annotated[
    str, Matching(re.compile(r"[0-9A-Za-z_-]{1,64}"), "1 to 64 letters, digits, '-' and '_'")
]
OptionalSession = Annotated[
    str, Matching(re.compile(r"[0-9A-Za-z_-]{0,64}"), "up to 64 letters, digits, '-' and '_'")
]
Proof = Annotated[str, Text(256)]
"""`VERDICT:SESSION:TOKEN`, as the other side's record gives it; '' is none."""
MemoryRow = tuple[int, int, int, bool]
"""IOVA, length, offset in the file, whether the device may write there."""

ANY_STATE = frozenset(CustodyState)
ANYBODY = frozenset(ClientRole)
LEASE = frozenset({ClientRole.SOURCE, ClientRole.TARGET})
SOURCE = frozenset({ClientRole.SOURCE})
TARGET = frozenset({ClientRole.TARGET})

_AT_SOURCE = frozenset({CustodyState.MEDIATED, CustodyState.STOPPED})
_AT_DEVICE = frozenset({CustodyState.MEDIATED, CustodyState.STOPPED, CustodyState.STANDBY})


def _from(event: Event) -> frozenset[CustodyState]:
    return frozenset(state for state, cause in TRANSITIONS if cause is event)


R = TypeVar("R")


class Request(Generic[R]):
    """What can be asked for; `R` is the shape of the reply."""

    __slots__ = ()

    op: ClassVar[str]
    roles: ClassVar[frozenset[ClientRole]]
    states: ClassVar[frozenset[CustodyState]] = ANY_STATE
    at_once: ClassVar[bool] = False
    """Answered whatever the device is doing: changes nothing that a job under way relies on."""
    after_loss: ClassVar[bool] = False
    """A controller whose session has ended with its device or VMM may still ask for it."""
    takes: ClassVar[bool] = False
    """What the answer holds is at the gateway no more."""

    @classmethod
    def reply(cls) -> type[R]:
        (base,) = vars(cls)["__orig_bases__"]
        reply: type[R]
        (reply,) = get_args(base)
        return reply


@dataclass(frozen=True, slots=True)
class Done:
    """The reply of a request that has nothing to tell."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """A part of the memory map: `descriptors` in the order of `regions`, `total` regions in all."""

    regions: tuple[MemoryRow, ...]
    generation: int
    total: int
    descriptors: Descriptors = ()


@dataclass(frozen=True, slots=True)
class Mediation:
    """What `mediate` gives back.

    `dirty` is a memfd of two bitmaps of `half_bytes` each, one after the other, over the flat page
    space of `n_pages` pages; empty without a tracker. Its receiver owns it.
    """

    values: Blob
    """The snapshot's records with what was read."""
    journal_seq: int
    """The number of the first record that the journal will hold."""
    page_size: int
    """What the tracker can tell apart, in bytes; its bits are always set for pages of 4096."""
    n_pages: int
    half_bytes: int
    layout_generation: int
    dirty: Descriptors = ()

    @property
    def dirty_fd(self) -> int | None:
        return self.dirty[0] if self.dirty else None


class DirtyHalf(NamedTuple):
    """The half of the dirty bitmap that the gateway writes no more."""

    half: int
    layout_generation: int
    complete: bool
    """False: the device would not report all of what it wrote."""


class JournalPart(NamedTuple):
    """Records of 32 bytes, in the order of execution."""

    records: Blob
    overflow: bool
    """True: operations were lost since `mediate`."""


class Recaptured(NamedTuple):
    """What `recapture` gives back: see `Mediation`."""

    values: Blob
    journal_seq: int


@dataclass(frozen=True, slots=True)
class Records:
    """Register operations with what was read filled in."""

    records: Blob


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A part of the device's state."""

    data: Blob


@dataclass(frozen=True, slots=True)
class StateSize:
    """How much state of its own the device has (VFIO migration v2)."""

    bytes: int | None
    """Left to read once it is at rest, as it estimates it; null if it does not tell."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is on record of a session: `SessionRecord` without what only its gateway knows."""

    session: str
    role: ClientRole
    fate: Fate
    decides: bool
    proof: str
    ran: bool
    began: float
    changed: float


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device that is ready to take the place of the guest's."""

    native: bool
    """Whether the state goes by the devices' own streams, else by their profile."""


@dataclass(frozen=True, slots=True)
class Switched:
    """The guest has another device."""

    native: bool
    held_ms: float
    """How long its accesses waited."""


@dataclass(frozen=True, slots=True)
class ControlHello(Request[GatewayInfo]):
    """The first request, once: who asks, and with a role other than `observer` for the lease."""

    op = "hello"
    roles = frozenset()
    version: int
    role: ClientRole
    session: OptionalSession = ""


@dataclass(frozen=True, slots=True)
class Status(Request[GatewayInfo]):
    op = "status"
    roles = ANYBODY
    at_once = True


@dataclass(frozen=True, slots=True)
class Memory(Request[MemoryPart]):
    """The memory map from region `start` on, if it is still the one of `generation`."""

    op = "memory"
    roles = ANYBODY
    at_once = True
    start: Number
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class ArmRecovery(Request[Done]):
    """`companions`: control sockets of the VM's other gateways."""

    op = "arm_recovery"
    roles = SOURCE
    after_loss = True
    qmp_path: Annotated[str, Text(_PATH_CHARACTERS)]
    deadline_s: Annotated[float, Range(0.01, MAX_RECOVERY_S)]
    ran: bool
    put_back: Annotated[str, Text(_SETTINGS_CHARACTERS)] = ""
    silence_s: Annotated[float, Range(0.01, MAX_RECOVERY_S)] = MAX_RECOVERY_S
    may_end_holder: bool = False
    companions: Annotated[tuple[str, ...], AtMost(MAX_COMPANIONS)] = ()


@dataclass(frozen=True, slots=True)
class DisarmRecovery(Request[Done]):
    op = "disarm_recovery"
    roles = SOURCE
    after_loss = True


@dataclass(frozen=True, slots=True)
class Mediate(Request[Mediation]):
    op = "mediate"
    roles = SOURCE
    states = _from(Event.MEDIATE)
    tracker: Tracker
    page_size: Annotated[int, PowerOfTwo(MAX_PAGE_BYTES)]
    capture: bool
    snapshot: Blob = b""
    terms: Terms = NO_TERMS


@dataclass(frozen=True, slots=True)
class CollectDirty(Request[DirtyHalf]):
    op = "dirty"
    roles = SOURCE
    states = _AT_SOURCE
    takes = True


@dataclass(frozen=True, slots=True)
class TakeJournal(Request[JournalPart]):
    op = "journal"
    roles = SOURCE
    states = _AT_SOURCE
    takes = True
    max_records: Annotated[int, Range(0, MAX_JOURNAL_RECORDS)]


@dataclass(frozen=True, slots=True)
class Recapture(Request[Recaptured]):
    op = "recapture"
    roles = SOURCE
    states = frozenset({CustodyState.MEDIATED})
    takes = True
    snapshot: Blob


@dataclass(frozen=True, slots=True)
class Batch(Request[Records]):
    op = "batch"
    roles = LEASE
    states = _AT_DEVICE | {CustodyState.PASSTHROUGH, CustodyState.RELEASED}
    records: Blob


@dataclass(frozen=True, slots=True)
class Stop(Request[Done]):
    op = "stop"
    roles = SOURCE
    states = _from(Event.STOP)
    fence: bool
    resume: Blob = b""


@dataclass(frozen=True, slots=True)
class SetMigrationState(Request[Done]):
    op = "mig_state"
    roles = LEASE
    states = _AT_DEVICE
    state: MigrationState


@dataclass(frozen=True, slots=True)
class GetStateSize(Request[StateSize]):
    op = "mig_size"
    roles = LEASE
    states = _AT_DEVICE | {CustodyState.PASSTHROUGH, CustodyState.RELEASED}


@dataclass(frozen=True, slots=True)
class ReadDeviceState(Request[DeviceState]):
    op = "mig_read"
    roles = LEASE
    states = _AT_DEVICE
    takes = True
    max_bytes: Annotated[int, Range(1, MAX_BLOB_BYTES)]


@dataclass(frozen=True, slots=True)
class WriteDeviceState(Request[Done]):
    op = "mig_write"
    roles = LEASE
    states = _AT_DEVICE
    data: Blob


@dataclass(frozen=True, slots=True)
class ResetDevice(Request[Done]):
    op = "reset_device"
    roles = LEASE
    states = frozenset({CustodyState.STOPPED, CustodyState.STANDBY})


@dataclass(frozen=True, slots=True)
class Passthrough(Request[Done]):
    op = "passthrough"
    roles = SOURCE
    states = _from(Event.RESTORE)
    after_loss = True


@dataclass(frozen=True, slots=True)
class Release(Request[Done]):
    """A second one by the same session is answered like the first: its answer may be lost."""

    op = "release"
    roles = SOURCE
    states = _from(Event.RELEASE) | {CustodyState.RELEASED}
    session: SessionName


@dataclass(frozen=True, slots=True)
class Reclaim(Request[Done]):
    """Who did not release the guest itself has to have the proof that the target is fenced."""

    op = "reclaim"
    roles = SOURCE
    states = _from(Event.RECLAIM)
    session: SessionName
    proof: Proof = ""


@dataclass(frozen=True, slots=True)
class Vouch(Request[Done]):
    """`reclaim` without a proof, on an operator's word."""

    op = "vouch"
    roles = SOURCE
    states = _from(Event.RECLAIM)
    session: SessionName


@dataclass(frozen=True, slots=True)
class Moved(Request[Done]):
    """Who did not release the guest itself has to have the proof that the target owns it."""

    op = "moved"
    roles = SOURCE
    after_loss = True
    session: SessionName
    proof: Proof = ""


@dataclass(frozen=True, slots=True)
class AskVerdict(Request[Verdict]):
    """Of the session in doubt here, if none is named."""

    op = "verdict"
    roles = ANYBODY
    at_once = True
    session: OptionalSession = ""


@dataclass(frozen=True, slots=True)
class PrepareDevice(Request[NewDevice]):
    """Another device process is to take the place of the guest's; it is had ready."""

    op = "prepare_device"
    roles = SOURCE
    states = frozenset({CustodyState.PASSTHROUGH})
    path: Annotated[str, Text(_PATH_CHARACTERS)]


@dataclass(frozen=True, slots=True)
class SwitchDevice(Request[Switched]):
    op = "switch_device"
    roles = SOURCE
    states = frozenset({CustodyState.PASSTHROUGH})


@dataclass(frozen=True, slots=True)
class Standby(Request[Done]):
    op = "standby"
    roles = TARGET
    states = _from(Event.STANDBY)
    session: SessionName
    terms: Terms = NO_TERMS


@dataclass(frozen=True, slots=True)
class Own(Request[Done]):
    """`ran`: the guest is to run here, as it did at the source."""

    op = "own"
    roles = TARGET
    states = frozenset({CustodyState.STANDBY})
    session: SessionName
    ran: bool
    records: Blob = b""


@dataclass(frozen=True, slots=True)
class Start(Request[Done]):
    op = "start"
    roles = TARGET
    states = _from(Event.START)
    records: Blob = b""


@dataclass(frozen=True, slots=True)
class Running(Request[Done]):
    op = "running"
    roles = TARGET
    after_loss = True
    session: SessionName


@dataclass(frozen=True, slots=True)
class Fence(Request[Done]):
    op = "fence"
    roles = TARGET
    at_once = True
    session: SessionName


@dataclass(frozen=True, slots=True)
class Abandon(Request[Done]):
    op = "abandon"
    roles = TARGET
    states = _from(Event.ABANDON)


@dataclass(frozen=True, slots=True)
class Upgrade(Request[Upgraded]):
    """Asked for without a hello, and alike in every version: the two ends may be of different
    releases here."""

    op = "upgrade"
    roles = frozenset()


REQUESTS: dict[str, type[Request[Any]]] = {
    request.op: request
    for request in (
        ControlHello,
        Status,
        Memory,
        ArmRecovery,
        DisarmRecovery,
        Mediate,
        CollectDirty,
        TakeJournal,
        Recapture,
        Batch,
        Stop,
        SetMigrationState,
        GetStateSize,
        ReadDeviceState,
        WriteDeviceState,
        ResetDevice,
        Passthrough,
        Release,
        Reclaim,
        Vouch,
        Moved,
        AskVerdict,
        PrepareDevice,
        SwitchDevice,
        Standby,
        Own,
        Start,
        Running,
        Fence,
        Abandon,
        Upgrade,
    )
}
"""By name."""
