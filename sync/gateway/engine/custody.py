"""A gateway's states, who owns the guest, and what the end of a lease does.

Sans-IO: events in, a new state or a typed error out. Not owned here: who may ask for what
(`requests`), what is done to the device on the way from one state to the next (`jobs`), and what
the states mean for a message (`relay`, `traps`).

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
session is its verdicts. Losing the lease restores a source and abandons a target
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


class CustodyState(StrEnum):
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


class ClientRole(StrEnum):
    OBSERVER = "observer"
    SOURCE = "source"
    TARGET = "target"


TRANSITIONS: dict[tuple[CustodyState, Event], CustodyState] = {
    (CustodyState.PASSTHROUGH, Event.MEDIATE): CustodyState.MEDIATED,
    (CustodyState.MEDIATED, Event.STOP): CustodyState.STOPPED,
    (CustodyState.STOPPED, Event.RELEASE): CustodyState.RELEASED,
    (CustodyState.RELEASED, Event.RECLAIM): CustodyState.STOPPED,
    (CustodyState.PASSTHROUGH, Event.RESTORE): CustodyState.PASSTHROUGH,
    (CustodyState.MEDIATED, Event.RESTORE): CustodyState.PASSTHROUGH,
    (CustodyState.STOPPED, Event.RESTORE): CustodyState.PASSTHROUGH,
    (CustodyState.PASSTHROUGH, Event.STANDBY): CustodyState.STANDBY,
    (CustodyState.STANDBY, Event.START): CustodyState.PASSTHROUGH,
    (CustodyState.PASSTHROUGH, Event.ABANDON): CustodyState.PASSTHROUGH,
    (CustodyState.STANDBY, Event.ABANDON): CustodyState.PASSTHROUGH,
}


class LeaseLoss(StrEnum):
    """What the gateway does by itself when the lease ends (I7, I8)."""

    NOTHING = "nothing"
    RESTORE = "restore"
    """Back to passthrough, then the VMM is resumed if a recovery was armed."""
    RESUME = "resume"
    """The device is in passthrough, or gone; the VMM is resumed if a recovery was armed."""
    ABANDON = "abandon"


LEASE_LOSS: dict[tuple[ClientRole, CustodyState], LeaseLoss] = {
    (ClientRole.SOURCE, CustodyState.PASSTHROUGH): LeaseLoss.RESUME,
    (ClientRole.SOURCE, CustodyState.MEDIATED): LeaseLoss.RESTORE,
    (ClientRole.SOURCE, CustodyState.STOPPED): LeaseLoss.RESTORE,
    (ClientRole.TARGET, CustodyState.STANDBY): LeaseLoss.ABANDON,
}
"""By role and state; every other case: nothing. A target that owns the guest is left alone."""


class Custody:
    """The state and the ownership record of one gateway.

    Every method that names an event of the module's diagram makes that transition or raises
    `WrongState`, `WrongSession` or `SessionFenced` and leaves everything as it was.
    """

    def __init__(self) -> None:
        self.state = CustodyState.PASSTHROUGH
        self.owner = Owner.UNOWNED
        self.session = ""
        self.vmm_connected = False
        self._verdicts: OrderedDict[str, Owner] = OrderedDict()

    @property
    def owned(self) -> bool:
        return self.owner is Owner.OWNED

    def verdicts(self, count: int) -> dict[str, Owner]:
        """The last `count` sessions with a final verdict: fenced or owned."""
        return dict(list(self._verdicts.items())[-count:])

    def check(self, states: frozenset[CustodyState], request: str) -> None:
        """Raises `WrongState` unless the state is one of `states`, which `request` needs."""
        if self.state not in states:
            raise WrongState(f"{request!r} makes no sense in state {self.state.value!r}")

    def on_lease_loss(self, role: ClientRole) -> LeaseLoss:
        action = LEASE_LOSS.get((role, self.state), LeaseLoss.NOTHING)
        if action is LeaseLoss.ABANDON and self.owned:
            return LeaseLoss.NOTHING
        return action

    def vmm_came(self) -> None:
        """A VMM has connected: it is the owner, unless the guest is still to be committed."""
        self.vmm_connected = True
        if self.state is CustodyState.PASSTHROUGH:
            self.owner = Owner.OWNED
            self.session = ""

    def lost(self) -> None:
        """The device or the VMM has gone, and the other connection with it."""
        self.vmm_connected = False
        if self.state is CustodyState.STANDBY and not self.owned:
            self._judge(self.session, Owner.FENCED)
        self.state = CustodyState.PASSTHROUGH
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

    def check_stop(self) -> None:
        """Raises what `stop` would, before anything is done to the device."""
        self._next(Event.STOP)

    def stop(self) -> None:
        self._go(Event.STOP)

    def check_restore(self) -> None:
        """Raises what `restore` would, before anything is done to the device."""
        self._next(Event.RESTORE)

    def restore(self) -> None:
        self._go(Event.RESTORE)

    def release(self, session: str) -> None:
        if self.state is CustodyState.RELEASED:
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
        if self.state is not CustodyState.STANDBY:
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
        if self.state is CustodyState.STANDBY and session == self.session:
            self.owner = Owner.FENCED

    def check_abandon(self) -> None:
        """Raises what `abandon` would, before anything is done to the device."""
        self._next(Event.ABANDON)
        if self.state is CustodyState.STANDBY and self.owned:
            raise WrongState("the guest is owned here: it can be started, not abandoned")

    def abandon(self) -> None:
        self.check_abandon()
        if self.state is CustodyState.STANDBY:
            self.fence(self.session)
        self._go(Event.ABANDON)

    def _next(self, event: Event) -> CustodyState:
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
