"""How a session begins and ends, for both roles: a table of states, events and actions.

Owns what may happen when. Pure: events and the time in, actions out; sockets are `connector`'s and
`router`'s, what is said in an open session is `channels`'s. docs/architecture.md draws the tables.

From OPENING or GREETED on, a lost connection, silence or BYE ends the session; before, a sender
whose connection ends goes on calling until its time is up: no session is lost yet, and it may
have greeted a receiver that gives way to the next one. While the session is held, a lost link is
made anew instead.

An event that its state does not list is a fault: of the peer, `RecordError`, if the peer can cause
it, else of this side, `RuntimeError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import Final, NamedTuple

from transport.wire.errors import RecordError


class State(Enum):
    """How far a session is."""

    CALLING = "calling"
    """Sender: no connection yet."""
    UNSUITED = "calling somebody unsuited"
    """Sender: somebody is there, who does not agree on ZMTP or on the secret."""
    GREETING = "greeting"
    """Sender: HELLO was sent on a connection, which may have ended since; nothing was heard."""
    HEARD = "waiting for the verdict"
    """Sender: the receiver is alive and has not answered HELLO."""
    OPENING = "opening its lanes"
    """Sender: accepted; the tunnel is not welcome yet."""
    LISTENING = "listening"
    """Receiver: no session."""
    GREETED = "greeted"
    """Receiver: the user has to answer a HELLO."""
    ACCEPTING = "accepting"
    """Receiver: the user has accepted; the answer has not gone out."""
    REFUSING = "refusing"
    """Receiver: the user has refused; the answer has not gone out."""
    OPEN = "open"
    """Both: everything may be said."""
    HELD = "open and held"
    """Both: as OPEN, but a lost link is made anew."""
    LOST = "without a link"
    """Both: the link is lost. The sender calls again, the receiver waits for that."""
    RESUMING = "resuming"
    """Sender: RESUME was sent on a new link."""
    REJOINING = "joining its lanes again"
    """Sender: the receiver goes on with the session; tunnel or lanes are not welcome yet."""
    ENDED = "at its end"
    """Both: nothing is said any more."""


class Event(Enum):
    """What happens to a session; those of `FROM_PEER` are brought about by the peer."""

    CONNECTED = auto()
    """Sender: the control connection speaks ZMTP."""
    UNSUITED = auto()
    """Sender: a connection did not come to speak ZMTP, or found another secret."""
    TUNNEL_CONNECTED = auto()
    """Sender: a connection of the tunnel speaks ZMTP."""
    TUNNEL_LOST = auto()
    """Sender: a connection of the tunnel has ended."""
    LANE_LOST = auto()
    """Receiver: a connection of the tunnel or of a data lane has ended."""
    TUNNEL_WELCOME = auto()
    """Sender: LANE_WELCOME on the tunnel."""
    LANE_HELLO = auto()
    """Receiver: LANE_HELLO of the tunnel or of a data lane."""
    CONNECTION_LOST = auto()
    """A connection that the session cannot be without has ended."""
    LOSS = auto()
    """The link does not work: a connection of it ended, and nothing that is queued says more."""
    HOLD = auto()
    """Sender: from here on a lost link is made anew."""
    TOLD_HOLD = auto()
    """Receiver: HOLD, which says so."""
    RELEASE = auto()
    """Sender: from here on a lost link ends the session."""
    TOLD_RELEASE = auto()
    """Receiver: HOLD, which says so."""
    STALLED = auto()
    """Sender: an attempt to make the link anew has had its time."""
    RESUME = auto()
    """Receiver: a valid RESUME, on a newer link than the present one."""
    RESUME_OF_OTHER = auto()
    """Receiver: RESUME of a session that is not the present one."""
    RESUMED = auto()
    """Sender: RESUMED, which is valid."""
    FORGOTTEN = auto()
    """Sender: FORGOTTEN: the receiver does not know the session."""
    REJOINED = auto()
    """Sender: tunnel and lanes are welcome on the new link."""
    HELLO = auto()
    """Receiver: a valid HELLO of a session that is not the present one."""
    HELLO_AGAIN = auto()
    """Receiver: the present session's HELLO, once more: a sender whose connection ended while it
    greeted does not know whether libzmq still had it."""
    HELLO_OF_OTHER_VERSION = auto()
    """Receiver: a HELLO of another version of the protocol."""
    ACCEPTED = auto()
    """Sender: HELLO_REPLY accepts."""
    REFUSED = auto()
    """Sender: HELLO_REPLY refuses."""
    BUSY = auto()
    """Sender: HELLO_REPLY says that there is another session."""
    ALIVE = auto()
    """PING or PONG."""
    CHANNEL = auto()
    """Any other message of the control lane: records, credit, memory attached."""
    LANE = auto()
    """Any other message of the tunnel or of a data lane."""
    FAREWELL = auto()
    """BYE."""
    ACCEPT = auto()
    """Receiver: the user takes the session."""
    REFUSE = auto()
    """Receiver: the user turns the session away."""
    ANSWERED = auto()
    """Receiver: the user's answer has been handed to the connection."""
    TIMEOUT = auto()
    """The state's deadline has passed."""
    SILENCE = auto()
    """The peer has been silent for too long."""
    LEAVE = auto()
    """The user is done, and what was queued has arrived or had its time."""
    FAIL = auto()
    """This side ends the session for an error, of the peer or its own."""


FROM_PEER: Final = frozenset(
    {
        Event.TUNNEL_WELCOME,
        Event.LANE_HELLO,
        Event.HELLO,
        Event.HELLO_AGAIN,
        Event.HELLO_OF_OTHER_VERSION,
        Event.TOLD_HOLD,
        Event.TOLD_RELEASE,
        Event.RESUME,
        Event.RESUME_OF_OTHER,
        Event.RESUMED,
        Event.FORGOTTEN,
        Event.ACCEPTED,
        Event.REFUSED,
        Event.BUSY,
        Event.ALIVE,
        Event.CHANNEL,
        Event.LANE,
        Event.FAREWELL,
    }
)


class Action(Enum):
    """What the owner of the sockets has to do. An `END_...` raises the session's error."""

    SEND_HELLO = auto()
    """Send HELLO on the control connection."""
    OPEN_TUNNEL = auto()
    """Connect the tunnel, and heed what the receiver announced."""
    SEND_LANE_HELLO = auto()
    """Send LANE_HELLO on the tunnel."""
    WELCOME_LANE = auto()
    """Keep the lane's connection whoever else comes, and send LANE_WELCOME on it."""
    TELL_HELLO = auto()
    """The sender of this HELLO is the session from now on; tell the user."""
    SEND_ANSWER = auto()
    """Send the user's answer as HELLO_REPLY, before anything else: `ANSWERED`."""
    TELL_OPEN = auto()
    """Let the user talk."""
    FORGET = auto()
    """There is no session any more; tell the user."""
    ANSWER_BUSY = auto()
    """Send the stranger a HELLO_REPLY that says so."""
    ANSWER_OTHER_VERSION = auto()
    """Send the stranger a HELLO_REPLY that says so."""
    SUSPECT_LOSS = auto()
    """`LOSS` soon, unless what is still queued says more."""
    SAY_HOLD = auto()
    """Send HOLD, with how long a lost link is waited for."""
    SAY_RELEASE = auto()
    """Send HOLD, with no time at all."""
    DROP_LINK = auto()
    """Heed nothing of the present link any more, and tell the user that it is lost."""
    CALL_AGAIN = auto()
    """Give up the connections there are, and connect on a link of the next number."""
    SEND_RESUME = auto()
    """Send RESUME on the new control connection."""
    REJOIN = auto()
    """Send again what the receiver lacks; connect the tunnel, and let the lanes do so."""
    TAKE_OVER = auto()
    """Drop the present link for that of the RESUME, send again what the sender lacks, answer
    RESUMED."""
    TELL_RESUMED = auto()
    """Tell the user that the session goes on."""
    ANSWER_FORGOTTEN = auto()
    """Send the stranger FORGOTTEN."""
    SAY_FAREWELL = auto()
    """Send BYE, as well as possible."""
    END_NOBODY = auto()
    """PeerUnreachable: nobody is there."""
    END_UNSUITED = auto()
    """PeerUnreachable: no connection came about."""
    END_MUTE = auto()
    """PeerUnreachable: HELLO was not answered."""
    END_BUSY = auto()
    """PeerUnreachable: the receiver has another session."""
    END_REFUSED = auto()
    """PeerRefused."""
    END_UNDECIDED = auto()
    """PeerLost: the receiver lives and does not decide."""
    END_SHUT_OUT = auto()
    """PeerLost: the receiver accepts no further connections."""
    END_LOST = auto()
    """PeerLost: the link does not work, or the peer is silent."""
    END_NOT_RESUMED = auto()
    """PeerLost: the lost link did not come back in time."""
    END_FORGOTTEN = auto()
    """PeerLost: the receiver does not know the session."""
    END_CLOSED = auto()
    """PeerClosed."""


class Transition(NamedTuple):
    """What an event does in a state. An event that is ignored leads back without actions."""

    state: State
    actions: tuple[Action, ...] = ()
    goes_on: bool = False
    """Whether the time that is allowed goes on, though the state has one of its own."""


Row = Mapping[Event, Transition]
Table = Mapping[State, Row]

_S, _E, _A = State, Event, Action


def _on(events: Iterable[Event], state: State, *actions: Action) -> dict[Event, Transition]:
    return {event: Transition(state, actions) for event in events}


def _call(own: State, end: Action, *farewell: Action) -> dict[Event, Transition]:
    """What is common to the states of a sender that has heard nothing: connections may fail."""
    return (
        _on([_E.CONNECTED], _S.GREETING, _A.SEND_HELLO)
        # A loss may be suspected of the connection before this one.
        | _on([_E.UNSUITED, _E.CONNECTION_LOST, _E.LOSS], own)
        | _on([_E.TIMEOUT], _S.ENDED, end)
        | _on([_E.LEAVE, _E.FAIL], _S.ENDED, *farewell)
    )


def _verdict() -> dict[Event, Transition]:
    return (
        _on([_E.ACCEPTED], _S.OPENING, _A.OPEN_TUNNEL, _A.TELL_OPEN)
        | _on([_E.REFUSED], _S.ENDED, _A.END_REFUSED)
        | _on([_E.BUSY], _S.ENDED, _A.END_BUSY)
        | _on([_E.FAREWELL], _S.ENDED, _A.END_CLOSED)
        | _on([_E.ALIVE], _S.HEARD)
    )


def _live(own: State, *farewell: Action) -> dict[Event, Transition]:
    """What is common to the states in which the peer is known: its end is the session's."""
    return (
        _on([_E.ALIVE], own)
        | _on([_E.CONNECTION_LOST], own, _A.SUSPECT_LOSS)
        | _on([_E.FAREWELL], _S.ENDED, _A.END_CLOSED)
        | _on([_E.SILENCE, _E.LOSS], _S.ENDED, _A.END_LOST)
        | _on([_E.LEAVE, _E.FAIL], _S.ENDED, *farewell)
    )


def _open(own: State) -> dict[Event, Transition]:
    """What is common to a sender's states in which everything may be said."""
    return (
        _live(own, _A.SAY_FAREWELL)
        | _reachable(own)
        | _on([_E.CHANNEL, _E.LANE, _E.TUNNEL_CONNECTED, _E.TUNNEL_WELCOME], own)
        | _on([_E.TUNNEL_LOST], own, _A.SUSPECT_LOSS)
        | _on([_E.HOLD], _S.HELD, *([_A.SAY_HOLD] if own is _S.OPEN else []))
        | _on([_E.RELEASE], _S.OPEN, *([_A.SAY_RELEASE] if own is _S.HELD else []))
    )


def _again(own: State) -> dict[Event, Transition]:
    """What is common to a sender's states without a link that works: it calls until its time is
    up, or its user cannot wait any more."""
    call = Transition(_S.LOST, (_A.CALL_AGAIN,), goes_on=True)
    return (
        dict.fromkeys([_E.LOSS, _E.STALLED], call)
        | _on([_E.CONNECTION_LOST, _E.TUNNEL_LOST], own, _A.SUSPECT_LOSS)
        | _reachable(own)
        | _on([_E.HOLD], own)
        | _on([_E.TIMEOUT, _E.RELEASE], _S.ENDED, _A.END_NOT_RESUMED)
        | _on([_E.LEAVE, _E.FAIL], _S.ENDED)
    )


def _taken(own: State) -> dict[Event, Transition]:
    """What is common to a receiver's states in which everything may be said."""
    return (
        _live(own, _A.SAY_FAREWELL)
        | _strangers(own)
        | _on([_E.CHANNEL, _E.LANE], own)
        | _on([_E.LANE_HELLO], own, _A.WELCOME_LANE)
        | _on([_E.LANE_LOST], own, *([_A.SUSPECT_LOSS] if own is _S.HELD else []))
        | _on([_E.TOLD_HOLD], _S.HELD)
        | _on([_E.TOLD_RELEASE], _S.OPEN)
    )


def _reachable(own: State) -> dict[Event, Transition]:
    """A sender's connections that libzmq makes anew: their loss has been reported already."""
    return _on([_E.CONNECTED, _E.UNSUITED], own)


def _strangers(own: State) -> dict[Event, Transition]:
    return (
        _on([_E.HELLO], own, _A.ANSWER_BUSY)
        | _on([_E.HELLO_OF_OTHER_VERSION], own, _A.ANSWER_OTHER_VERSION)
        | _on([_E.HELLO_AGAIN], own)
        | _on([_E.RESUME_OF_OTHER], own, _A.ANSWER_FORGOTTEN)
    )


SENDER: Final[Table] = {
    _S.CALLING: _call(_S.CALLING, _A.END_NOBODY) | _on([_E.UNSUITED], _S.UNSUITED),
    _S.UNSUITED: _call(_S.UNSUITED, _A.END_UNSUITED),
    _S.GREETING: _call(_S.GREETING, _A.END_MUTE, _A.SAY_FAREWELL) | _verdict(),
    _S.HEARD: (
        _live(_S.HEARD, _A.SAY_FAREWELL)
        | _verdict()
        | _on([_E.UNSUITED], _S.HEARD)
        | _on([_E.CONNECTED], _S.GREETING, _A.SEND_HELLO)
        | _on([_E.LOSS], _S.CALLING)
        | _on([_E.TIMEOUT], _S.ENDED, _A.END_UNDECIDED)
    ),
    _S.OPENING: (
        _live(_S.OPENING, _A.SAY_FAREWELL)
        | _reachable(_S.OPENING)
        | _on([_E.CHANNEL], _S.OPENING)
        | _on([_E.TUNNEL_CONNECTED], _S.OPENING, _A.SEND_LANE_HELLO)
        # The receiver may have taken it for a stranger's: libzmq makes another one.
        | _on([_E.TUNNEL_LOST], _S.OPENING)
        | _on([_E.TUNNEL_WELCOME], _S.OPEN)
        | _on([_E.TIMEOUT], _S.ENDED, _A.END_SHUT_OUT)
    ),
    _S.OPEN: _open(_S.OPEN),
    _S.HELD: (_open(_S.HELD) | _on([_E.LOSS, _E.SILENCE], _S.LOST, _A.DROP_LINK, _A.CALL_AGAIN)),
    _S.LOST: (
        _again(_S.LOST)
        # Nobody may be there yet.
        | _on([_E.CONNECTION_LOST], _S.LOST)
        | _on([_E.CONNECTED], _S.RESUMING, _A.SEND_RESUME)
    ),
    _S.RESUMING: (
        _again(_S.RESUMING)
        | _on([_E.RESUMED], _S.REJOINING, _A.REJOIN)
        | _on([_E.FORGOTTEN], _S.ENDED, _A.END_FORGOTTEN)
    ),
    _S.REJOINING: (
        _again(_S.REJOINING)
        | {_E.SILENCE: Transition(_S.LOST, (_A.CALL_AGAIN,), goes_on=True)}
        | _on([_E.ALIVE, _E.CHANNEL, _E.LANE, _E.TUNNEL_WELCOME], _S.REJOINING)
        | _on([_E.TUNNEL_CONNECTED], _S.REJOINING, _A.SEND_LANE_HELLO)
        | _on([_E.TUNNEL_LOST], _S.REJOINING)
        | _on([_E.FAREWELL], _S.ENDED, _A.END_CLOSED)
        | _on([_E.REJOINED], _S.HELD, _A.TELL_RESUMED)
    ),
    _S.ENDED: _on([_E.FAIL], _S.ENDED),
}
"""Every transition of the sender."""

RECEIVER: Final[Table] = {
    _S.LISTENING: (
        _on([_E.HELLO], _S.GREETED, _A.TELL_HELLO)
        | _on([_E.HELLO_OF_OTHER_VERSION], _S.LISTENING, _A.ANSWER_OTHER_VERSION)
        | _on([_E.RESUME_OF_OTHER], _S.LISTENING, _A.ANSWER_FORGOTTEN)
        | _on([_E.LEAVE, _E.FAIL], _S.ENDED)
    ),
    _S.GREETED: (
        _live(_S.GREETED)
        | _strangers(_S.GREETED)
        | _on([_E.ACCEPT], _S.ACCEPTING, _A.SEND_ANSWER)
        | _on([_E.REFUSE], _S.REFUSING, _A.SEND_ANSWER)
    ),
    _S.ACCEPTING: (
        _live(_S.ACCEPTING) | _strangers(_S.ACCEPTING) | _on([_E.ANSWERED], _S.OPEN, _A.TELL_OPEN)
    ),
    _S.REFUSING: (
        _live(_S.REFUSING) | _strangers(_S.REFUSING) | _on([_E.ANSWERED], _S.LISTENING, _A.FORGET)
    ),
    _S.OPEN: _taken(_S.OPEN),
    _S.HELD: (
        _taken(_S.HELD)
        | _on([_E.LOSS, _E.SILENCE], _S.LOST, _A.DROP_LINK)
        # The sender may have noticed alone.
        | _on([_E.RESUME], _S.HELD, _A.DROP_LINK, _A.TAKE_OVER, _A.TELL_RESUMED)
    ),
    _S.LOST: (
        _strangers(_S.LOST)
        | _on([_E.CONNECTION_LOST, _E.LANE_LOST], _S.LOST)
        | _on([_E.RESUME], _S.HELD, _A.TAKE_OVER, _A.TELL_RESUMED)
        | _on([_E.TIMEOUT], _S.ENDED, _A.END_NOT_RESUMED)
        | _on([_E.LEAVE, _E.FAIL], _S.ENDED)
    ),
    # A user who answers does not know yet that there is nobody to hear it.
    _S.ENDED: _on([_E.ACCEPT, _E.REFUSE, _E.FAIL], _S.ENDED),
}
"""Every transition of the receiver."""


class Greeting:
    """One side of one session's beginning and end. Not thread-safe."""

    def __init__(
        self, table: Table, state: State, timeouts_s: Mapping[State, float], now: float
    ) -> None:
        """Of `SENDER` from CALLING on, or of `RECEIVER` from LISTENING on. `timeouts_s` of a state
        counts from when it is entered; one without goes on with that of the state before. `now`:
        monotonic seconds, as below."""
        self._table = table
        self._timeouts_s = timeouts_s
        self._deadline = float("inf")
        self._enter(state, now)

    @property
    def state(self) -> State:
        """How far the session is."""
        return self._state

    @property
    def deadline(self) -> float:
        """When `TIMEOUT` is due; infinite if never."""
        return self._deadline

    def allows(self, event: Event) -> bool:
        """Whether it may happen now."""
        return event in self._table[self._state]

    def handle(self, event: Event, now: float) -> tuple[Action, ...]:
        """Make the transition for `event`; returns what to do, in order.

        RecordError or RuntimeError, by who is at fault, if the state does not allow it; the state
        then stays as it is.
        """
        transition = self._table[self._state].get(event)
        if transition is None:
            what = f"{event.name} does not belong in a session that is {self._state.value}"
            raise RecordError(what) if event in FROM_PEER else RuntimeError(what)
        if transition.state is not self._state:
            self._enter(transition.state, now, goes_on=transition.goes_on)
        return transition.actions

    def _enter(self, state: State, now: float, *, goes_on: bool = False) -> None:
        self._state = state
        if not self.allows(Event.TIMEOUT):
            self._deadline = float("inf")
        elif state in self._timeouts_s and not goes_on:
            self._deadline = now + self._timeouts_s[state]
