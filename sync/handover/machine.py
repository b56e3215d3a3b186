"""The handover of a guest from one host to another: who owns it, and who knows what, at each step.

Owns the events, the actions and the transitions of both roles. Does no I/O: the caller feeds
events, executes the actions that come back in their order, and reports what became of them as
further events. It knows no socket, gateway, device or VMM.

It is a two-phase commit between two parties, whose durable state is the ownership record of the
gateway on each side (docs/architecture.md, "Who owns the guest"). This is how it goes well, with
the actions in brackets; the tables below say where else an event leads:

    SOURCE                                          TARGET
    IDLE                                            IDLE
     | START                                         | START
    PREPARING       [PREPARE]     hello ------->    LISTENING
     |                                               | PEER_HELLO
     |                                              CHECKING          [CHECK]
     |                                               | CHECKED
     |                                              ENTERING_STANDBY  [ENTER_STANDBY]
     |                                               | STOOD_BY
     | PREPARED                   <---- prepared    RECEIVING         [SEND_PREPARED]
    MEDIATING       [MEDIATE]                        |
     | MEDIATED                                      |
    PRECOPY         [RUN_ROUNDS]  pages, state -->   |
     | CONVERGED                                     |
    PAUSING         [PAUSE_VMM]                      |
     | PAUSED                                        |
    STOPPING        [STOP_DEVICES]                   |
     | STOPPED                                       |
    FINALIZING      [SEND_FINAL]  pages, state -->   |
     | FINAL_SENT                                    |
    VERIFYING       [VERIFY]      <--- digests --->  |
     | VERIFIED                                      |
    AWAITING_READY  [ASK_READY]   ask --------->     | PEER_ASKS
     |                                              READYING          [MAKE_READY]
     |                                               | MADE_READY
     | PEER_READY                 <------- ready    READY             [SEND_READY]
    RELEASING       [RELEASE]                        |
     | RELEASED                                      |
    COMMITTING      [SEND_COMMIT] commit ------>     | PEER_COMMIT
     |                                              OWNING            [OWN]
     |                                               | OWNED
     |                                              STARTING_GUEST    [START_GUEST]
     |                                               | STARTED
     | PEER_COMMITTED             <--- committed    COMMITTED         [SEND_COMMITTED]
    COMMITTED       [CONCLUDE]

    A check compares both sides and ends there:
    PREPARING       [PREPARE]     check ------->    LISTENING
     |                                               | PEER_CHECKS
     |                                              CHECKING_ONLY     [CHECK]
     |                                               | CHECKED
     | CHECKED                    <----- checked    ANSWERING         [ANSWER_CHECK]
    CHECKED                                          | ANSWERED
                                                    CHECKED

Both machines rely on a link that keeps the order of messages and loses none but by breaking.

What the caller has to keep to:

- Actions are executed in the order given. Those named `TELL_...` and `SEND_COMMITTED` are done as
  well as possible: they neither block what follows nor report a failure.
- When a transition leaves a state whose action is still running, that action is cancelled and
  waited for, and its outcome is not reported. (If it is all the same, the tables ignore it.)
- `TIMEOUT` is reported when `deadline_s` seconds have passed since the state was entered.
- After a `RemoteProtocolError` the link is closed and `PEER_LOST` reported.
"""

from collections.abc import Iterable, Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import NamedTuple

from sync.errors import SyncError
from sync.handover.states import TERMINAL, Deadlines, HandoverState, Role


class HandoverError(SyncError):
    """An event came that the state does not allow. The state is as it was before."""


class LocalProtocolError(HandoverError):
    """The event is of our own making: the caller does not keep to the protocol."""

    exit_name = "internal"


class RemoteProtocolError(HandoverError):
    """The event is the peer's: the peer does not keep to the protocol."""

    exit_name = "peer_protocol"


class Event(Enum):
    """What happened. `PEER_...` (but for `PEER_LOST`) are messages that the peer sent."""

    START = auto()
    # the action of the state is done
    PREPARED = auto()
    MEDIATED = auto()
    CONVERGED = auto()
    PAUSED = auto()
    STOPPED = auto()
    FINAL_SENT = auto()
    VERIFIED = auto()
    RELEASED = auto()
    RESTORED = auto()
    CHECKED = auto()
    ANSWERED = auto()
    STOOD_BY = auto()
    MADE_READY = auto()
    OWNED = auto()
    STARTED = auto()
    FENCED = auto()
    # it is not
    FAILED = auto()
    """The action of the state failed, or something that it needs is gone."""
    RESTORE_FAILED = auto()
    FENCE_FAILED = auto()
    MAY_HAVE_RUN = auto()
    """The gateway refused to fence the session: it is on record that the guest may have run."""
    TIMEOUT = auto()
    INTERRUPTED = auto()
    """The user wants it to end (Ctrl-C, SIGTERM, SIGHUP)."""
    PEER_LOST = auto()
    # messages
    PEER_HELLO = auto()
    PEER_CHECKS = auto()
    PEER_ASKS = auto()
    PEER_READY = auto()
    PEER_COMMIT = auto()
    PEER_COMMITTED = auto()
    PEER_START_FAILED = auto()
    PEER_ABORTED = auto()
    """From the target: it is fenced, or never asked for the guest, and will never start it.
    From the source: it sent no commit, and resumes."""


FROM_PEER = frozenset(
    event for event in Event if event.name.startswith("PEER_") and event is not Event.PEER_LOST
)


class Action(Enum):
    """What the caller has to do, and the event that reports it done."""

    PREPARE = auto()
    """Greet the target, compare versions, identities and layouts; touch nothing. `PREPARED` when
    the target says that it stands by, `CHECKED` when no more than a check was asked for."""
    MEDIATE = auto()
    """Devices to mediated state, trackers on, register snapshots taken. `MEDIATED`."""
    RUN_ROUNDS = auto()
    """Pre-copy until the convergence policy says switch. `CONVERGED`; giving up is `FAILED`."""
    PAUSE_VMM = auto()
    """`PAUSED` when no vCPU runs."""
    STOP_DEVICES = auto()
    """`STOPPED` when no device can write guest memory any more."""
    SEND_FINAL = auto()
    """Last pages, registers and VMM state. `FINAL_SENT` when the target has applied them."""
    VERIFY = auto()
    """`VERIFIED` when memory and registers are proven equal."""
    ASK_READY = auto()
    """Send *ask*; the answer is `PEER_READY`."""
    RELEASE = auto()
    """Ownership record to `released`. `RELEASED`."""
    SEND_COMMIT = auto()
    """Send *commit*. Failing counts as not knowing whether it arrived."""
    NOTE_MOVED = auto()
    """Put on record that the commit was answered: nothing takes the guest back any more."""
    CONCLUDE = auto()
    """Report what the migration cost, and end the VMM here if that is wanted."""
    TELL_ABORT = auto()
    """Send *aborted*, as well as possible."""
    RESTORE = auto()
    """Reclaim where the record says `released`, undo whatever was done, resume the guest:
    `RESTORED` when it runs with its devices in passthrough, or `RESTORE_FAILED`."""
    CHECK = auto()
    """Judge the source's greeting against what is here; touch nothing. `CHECKED`."""
    ANSWER_CHECK = auto()
    """Tell the source that it would work, and help it to measure. `ANSWERED` when it has left."""
    ENTER_STANDBY = auto()
    """Gateways to standby, room for memory and VMM. `STOOD_BY`."""
    SEND_PREPARED = auto()
    """Tell the source; from now on apply what it sends."""
    MAKE_READY = auto()
    """Complete device and VMM state; all that may fail without harm. `MADE_READY`."""
    SEND_READY = auto()
    """Send *ready*."""
    OWN = auto()
    """Ownership record to `owned`. `OWNED`."""
    START_GUEST = auto()
    """Put on record that the guest may run; then devices to passthrough, held register writes
    executed, guest running. `STARTED`."""
    SEND_COMMITTED = auto()
    """Send *committed*, as well as possible."""
    TELL_START_FAILED = auto()
    """Send *start failed*, as well as possible."""
    FENCE = auto()
    """Ownership record to `fenced`, then standby abandoned: `FENCED`; `FENCE_FAILED`; or
    `MAY_HAVE_RUN` when the record says that the guest was about to run."""


class Transition(NamedTuple):
    """What an event does in a state. An event that is ignored leads back without actions."""

    state: HandoverState
    actions: tuple[Action, ...] = ()


Row = Mapping[Event, Transition]
Table = Mapping[HandoverState, Row]

_S, _E, _A = HandoverState, Event, Action

_WRONG = (_E.FAILED, _E.PEER_LOST, _E.TIMEOUT, _E.INTERRUPTED, _E.PEER_ABORTED)


def _on(events: Iterable[Event], state: HandoverState, *actions: Action) -> dict[Event, Transition]:
    return {event: Transition(state, actions) for event in events}


def _abort() -> dict[Event, Transition]:
    return _on(_WRONG, _S.ABORTING, _A.TELL_ABORT, _A.RESTORE)


def _fence() -> dict[Event, Transition]:
    return _on(_WRONG, _S.FENCING, _A.FENCE)


def _turn_away() -> dict[Event, Transition]:
    return _on(_WRONG, _S.ABORTED, _A.TELL_ABORT)


# What may still arrive when the side has turned to aborting: outcomes of the action that was
# cancelled, and messages that the peer sent before it knew.
_SOURCE_LATE = (
    *_WRONG,
    _E.PREPARED,
    _E.CHECKED,
    _E.MEDIATED,
    _E.CONVERGED,
    _E.PAUSED,
    _E.STOPPED,
    _E.FINAL_SENT,
    _E.VERIFIED,
    _E.RELEASED,
    _E.PEER_READY,
)
_TARGET_LATE = (
    *_WRONG,
    _E.CHECKED,
    _E.ANSWERED,
    _E.STOOD_BY,
    _E.MADE_READY,
    _E.OWNED,
    _E.PEER_ASKS,
    _E.PEER_COMMIT,
)

SOURCE: Table = {
    _S.IDLE: _on([_E.START], _S.PREPARING, _A.PREPARE),
    _S.PREPARING: (
        _on([_E.PREPARED], _S.MEDIATING, _A.MEDIATE) | _on([_E.CHECKED], _S.CHECKED) | _abort()
    ),
    _S.MEDIATING: _on([_E.MEDIATED], _S.PRECOPY, _A.RUN_ROUNDS) | _abort(),
    _S.PRECOPY: _on([_E.CONVERGED], _S.PAUSING, _A.PAUSE_VMM) | _abort(),
    _S.PAUSING: _on([_E.PAUSED], _S.STOPPING, _A.STOP_DEVICES) | _abort(),
    _S.STOPPING: _on([_E.STOPPED], _S.FINALIZING, _A.SEND_FINAL) | _abort(),
    _S.FINALIZING: _on([_E.FINAL_SENT], _S.VERIFYING, _A.VERIFY) | _abort(),
    _S.VERIFYING: _on([_E.VERIFIED], _S.AWAITING_READY, _A.ASK_READY) | _abort(),
    _S.AWAITING_READY: _on([_E.PEER_READY], _S.RELEASING, _A.RELEASE) | _abort(),
    _S.RELEASING: _on([_E.RELEASED], _S.COMMITTING, _A.SEND_COMMIT) | _abort(),
    _S.COMMITTING: (
        _on([_E.PEER_COMMITTED], _S.COMMITTED, _A.NOTE_MOVED, _A.CONCLUDE)
        | _on([_E.PEER_START_FAILED], _S.OWNER_FAILED, _A.NOTE_MOVED)
        | _on([_E.PEER_ABORTED], _S.ABORTING, _A.TELL_ABORT, _A.RESTORE)
        | _on([_E.FAILED, _E.PEER_LOST, _E.TIMEOUT], _S.IN_DOUBT)
        | _on([_E.INTERRUPTED], _S.COMMITTING)
    ),
    _S.ABORTING: (
        _on(_SOURCE_LATE, _S.ABORTING)
        | _on([_E.RESTORED], _S.ABORTED)
        | _on([_E.RESTORE_FAILED, _E.TIMEOUT], _S.BROKEN)
    ),
    _S.COMMITTED: _on([_E.FAILED, _E.PEER_LOST, _E.TIMEOUT, _E.INTERRUPTED], _S.COMMITTED),
    _S.OWNER_FAILED: _on([_E.FAILED, _E.PEER_LOST, _E.TIMEOUT, _E.INTERRUPTED], _S.OWNER_FAILED),
    _S.IN_DOUBT: _on(
        [*_WRONG, _E.PEER_COMMITTED, _E.PEER_START_FAILED],
        _S.IN_DOUBT,
    ),
    _S.ABORTED: _on(_SOURCE_LATE, _S.ABORTED),
    _S.CHECKED: _on(_WRONG, _S.CHECKED),
    _S.BROKEN: _on([*_SOURCE_LATE, _E.RESTORED, _E.RESTORE_FAILED], _S.BROKEN),
}
"""Every transition of the source."""

TARGET: Table = {
    _S.IDLE: _on([_E.START], _S.LISTENING),
    _S.LISTENING: (
        _on([_E.PEER_HELLO], _S.CHECKING, _A.CHECK)
        | _on([_E.PEER_CHECKS], _S.CHECKING_ONLY, _A.CHECK)
        | _on([_E.FAILED, _E.PEER_LOST, _E.TIMEOUT, _E.INTERRUPTED], _S.ABORTED)
    ),
    _S.CHECKING: _on([_E.CHECKED], _S.ENTERING_STANDBY, _A.ENTER_STANDBY) | _fence(),
    _S.CHECKING_ONLY: _on([_E.CHECKED], _S.ANSWERING, _A.ANSWER_CHECK) | _turn_away(),
    _S.ANSWERING: _on([_E.ANSWERED], _S.CHECKED) | _turn_away(),
    _S.ENTERING_STANDBY: _on([_E.STOOD_BY], _S.RECEIVING, _A.SEND_PREPARED) | _fence(),
    _S.RECEIVING: _on([_E.PEER_ASKS], _S.READYING, _A.MAKE_READY) | _fence(),
    _S.READYING: _on([_E.MADE_READY], _S.READY, _A.SEND_READY) | _fence(),
    _S.READY: _on([_E.PEER_COMMIT], _S.OWNING, _A.OWN) | _fence(),
    _S.OWNING: (
        _on([_E.OWNED], _S.STARTING_GUEST, _A.START_GUEST)
        | _on([_E.FAILED, _E.TIMEOUT], _S.DISOWNING, _A.FENCE)
        | _on([_E.PEER_LOST, _E.INTERRUPTED], _S.OWNING)
    ),
    _S.DISOWNING: (
        _on([_E.FENCED], _S.ABORTED, _A.TELL_ABORT)
        | _on([_E.MAY_HAVE_RUN], _S.OWNER_FAILED, _A.TELL_START_FAILED)
        | _on([_E.FENCE_FAILED, _E.TIMEOUT], _S.IN_DOUBT)
        | _on([_E.OWNED, _E.STARTED, _E.FAILED, _E.PEER_LOST, _E.INTERRUPTED], _S.DISOWNING)
    ),
    _S.STARTING_GUEST: (
        _on([_E.STARTED], _S.COMMITTED, _A.SEND_COMMITTED)
        | _on([_E.FAILED, _E.TIMEOUT], _S.DISOWNING, _A.FENCE)
        | _on([_E.PEER_LOST, _E.INTERRUPTED], _S.STARTING_GUEST)
    ),
    _S.FENCING: (
        _on(_TARGET_LATE, _S.FENCING)
        | _on([_E.FENCED], _S.ABORTED, _A.TELL_ABORT)
        | _on([_E.FENCE_FAILED, _E.TIMEOUT], _S.BROKEN, _A.TELL_ABORT)
    ),
    _S.COMMITTED: _on([_E.FAILED, _E.PEER_LOST, _E.TIMEOUT, _E.INTERRUPTED], _S.COMMITTED),
    _S.OWNER_FAILED: _on(
        [_E.STARTED, _E.FAILED, _E.PEER_LOST, _E.TIMEOUT, _E.INTERRUPTED], _S.OWNER_FAILED
    ),
    _S.IN_DOUBT: _on(
        [*_WRONG, _E.OWNED, _E.STARTED, _E.FENCED, _E.FENCE_FAILED, _E.MAY_HAVE_RUN], _S.IN_DOUBT
    ),
    _S.ABORTED: _on([*_TARGET_LATE, _E.PEER_HELLO, _E.PEER_CHECKS], _S.ABORTED),
    _S.CHECKED: _on(_WRONG, _S.CHECKED),
    _S.BROKEN: _on([*_TARGET_LATE, _E.FENCED, _E.FENCE_FAILED], _S.BROKEN),
}
"""Every transition of the target."""

TABLES: Mapping[Role, Table] = MappingProxyType({Role.SOURCE: SOURCE, Role.TARGET: TARGET})


class Handover:
    """One side of one handover. `cause` is the event that turned it from its course, if any."""

    def __init__(self, role: Role, deadlines: Deadlines | None = None) -> None:
        self.role = role
        self.state = HandoverState.IDLE
        self.cause: Event | None = None
        self._deadlines = deadlines or Deadlines()
        self._table = TABLES[role]

    @property
    def terminal(self) -> bool:
        """Whether this side of the handover has come to its end."""
        return self.state in TERMINAL

    @property
    def deadline_s(self) -> float | None:
        """Seconds after the state was entered when `TIMEOUT` is due; `None` if never."""
        return self._deadlines.of(self.state)

    def handle(self, event: Event) -> tuple[Action, ...]:
        """Make the transition for `event` and return what to do, in order.

        Raises `LocalProtocolError` or `RemoteProtocolError`, depending on who made the event, if
        the state does not allow it; the state then stays as it is.
        """
        transition = self._table[self.state].get(event)
        if transition is None:
            fault = RemoteProtocolError if event in FROM_PEER else LocalProtocolError
            raise fault(
                f"{event.name} is not legal for a {self.role.value} that is {self.state.value}"
            )
        if transition.state is not self.state and event in _TURNS and self.cause is None:
            self.cause = event
        self.state = transition.state
        return transition.actions


_TURNS = frozenset({*_WRONG, Event.RESTORE_FAILED, Event.FENCE_FAILED, Event.PEER_START_FAILED})
