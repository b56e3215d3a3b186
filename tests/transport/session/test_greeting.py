"""How a session begins and ends, without a socket: every pair, and two machines against each
other."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.session.greeting import (
    FROM_PEER,
    RECEIVER,
    SENDER,
    Action,
    Event,
    Greeting,
    State,
    Table,
)
from transport.wire.errors import RecordError

NOW = 1000.0
START = {"sender": (SENDER, State.CALLING), "receiver": (RECEIVER, State.LISTENING)}
PAIRS = [
    (role, state, event) for role, (table, _) in START.items() for state in table for event in Event
]


def machine(table: Table, state: State, timeouts_s: dict[State, float] | None = None) -> Greeting:
    return Greeting(table, state, timeouts_s or {}, NOW)


@pytest.mark.parametrize(("role", "state", "event"), PAIRS)
def test_every_pair_is_in_the_table_or_the_fault_of_who_caused_it(
    role: str, state: State, event: Event
) -> None:
    table, _ = START[role]
    greeting = machine(table, state)
    if event in table[state]:
        assert greeting.handle(event, NOW) == table[state][event].actions
        assert greeting.state is table[state][event].state
        return
    with pytest.raises(RecordError if event in FROM_PEER else RuntimeError, match=event.name):
        greeting.handle(event, NOW)
    assert greeting.state is state


@pytest.mark.parametrize("role", START)
def test_a_session_can_end_from_every_state_and_says_why_once(role: str) -> None:
    table, start = START[role]
    reached, edge = {start}, [start]
    while edge:
        for transition in table[edge.pop()].values():
            ends = [action for action in transition.actions if action.name.startswith("END_")]
            assert len(ends) <= 1
            if ends:
                assert transition.state is State.ENDED
                assert transition.actions[-1] is ends[0]
            if transition.state not in reached:
                reached.add(transition.state)
                edge.append(transition.state)
    assert reached == set(table)
    for state in table:
        assert table[state][Event.FAIL].state is State.ENDED


@pytest.mark.parametrize("role", START)
def test_i9_nobody_talks_who_has_not_been_accepted(role: str) -> None:
    table, _ = START[role]
    for event in (Event.CHANNEL, Event.LANE):
        allowed = {state for state in table if event in table[state]}
        more = {State.REJOINING} if role == "sender" else set()
        more |= {State.OPENING} if role == "sender" and event is Event.CHANNEL else set()
        assert allowed == {State.OPEN, State.HELD} | more


@pytest.mark.parametrize("state", RECEIVER)
def test_i9_a_stranger_changes_nothing_in_a_session(state: State) -> None:
    for event in (Event.HELLO, Event.HELLO_OF_OTHER_VERSION):
        transition = RECEIVER[state].get(event)
        if transition is not None and state is not State.LISTENING:
            assert transition.state is state
            assert transition.actions in (
                (Action.ANSWER_BUSY,),
                (Action.ANSWER_OTHER_VERSION,),
            )


def test_each_stage_of_the_greeting_has_a_time_of_its_own() -> None:
    timeouts_s = {State.CALLING: 5.0, State.HEARD: 60.0, State.OPENING: 7.0}
    greeting = machine(SENDER, State.CALLING, timeouts_s)
    for event in (Event.UNSUITED, Event.CONNECTED, Event.CONNECTION_LOST, Event.CONNECTED):
        greeting.handle(event, NOW + 4)
        assert greeting.deadline == NOW + 5
    greeting.handle(Event.ALIVE, NOW + 4)
    assert greeting.deadline == NOW + 64
    greeting.handle(Event.ALIVE, NOW + 10)
    assert greeting.deadline == NOW + 64
    greeting.handle(Event.ACCEPTED, NOW + 20)
    assert greeting.deadline == NOW + 27
    greeting.handle(Event.TUNNEL_CONNECTED, NOW + 21)
    greeting.handle(Event.TUNNEL_LOST, NOW + 22)
    assert greeting.deadline == NOW + 27
    greeting.handle(Event.TUNNEL_WELCOME, NOW + 23)
    assert greeting.deadline == float("inf")


@pytest.mark.parametrize(
    ("events", "end"),
    [
        ([], Action.END_NOBODY),
        ([Event.UNSUITED], Action.END_UNSUITED),
        ([Event.UNSUITED, Event.CONNECTED], Action.END_MUTE),
        ([Event.CONNECTED, Event.CONNECTION_LOST], Action.END_MUTE),
        ([Event.CONNECTED, Event.ALIVE], Action.END_UNDECIDED),
        ([Event.CONNECTED, Event.ALIVE, Event.CONNECTION_LOST, Event.LOSS], Action.END_NOBODY),
        ([Event.CONNECTED, Event.ACCEPTED], Action.END_SHUT_OUT),
    ],
)
def test_who_waits_in_vain_hears_for_what(events: list[Event], end: Action) -> None:
    greeting = machine(SENDER, State.CALLING)
    for event in events:
        greeting.handle(event, NOW)
    assert greeting.handle(Event.TIMEOUT, NOW) == (end,)


# Two machines with two ordered channels between them that lose nothing.

SAYS = {
    Action.SEND_HELLO: "hello",
    Action.ANSWER_BUSY: "busy",
    Action.SAY_FAREWELL: "bye",
    Action.SEND_LANE_HELLO: "lane hello",
    Action.WELCOME_LANE: "lane welcome",
}
HEARS_SENDER = {
    "accepted": Event.ACCEPTED,
    "refused": Event.REFUSED,
    "bye": Event.FAREWELL,
    "pong": Event.ALIVE,
    "lane welcome": Event.TUNNEL_WELCOME,
    "record": Event.CHANNEL,
}
HEARS_RECEIVER = {
    "bye": Event.FAREWELL,
    "ping": Event.ALIVE,
    "record": Event.CHANNEL,
    "lane hello": Event.LANE_HELLO,
}


@dataclass
class Side:
    greeting: Greeting
    says: deque[str] = field(default_factory=deque)
    did: list[Action] = field(default_factory=list)

    def handle(self, event: Event) -> None:
        for action in self.greeting.handle(event, NOW):
            self.did.append(action)
            if action in SAYS:
                self.says.append(SAYS[action])

    @property
    def over(self) -> bool:
        return self.greeting.state is State.ENDED


UNANSWERED = (State.CALLING, State.GREETING, State.HEARD)
STEPS = [
    *(("sender", step) for step in ("connect", "hear", "lose", "tunnel", "ping", "talk")),
    *(("receiver", step) for step in ("hear", "accept", "refuse", "sent", "talk")),
]
ENDS = [(who, step) for who in ("sender", "receiver") for step in ("leave", "fail")]
MOVES = st.lists(st.sampled_from(STEPS * 6 + ENDS), max_size=60)


@settings(max_examples=300, deadline=None)
@given(MOVES)
def test_two_sides_agree_on_what_became_of_a_session(moves: list[tuple[str, str]]) -> None:
    """Whatever the users do and in whatever order it arrives, neither side takes an honest peer for
    a liar. What became of it is told from outside, by what was said and what arrived: who is open
    was accepted, and what one user is told is what the other said."""
    sender = Side(machine(SENDER, State.CALLING))
    receiver = Side(machine(RECEIVER, State.LISTENING))
    present = False  # whether the receiver takes the sender for its session
    answer: str | None = None  # the user's, not sent yet
    answers: list[str] = []  # which were sent
    heard: list[str] = []  # which arrived

    for who, step in moves:
        side = sender if who == "sender" else receiver
        if side.over:
            continue
        match who, step:
            case "sender", "hear" if receiver.says:
                word = receiver.says.popleft()
                if word in ("accepted", "refused"):
                    heard.append(word)
                side.handle(HEARS_SENDER[word])
            case "receiver", "hear" if sender.says:
                word = sender.says.popleft()
                if word == "hello":
                    side.handle(Event.HELLO_AGAIN if present else Event.HELLO)
                    present = True
                elif present:  # else it is a stranger's, and dropped
                    side.handle(HEARS_RECEIVER[word])
                    if word == "ping":
                        side.says.append("pong")
            case "sender", "connect" if not heard and "hello" not in sender.says:
                side.handle(Event.CONNECTED)
            case "sender", "lose" if side.greeting.state in UNANSWERED:
                side.handle(Event.CONNECTION_LOST)
            case "sender", "tunnel" if heard == ["accepted"]:
                side.handle(Event.TUNNEL_CONNECTED)
            case "sender", "ping" if Action.SEND_HELLO in side.did:
                side.says.append("ping")
            case "receiver", ("accept" | "refuse") if present and answer is None and not answers:
                side.handle(Event.ACCEPT if step == "accept" else Event.REFUSE)
                answer = "accepted" if step == "accept" else "refused"
            case "receiver", "sent" if answer is not None:
                side.handle(Event.ANSWERED)
                side.says.append(answer)
                answers.append(answer)
                present = answer == "accepted"
                answer = None
                if not present:
                    break  # the next session is another one
            case "sender", "talk" if Action.TELL_OPEN in side.did:
                side.says.append("record")
            case "receiver", "talk" if Action.TELL_OPEN in side.did:
                side.says.append("record")
            case _, "leave":
                side.handle(Event.LEAVE)
            case _, "fail":
                side.handle(Event.FAIL)
    while receiver.says and not sender.over:
        word = receiver.says.popleft()
        if word in ("accepted", "refused"):
            heard.append(word)
        sender.handle(HEARS_SENDER[word])

    assert (Action.TELL_OPEN in receiver.did) == (answers == ["accepted"])
    assert (Action.TELL_OPEN in sender.did) == (heard == ["accepted"])
    assert (Action.END_REFUSED in sender.did) == (heard == ["refused"])
    assert heard == answers[: len(heard)]
    assert receiver.did.count(Action.TELL_HELLO) <= 1
    if Action.END_CLOSED in sender.did:  # a farewell comes from an open session only
        assert answers == ["accepted"] and receiver.over
