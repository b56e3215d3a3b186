"""A gateway's states, who owns the guest, and who may ask for what: three tables and a record.

Sans-IO: events in, a new state or a typed error out. Not owned here: what is done to the device
on the way from one state to the next (`jobs`), and what the states mean for a message (`relay`,
`traps`).

                       mediate                 stop                 release
      +-------------+ --------> +----------+ --------> +---------+ --------> +----------+
      | passthrough |           | mediated |           | stopped |           | released |
      +-------------+ <-------- +----------+           +---------+ <-------- +----------+
       |   ^   ^    ^  restore                              |       reclaim
       |   |   |    +---------------------------------------+
       |   |   |                   restore
       |   |   | start (owned)
       |   |   +--------------+
       |   | abandon (not owned)
       |   +---------------+  |
       | standby         +---------+
       +---------------> | standby |
                         +---------+

`lost` (the device or the VMM has gone) leads from every state to passthrough: what is left of a
session is its record of owners. Losing the lease restores a source and abandons a target
(`LEASE_LOSS`), except where that would break I7: a released source stays released, and a target
that owns the guest stays in standby until somebody starts it.

The owner, beside the state:

    unowned    no VMM, or standby before `own`
    owned      a VMM connected in passthrough (no session), or `own` in standby, or `reclaim`
    released   `release`: only `reclaim` by the same session makes this gateway the owner again
    fenced     the session in standby was fenced: it can never own the guest here

A verdict over a session (fenced, or owned at some time) is final for the life of the process.
A gateway that was killed and started anew knows nothing of this: it is the owner when a VMM
connects, as a device without a gateway would be.
"""

from collections import OrderedDict
from enum import StrEnum

from sync.gateway.errors import NoVmm, SessionFenced, WrongSession, WrongState

MAX_VERDICTS = 65536
"""Sessions remembered, some 100 bytes each; session identities are random and do not recur."""


class State(StrEnum):
    PASSTHROUGH = "passthrough"
    MEDIATED = "mediated"
    STOPPED = "stopped"
    RELEASED = "released"
    STANDBY = "standby"


class Owner(StrEnum):
    UNOWNED = "unowned"
    OWNED = "owned"
    RELEASED = "released"
    FENCED = "fenced"


class Event(StrEnum):
    MEDIATE = "mediate"
    STOP = "stop"
    RELEASE = "release"
    RECLAIM = "reclaim"
    RESTORE = "passthrough"
    STANDBY = "standby"
    START = "start"
    ABANDON = "abandon"


class Role(StrEnum):
    OBSERVER = "observer"
    SOURCE = "source"
    TARGET = "target"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.PASSTHROUGH, Event.MEDIATE): State.MEDIATED,
    (State.MEDIATED, Event.STOP): State.STOPPED,
    (State.STOPPED, Event.RELEASE): State.RELEASED,
    (State.RELEASED, Event.RECLAIM): State.STOPPED,
    (State.PASSTHROUGH, Event.RESTORE): State.PASSTHROUGH,
    (State.MEDIATED, Event.RESTORE): State.PASSTHROUGH,
    (State.STOPPED, Event.RESTORE): State.PASSTHROUGH,
    (State.PASSTHROUGH, Event.STANDBY): State.STANDBY,
    (State.STANDBY, Event.START): State.PASSTHROUGH,
    (State.PASSTHROUGH, Event.ABANDON): State.PASSTHROUGH,
    (State.STANDBY, Event.ABANDON): State.PASSTHROUGH,
}

ANY_STATE = frozenset(State)
LEASE = frozenset({Role.SOURCE, Role.TARGET})
SOURCE = frozenset({Role.SOURCE})
TARGET = frozenset({Role.TARGET})

_AT_SOURCE = frozenset({State.MEDIATED, State.STOPPED})
_AT_DEVICE = frozenset({State.MEDIATED, State.STOPPED, State.STANDBY})


def _from(event: Event) -> frozenset[State]:
    return frozenset(state for state, cause in TRANSITIONS if cause is event)


REQUESTS: dict[str, tuple[frozenset[Role], frozenset[State]]] = {
    "status": (frozenset(Role), ANY_STATE),
    "memory": (frozenset(Role), ANY_STATE),
    "arm_recovery": (SOURCE, ANY_STATE),
    "disarm_recovery": (SOURCE, ANY_STATE),
    "mediate": (SOURCE, _from(Event.MEDIATE)),
    "dirty": (SOURCE, _AT_SOURCE),
    "journal": (SOURCE, _AT_SOURCE),
    "stop": (SOURCE, _from(Event.STOP)),
    "passthrough": (SOURCE, _from(Event.RESTORE)),
    # A second `release` by the same session is answered like the first: its answer may be lost.
    "release": (SOURCE, _from(Event.RELEASE) | {State.RELEASED}),
    "reclaim": (SOURCE, _from(Event.RECLAIM)),
    "batch": (LEASE, _AT_DEVICE | {State.PASSTHROUGH}),
    "mig_state": (LEASE, _AT_DEVICE),
    "mig_state_get": (LEASE, _AT_DEVICE | {State.PASSTHROUGH}),
    "mig_read": (LEASE, _AT_DEVICE),
    "mig_write": (LEASE, _AT_DEVICE),
    "reset_device": (LEASE, frozenset({State.STOPPED, State.STANDBY})),
    "standby": (TARGET, _from(Event.STANDBY)),
    "own": (TARGET, frozenset({State.STANDBY})),
    "start": (TARGET, _from(Event.START)),
    "fence": (TARGET, ANY_STATE),
    "abandon": (TARGET, _from(Event.ABANDON)),
}
"""Who may ask for what, and in which states."""


class LeaseLoss(StrEnum):
    """What the gateway does by itself when the lease ends (I7, I8)."""

    NOTHING = "nothing"
    RESTORE = "restore"
    """Back to passthrough, then the VMM is resumed if a recovery was armed."""
    RESUME = "resume"
    """The device is in passthrough, or gone; the VMM is resumed if a recovery was armed."""
    ABANDON = "abandon"


LEASE_LOSS: dict[tuple[Role, State], LeaseLoss] = {
    (Role.SOURCE, State.PASSTHROUGH): LeaseLoss.RESUME,
    (Role.SOURCE, State.MEDIATED): LeaseLoss.RESTORE,
    (Role.SOURCE, State.STOPPED): LeaseLoss.RESTORE,
    (Role.TARGET, State.STANDBY): LeaseLoss.ABANDON,
}
"""By role and state; every other case: nothing. A target that owns the guest is left alone."""


class Custody:
    """The state and the ownership record of one gateway.

    Every method that names an event of the module's diagram makes that transition or raises
    `WrongState`, `WrongSession` or `SessionFenced` and leaves everything as it was.
    """

    def __init__(self) -> None:
        self.state = State.PASSTHROUGH
        self.owner = Owner.UNOWNED
        self.session = ""
        self.vmm_connected = False
        self._verdicts: OrderedDict[str, Owner] = OrderedDict()

    @property
    def owned(self) -> bool:
        return self.owner is Owner.OWNED

    def verdicts(self, count: int) -> dict[str, str]:
        """The last `count` sessions with a final verdict: 'fenced' or 'owned'."""
        return {name: str(verdict) for name, verdict in list(self._verdicts.items())[-count:]}

    def check(self, request: str) -> None:
        """Raises `WrongState` if the state does not allow `request`."""
        if self.state not in REQUESTS[request][1]:
            raise WrongState(f"{request!r} makes no sense in state {self.state.value!r}")

    def on_lease_loss(self, role: Role) -> LeaseLoss:
        action = LEASE_LOSS.get((role, self.state), LeaseLoss.NOTHING)
        if action is LeaseLoss.ABANDON and self.owned:
            return LeaseLoss.NOTHING
        return action

    def vmm_came(self) -> None:
        """A VMM has connected: it is the owner, unless the guest is still to be committed."""
        self.vmm_connected = True
        if self.state is State.PASSTHROUGH:
            self.owner = Owner.OWNED
            self.session = ""

    def lost(self) -> None:
        """The device or the VMM has gone, and the other connection with it."""
        self.vmm_connected = False
        if self.state is State.STANDBY and not self.owned:
            self._judge(self.session, Owner.FENCED)
        self.state = State.PASSTHROUGH
        self.owner = Owner.UNOWNED

    def check_mediate(self) -> None:
        """Raises what `mediate` would, before anything is done to the device."""
        self._next(Event.MEDIATE)
        if not self.vmm_connected:
            raise NoVmm
        if not self.owned:
            raise WrongState(f"the guest is {self.owner.value!r} here, so it cannot leave")

    def mediate(self) -> None:
        self.check_mediate()
        self._go(Event.MEDIATE)

    def stop(self) -> None:
        self._go(Event.STOP)

    def restore(self) -> None:
        self._go(Event.RESTORE)

    def release(self, session: str) -> None:
        if self.state is State.RELEASED:
            self._expect(session)
            return
        self._next(Event.RELEASE)
        if not self.owned:
            raise WrongState(f"the guest is {self.owner.value!r} here and cannot be released")
        self._go(Event.RELEASE)
        self.owner, self.session = Owner.RELEASED, session

    def reclaim(self, session: str) -> None:
        self._next(Event.RECLAIM)
        self._expect(session)
        self._go(Event.RECLAIM)
        self.owner = Owner.OWNED

    def check_standby(self, session: str) -> None:
        """Raises what `standby` would, before anything is done to the device."""
        self._next(Event.STANDBY)
        self._refuse_fenced(session)
        if self._verdicts.get(session) is Owner.OWNED:
            raise WrongState("this session has owned the guest here before")

    def standby(self, session: str) -> None:
        self.check_standby(session)
        self._go(Event.STANDBY)
        self.owner, self.session = Owner.UNOWNED, session

    def own(self, session: str) -> None:
        """The commit. Asked for twice it is answered twice: the first answer may be lost."""
        if self.state is not State.STANDBY:
            raise WrongState(f"nothing can be owned in state {self.state.value!r}")
        self._refuse_fenced(session)
        self._expect(session)
        self.owner = Owner.OWNED
        self._judge(session, Owner.OWNED)

    def check_start(self) -> None:
        """Raises what `start` would, before anything is done to the device."""
        self._next(Event.START)
        if not self.owned:
            raise WrongState("the guest is not owned here: 'own' comes before 'start'")
        if not self.vmm_connected:
            raise NoVmm

    def start(self) -> None:
        self.check_start()
        self._go(Event.START)

    def fence(self, session: str) -> None:
        if self._verdicts.get(session) is Owner.OWNED:
            raise WrongState("this session owns the guest here, or has done so")
        self._judge(session, Owner.FENCED)
        if self.state is State.STANDBY and session == self.session:
            self.owner = Owner.FENCED

    def check_abandon(self) -> None:
        """Raises what `abandon` would, before anything is done to the device."""
        self._next(Event.ABANDON)
        if self.state is State.STANDBY and self.owned:
            raise WrongState("the guest is owned here: it can be started, not abandoned")

    def abandon(self) -> None:
        self.check_abandon()
        if self.state is State.STANDBY:
            self.fence(self.session)
        self._go(Event.ABANDON)

    def _next(self, event: Event) -> State:
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise WrongState(f"{event.value!r} makes no sense in state {self.state.value!r}")
        return state

    def _go(self, event: Event) -> None:
        self.state = self._next(event)

    def _expect(self, session: str) -> None:
        if session != self.session:
            raise WrongSession(f"the record here is of session {self.session!r}, not {session!r}")

    def _refuse_fenced(self, session: str) -> None:
        if self._verdicts.get(session) is Owner.FENCED:
            raise SessionFenced

    def _judge(self, session: str, verdict: Owner) -> None:
        self._verdicts[session] = verdict
        while len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
