"""A gateway's states, who owns the guest, and what the end of a lease does.

Sans-IO: events in, a new state or a typed error out. Not owned here: who may ask for what
(`requests`), what is done to the device on the way from one state to the next (`jobs`), what the
states mean for a message (`relay`, `traps`), and how a session's fate is kept (`records`).

The transitions are the table `TRANSITIONS`, which docs/architecture.md draws.

`lost` (the device or the VMM has gone) leads to passthrough, or to released while the guest that
was here is away: so a VMM that connects does not become its owner. Losing the lease restores a
source and abandons a target (`LEASE_LOSS`), except where that would break I7: a released source
stays released, and a target that owns the guest stays in standby until somebody starts it.

The owner, beside the state:

    unowned    no VMM, or standby before `own`
    owned      a VMM connected in passthrough (no session), or `own` in standby, or `reclaim`
    released   `release`: only `reclaim` for the same session, or a guest that arrives, ends this
    fenced     the session in standby was fenced: it can never own the guest here, and the VMM that
               waited for it gets nowhere near the device (`shut`)

Every fate of a session is a record that is written down before it counts (`records`), and outlives
the gateway. `own` alone lets nothing run: `start` first writes `about-to-run`. Until then a session
may be fenced, and is, when the VMM that waited is lost.
"""

from enum import StrEnum

from sync.gateway.engine.records import (
    COMMITTED,
    FENCED,
    NO_TERMS,
    Fate,
    Records,
    SessionRecord,
    Terms,
)
from sync.gateway.errors import (
    NotProven,
    NotRecorded,
    NoVmm,
    SessionFenced,
    UnknownSession,
    WrongSession,
    WrongState,
)

_MAY_HAVE_RUN = frozenset({Fate.ABOUT_TO_RUN, Fate.RUNNING})


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
    (CustodyState.RELEASED, Event.STANDBY): CustodyState.STANDBY,
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

    Every method that names an event of `TRANSITIONS` makes that transition or raises
    `WrongState`, `WrongSession`, `SessionFenced`, `NotProven` or `NotRecorded` and leaves
    everything as it was.
    """

    def __init__(self, records: Records | None = None) -> None:
        self.records = records or Records()
        self.state = CustodyState.PASSTHROUGH
        self.owner = Owner.UNOWNED
        self.session = ""
        self.migrations = 0
        """How many have begun, of a guest that leaves or is awaited."""
        self.vmm_connected = False
        self.holds_copy = False
        """Whether the VMM that is connected is the one that let go of the guest: what it and its
        device hold is not to be disturbed, for the guest may have to go on with it."""
        self._rest()

    @property
    def owned(self) -> bool:
        return self.owner is Owner.OWNED

    @property
    def shut(self) -> bool:
        """Whether the VMM must not reach the device, though no guest is awaited: its guest has
        left, or was never to run here."""
        return self.owner in (Owner.RELEASED, Owner.FENCED)

    def check(self, states: frozenset[CustodyState], request: str) -> None:
        """Raises `WrongState` unless the state is one of `states`, which `request` needs."""
        if self.state not in states:
            raise WrongState(f"{request!r} makes no sense in state {self.state.value!r}")

    def on_lease_loss(self, role: ClientRole) -> LeaseLoss:
        action = LEASE_LOSS.get((role, self.state), LeaseLoss.NOTHING)
        if action is LeaseLoss.ABANDON and self.owned:
            return LeaseLoss.NOTHING
        return action

    def record(self, session: str) -> SessionRecord:
        """The record of `session`, or of the one in doubt. Raises `UnknownSession`."""
        found = self.records.find(session) if session else self.records.in_doubt()
        if found is None:
            raise UnknownSession(f"no session {session} is on record here" if session else "")
        return found

    def vmm_came(self) -> None:
        """A VMM has connected: it is the owner, unless the guest is still to be committed, or the
        one that was here is away."""
        self.vmm_connected = True
        if self.state is CustodyState.PASSTHROUGH:
            self.owner = Owner.OWNED
            self.session = ""

    def lost(self) -> None:
        """The device or the VMM has gone, and the other connection with it."""
        self.vmm_connected = False
        self.holds_copy = False
        if self.session:
            self.records.end(self.session)
        self._rest()

    @property
    def keeps_guest(self) -> bool:
        """Whether the guest is here, and stays when its device goes: it has not been let go of."""
        return (
            self.owned
            and self.vmm_connected
            and self.state
            in (CustodyState.PASSTHROUGH, CustodyState.MEDIATED, CustodyState.STOPPED)
        )

    def device_away(self) -> None:
        """The device has gone and is waited for: the guest stays, and does not leave now."""
        if self.session:
            self.records.end(self.session)
        self.state = CustodyState.PASSTHROUGH

    def check_mediate(self) -> None:
        """Raises what `mediate` would, before anything is done to the device."""
        self._next(Event.MEDIATE)
        if not self.vmm_connected:
            raise NoVmm
        if not self.owned:
            raise WrongState(f"the guest is {self.owner.value!r} here, so it cannot leave")

    def mediate(self, session: str = "", terms: Terms = NO_TERMS) -> None:
        self.check_mediate()
        if session:
            self._begin(session, ClientRole.SOURCE, Fate.LEAVING, terms)
        self._go(Event.MEDIATE)
        self.session = session
        self.migrations += 1

    def stands_still(self) -> None:
        """The guest that is leaving did not run when it was paused."""
        if self.records.fate(self.session) is Fate.LEAVING:
            self._settle(self.session, Fate.LEAVING, ran=False)

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
        if self.session:
            self.records.end(self.session)

    def release(self, session: str) -> None:
        if self.state is CustodyState.RELEASED:
            self._expect(session)
            return
        self._next(Event.RELEASE)
        if not self.owned:
            raise WrongState(f"the guest is {self.owner.value!r} here and cannot be released")
        fate = self.records.fate(session)
        if fate is None:
            self._begin(session, ClientRole.SOURCE, Fate.LEAVING, NO_TERMS)
        elif fate is not Fate.LEAVING:
            raise WrongState(f"session {session} is {fate.value} here: it cannot be released")
        self._settle(session, Fate.RELEASED)
        self._go(Event.RELEASE)
        self.owner, self.session = Owner.RELEASED, session
        self.holds_copy = self.vmm_connected

    def reclaim(self, session: str, proof: str | None = None) -> None:
        """`proof` is what the target's record says of the session; None: the caller released it and
        has sent no commit, or the target told it that it never will start the guest."""
        self._next(Event.RECLAIM)
        self._expect(session)
        if proof is not None and self.record(session).proved(proof) != FENCED:
            raise NotProven(f"that does not prove that session {session} is fenced at the target")
        if self.records.fate(session) is Fate.MOVED:
            raise WrongState(f"the guest has moved in session {session}")
        self._settle(session, Fate.KEPT)
        self._take_back()

    def vouch(self, session: str) -> None:
        """`reclaim` on an operator's word that the guest runs nowhere else and never will."""
        self._next(Event.RECLAIM)
        self._expect(session)
        self._settle(session, Fate.VOUCHED)
        self._take_back()

    def moved(self, session: str, proof: str | None = None) -> None:
        """The target has the guest; None: the caller has heard so itself."""
        record = self.record(session)
        if record.fate is Fate.MOVED:
            return
        if record.fate is not Fate.RELEASED:
            raise WrongState(f"session {session} is {record.fate.value} here, it was not let go of")
        if proof is not None and record.proved(proof) != COMMITTED:
            raise NotProven(f"that does not prove that the target owns session {session}")
        self._settle(session, Fate.MOVED)

    def check_standby(self, session: str) -> None:
        """Raises what `standby` would, before anything is done to the device."""
        self._next(Event.STANDBY)
        if self.holds_copy:
            raise WrongState("the VMM here had the guest before: start a new one for the next")
        self._refuse_fenced(session)
        if (fate := self.records.fate(session)) is not None:
            raise WrongState(f"session {session} is {fate.value} here: it was here before")

    def standby(self, session: str, terms: Terms = NO_TERMS) -> None:
        self.check_standby(session)
        self._begin(session, ClientRole.TARGET, Fate.STANDBY, terms)
        self._go(Event.STANDBY)
        self.owner, self.session = Owner.UNOWNED, session
        self.migrations += 1

    def own(self, session: str, *, ran: bool = True) -> None:
        """The commit of a guest that `ran` at the source. Asked for twice it is answered twice: the
        first answer may be lost."""
        if self.state is not CustodyState.STANDBY:
            raise WrongState(f"nothing can be owned in state {self.state.value!r}")
        self._refuse_fenced(session)
        self._expect(session)
        if not self.owned:
            self._settle(session, Fate.OWNED, ran=ran)
        self.owner = Owner.OWNED

    def check_start(self) -> None:
        """Raises what `start` would, before anything is done to the device."""
        self._next(Event.START)
        if not self.owned:
            raise WrongState("the guest is not owned here: 'own' comes before 'start'")
        if not self.vmm_connected:
            raise NoVmm

    def about_to_run(self) -> None:
        """From here on the guest may have run: its session is never fenced any more."""
        self.check_start()
        self._settle(self.session, Fate.ABOUT_TO_RUN)

    def start(self) -> None:
        self.about_to_run()
        self._go(Event.START)

    def running(self, session: str) -> None:
        """The guest was set running after `start`."""
        if self.records.fate(session) not in _MAY_HAVE_RUN:
            raise WrongState(f"session {session} was not started here")
        self._settle(session, Fate.RUNNING)

    def fence(self, session: str) -> None:
        record = self.records.find(session)
        if record is None:
            self._begin(session, ClientRole.TARGET, Fate.FENCED, NO_TERMS)
        elif record.role != ClientRole.TARGET:
            raise WrongState(f"session {session} was the source's here: the target is fenced")
        elif record.fate in _MAY_HAVE_RUN:
            raise WrongState(f"session {session} is {record.fate.value} here: it may have run")
        else:
            self.records.settle_at_least_here(session, Fate.FENCED)
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
            if self.records.away:
                self._rest()

    def _rest(self) -> None:
        """To the state without a session: shut, as long as the guest that was here is away."""
        away = self.records.away
        self.state = CustodyState.RELEASED if away else CustodyState.PASSTHROUGH
        self.owner = Owner.RELEASED if away else Owner.UNOWNED
        self.session = away or self.session

    def _take_back(self) -> None:
        self._go(Event.RECLAIM)
        self.owner = Owner.OWNED
        self.holds_copy = False
        if not self.vmm_connected:
            # There is no device to restore: whoever connects is the owner.
            self._rest()

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
        if self.records.fate(session) is Fate.FENCED:
            raise SessionFenced

    def _begin(self, session: str, role: ClientRole, fate: Fate, terms: Terms) -> None:
        if self.records.find(session) is not None:
            raise WrongState(f"session {session} was here before")
        try:
            self.records.begin(session, role.value, fate, terms)
        except OSError as error:
            raise NotRecorded(f"session {session} cannot be recorded: {error.strerror}") from error

    def _settle(self, session: str, fate: Fate, *, ran: bool = True) -> None:
        try:
            self.records.settle(session, fate, ran=ran)
        except OSError as error:
            raise NotRecorded(f"{fate.value!r} cannot be recorded: {error.strerror}") from error
