"""Where a side of a handover (`sync.handover.machine`) stands, and how long it may stay there."""

from dataclasses import dataclass, fields
from enum import Enum


class Role(Enum):
    """A side of a handover: the host that the guest leaves, or the one that it comes to."""

    SOURCE = "source"
    TARGET = "target"


class HandoverState(Enum):
    """Where a side stands. Terminal states say who owns the guest, as far as this side knows."""

    IDLE = "idle"
    # source
    PREPARING = "preparing"
    MEDIATING = "mediating"
    PRECOPY = "precopy"
    PAUSING = "pausing"
    STOPPING = "stopping"
    FINALIZING = "finalizing"
    VERIFYING = "verifying"
    AWAITING_READY = "awaiting-ready"
    RELEASING = "releasing"
    COMMITTING = "committing"
    ABORTING = "aborting"
    # target
    LISTENING = "listening"
    CHECKING = "checking"
    CHECKING_ONLY = "checking-only"
    ANSWERING = "answering"
    ENTERING_STANDBY = "entering-standby"
    RECEIVING = "receiving"
    READYING = "readying"
    READY = "ready"
    OWNING = "owning"
    DISOWNING = "disowning"
    STARTING_GUEST = "starting-guest"
    FENCING = "fencing"
    # terminal
    COMMITTED = "committed"
    """The target owns the guest and has started it."""
    ABORTED = "aborted"
    """Source: the guest runs here as before. Target: it will never start from this session."""
    CHECKED = "checked"
    """No more than a check was asked for: both sides fit, and nothing was touched."""
    BROKEN = "broken"
    """As `ABORTED`, but cleaning up failed. Source: it owns the guest, which may stand still.
    Target: it never asked for the guest, but its gateway is not in order."""
    IN_DOUBT = "in-doubt"
    """Only the other side's ownership record says who owns the guest; this side does nothing."""
    OWNER_FAILED = "owner-failed"
    """The target owns the guest and could not start it; the source may not resume."""


TERMINAL = frozenset(
    {
        HandoverState.COMMITTED,
        HandoverState.ABORTED,
        HandoverState.CHECKED,
        HandoverState.BROKEN,
        HandoverState.IN_DOUBT,
        HandoverState.OWNER_FAILED,
    }
)

STANDSTILL = frozenset(
    {
        HandoverState.STOPPING,
        HandoverState.FINALIZING,
        HandoverState.VERIFYING,
        HandoverState.AWAITING_READY,
        HandoverState.RELEASING,
    }
)
"""The source's states in which its guest stands still and can still go on here."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a side may stay in each state; `None` is without limit of its own.

    Those of `STANDSTILL` have one budget together, which follows from the downtime that is allowed
    (I10). A target receives for as long as its source sends.

    The target's answer to a commit takes at most
    `ready_s + owning_s + disowning_s + starting_guest_s`; `committing_s` has to be longer, or the
    source is in doubt without need.
    """

    preparing_s: float | None = 60.0
    mediating_s: float | None = 10.0
    precopy_s: float | None = 3600.0
    pausing_s: float | None = 10.0
    stopping_s: float | None = None
    finalizing_s: float | None = None
    verifying_s: float | None = None
    awaiting_ready_s: float | None = None
    releasing_s: float | None = None
    committing_s: float | None = 45.0
    aborting_s: float | None = 15.0
    listening_s: float | None = None
    checking_s: float | None = 10.0
    checking_only_s: float | None = 10.0
    answering_s: float | None = 60.0
    entering_standby_s: float | None = 30.0
    receiving_s: float | None = None
    readying_s: float | None = 20.0
    ready_s: float | None = 15.0
    owning_s: float | None = 5.0
    disowning_s: float | None = 5.0
    starting_guest_s: float | None = 15.0
    fencing_s: float | None = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if seconds is not None and not 0 < seconds < float("inf"):
                raise ValueError(f"{field.name} has to be a positive number of seconds")

    def of(self, state: HandoverState) -> float | None:
        """The limit for `state`; `IDLE` and the terminal states have none."""
        if state is HandoverState.IDLE or state in TERMINAL:
            return None
        seconds: float | None = getattr(self, f"{state.name.lower()}_s")
        return seconds
