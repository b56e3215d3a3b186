"""One side of the handover alone: its course, its errors, its deadlines, and any events at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.handover.machine import (
    FROM_PEER,
    TABLES,
    Action,
    Event,
    Handover,
    HandoverError,
    LocalProtocolError,
    RemoteProtocolError,
)
from sync.handover.states import STANDSTILL, TERMINAL, Deadlines, HandoverState, Role

A, E, S = Action, Event, HandoverState

Course = list[tuple[Event, HandoverState, tuple[Action, ...]]]
COURSES: dict[Role, Course] = {
    Role.SOURCE: [
        (E.START, S.PREPARING, (A.PREPARE,)),
        (E.PREPARED, S.MEDIATING, (A.MEDIATE,)),
        (E.MEDIATED, S.PRECOPY, (A.RUN_ROUNDS,)),
        (E.CONVERGED, S.PAUSING, (A.PAUSE_VMM,)),
        (E.PAUSED, S.STOPPING, (A.STOP_DEVICES,)),
        (E.STOPPED, S.FINALIZING, (A.SEND_FINAL,)),
        (E.FINAL_SENT, S.VERIFYING, (A.VERIFY,)),
        (E.VERIFIED, S.AWAITING_READY, (A.ASK_READY,)),
        (E.PEER_READY, S.RELEASING, (A.RELEASE,)),
        (E.RELEASED, S.COMMITTING, (A.SEND_COMMIT,)),
        (E.PEER_COMMITTED, S.COMMITTED, (A.NOTE_MOVED, A.CONCLUDE)),
    ],
    Role.TARGET: [
        (E.START, S.LISTENING, ()),
        (E.PEER_HELLO, S.CHECKING, (A.CHECK,)),
        (E.CHECKED, S.ENTERING_STANDBY, (A.ENTER_STANDBY,)),
        (E.STOOD_BY, S.RECEIVING, (A.SEND_PREPARED,)),
        (E.PEER_ASKS, S.READYING, (A.MAKE_READY,)),
        (E.MADE_READY, S.READY, (A.SEND_READY,)),
        (E.PEER_COMMIT, S.OWNING, (A.OWN,)),
        (E.OWNED, S.STARTING_GUEST, (A.START_GUEST,)),
        (E.STARTED, S.COMMITTED, (A.SEND_COMMITTED,)),
    ],
}
CHECKS: dict[Role, Course] = {
    Role.SOURCE: [
        (E.START, S.PREPARING, (A.PREPARE,)),
        (E.CHECKED, S.CHECKED, ()),
    ],
    Role.TARGET: [
        (E.START, S.LISTENING, ()),
        (E.PEER_CHECKS, S.CHECKING_ONLY, (A.CHECK,)),
        (E.CHECKED, S.ANSWERING, (A.ANSWER_CHECK,)),
        (E.ANSWERED, S.CHECKED, ()),
    ],
}
WRONG = [E.FAILED, E.PEER_LOST, E.TIMEOUT, E.INTERRUPTED, E.PEER_ABORTED]


def run_to(role: Role, state: HandoverState) -> Handover:
    machine = Handover(role)
    for event, _, _ in COURSES[role]:
        if machine.state is state:
            break
        machine.handle(event)
    assert machine.state is state
    return machine


def states_between(role: Role, first: HandoverState, last: HandoverState) -> list[HandoverState]:
    states = [state for _, state, _ in COURSES[role]]
    return states[states.index(first) : states.index(last) + 1]


@pytest.mark.parametrize("courses", [COURSES, CHECKS], ids=["handover", "check"])
@pytest.mark.parametrize("role", Role)
def test_the_straight_course(
    role: Role, courses: dict[Role, list[tuple[Event, HandoverState, tuple[Action, ...]]]]
) -> None:
    machine = Handover(role)
    for event, state, actions in courses[role]:
        assert not machine.terminal
        assert machine.handle(event) == actions
        assert machine.state is state
    assert machine.terminal
    assert machine.cause is None


@pytest.mark.parametrize("event", WRONG)
@pytest.mark.parametrize("state", states_between(Role.SOURCE, S.PREPARING, S.RELEASING))
def test_i8_the_source_restores_whatever_happens_before_the_commit(
    state: HandoverState, event: Event
) -> None:
    machine = run_to(Role.SOURCE, state)
    assert machine.handle(event) == (A.TELL_ABORT, A.RESTORE)
    assert machine.cause is event
    assert machine.deadline_s is not None
    for late in (E.INTERRUPTED, E.PEER_LOST, E.PEER_ABORTED, E.FAILED):
        assert machine.handle(late) == ()
        assert machine.state is S.ABORTING
    assert machine.handle(E.RESTORED) == ()
    assert machine.state is S.ABORTED
    assert machine.cause is event


@pytest.mark.parametrize("event", WRONG)
@pytest.mark.parametrize("state", states_between(Role.TARGET, S.CHECKING, S.READY))
def test_i7_the_target_fences_before_it_tells(state: HandoverState, event: Event) -> None:
    machine = run_to(Role.TARGET, state)
    assert machine.handle(event) == (A.FENCE,)
    assert machine.handle(E.PEER_COMMIT) == ()
    assert machine.handle(E.FENCED) == (A.TELL_ABORT,)
    assert machine.state is S.ABORTED
    assert machine.handle(E.PEER_COMMIT) == ()


@pytest.mark.parametrize("event", WRONG)
@pytest.mark.parametrize("steps", [2, 3])
def test_a_check_that_fails_leaves_the_target_as_it_was(steps: int, event: Event) -> None:
    machine = Handover(Role.TARGET)
    for done, _, _ in CHECKS[Role.TARGET][:steps]:
        machine.handle(done)
    assert machine.handle(event) == (A.TELL_ABORT,)
    assert machine.state is S.ABORTED


@pytest.mark.parametrize("event", [E.PEER_LOST, E.TIMEOUT, E.FAILED])
def test_i7_a_source_that_does_not_know_whether_the_commit_arrived_does_nothing(
    event: Event,
) -> None:
    machine = run_to(Role.SOURCE, S.COMMITTING)
    assert machine.handle(E.INTERRUPTED) == ()
    assert machine.handle(event) == ()
    assert machine.state is S.IN_DOUBT
    for late in (E.PEER_COMMITTED, E.PEER_ABORTED, E.INTERRUPTED):
        assert machine.handle(late) == ()
        assert machine.state is S.IN_DOUBT


def test_i7_a_fenced_target_lets_the_source_reclaim() -> None:
    machine = run_to(Role.SOURCE, S.COMMITTING)
    assert A.RESTORE in machine.handle(E.PEER_ABORTED)


@pytest.mark.parametrize("state", [S.OWNING, S.STARTING_GUEST])
@pytest.mark.parametrize("event", [E.FAILED, E.TIMEOUT])
def test_i7_a_target_that_cannot_go_on_asks_its_gateway_whether_the_guest_may_have_run(
    state: HandoverState, event: Event
) -> None:
    def disowning() -> Handover:
        machine = run_to(Role.TARGET, state)
        assert machine.handle(event) == (A.FENCE,)
        return machine

    machine = disowning()
    assert machine.handle(E.MAY_HAVE_RUN) == (A.TELL_START_FAILED,)
    assert machine.state is S.OWNER_FAILED
    machine = disowning()
    assert machine.handle(E.FENCED) == (A.TELL_ABORT,)
    assert machine.state is S.ABORTED
    machine = disowning()
    assert machine.handle(E.FENCE_FAILED) == ()
    assert machine.state is S.IN_DOUBT


def test_i7_a_start_that_fails_is_on_record_at_the_source() -> None:
    source = run_to(Role.SOURCE, S.COMMITTING)
    assert source.handle(E.PEER_START_FAILED) == (A.NOTE_MOVED,)
    assert source.state is S.OWNER_FAILED


@pytest.mark.parametrize("event", [E.RESTORE_FAILED, E.TIMEOUT])
def test_a_restore_that_fails_is_told_apart(event: Event) -> None:
    machine = run_to(Role.SOURCE, S.PAUSING)
    machine.handle(E.INTERRUPTED)
    machine.handle(event)
    assert (machine.state, machine.cause) == (S.BROKEN, E.INTERRUPTED)


def test_errors_say_whose_fault_it_is() -> None:
    machine = run_to(Role.SOURCE, S.VERIFYING)
    with pytest.raises(RemoteProtocolError, match="PEER_COMMITTED"):
        machine.handle(E.PEER_COMMITTED)
    with pytest.raises(LocalProtocolError, match="RELEASED"):
        machine.handle(E.RELEASED)
    assert machine.state is S.VERIFYING


def test_a_peer_can_be_lost_in_every_state() -> None:
    """It is what follows a message that breaks the protocol, and that may come at any time."""
    for role, table in TABLES.items():
        for state in set(table) - {S.IDLE}:
            machine = Handover(role)
            machine.state = state
            machine.handle(E.PEER_LOST)


def test_each_state_has_its_deadline() -> None:
    deadlines = Deadlines(ready_s=3.5, listening_s=None)
    assert deadlines.of(S.READY) == 3.5
    assert deadlines.of(S.LISTENING) is None
    assert all(deadlines.of(state) is None for state in {S.IDLE, *TERMINAL})
    waiting = set(HandoverState) - TERMINAL - STANDSTILL - {S.IDLE, S.LISTENING, S.RECEIVING}
    assert all((deadlines.of(state) or 0) > 0 for state in waiting)
    with pytest.raises(ValueError, match="ready_s"):
        Deadlines(ready_s=0)


def test_by_default_the_source_waits_for_all_that_the_target_may_take() -> None:
    limits = Deadlines()
    answer_s = [limits.ready_s, limits.owning_s, limits.disowning_s, limits.starting_guest_s]
    assert (limits.committing_s or 0) > sum(seconds or 0 for seconds in answer_s)


def test_the_tables_have_a_row_for_each_state_of_their_role_and_nothing_else() -> None:
    own = {
        role: {S.IDLE, *TERMINAL, *(s for _, s, _ in COURSES[role] + CHECKS[role])} for role in Role
    }
    own[Role.SOURCE] |= {S.ABORTING}
    own[Role.TARGET] |= {S.FENCING, S.DISOWNING}
    for role, table in TABLES.items():
        assert set(table) == own[role]
        for state, row in table.items():
            for transition in row.values():
                assert transition.state in table
                if state in TERMINAL:
                    assert transition == (state, ())


@given(st.sampled_from(Role), st.integers(0, 11), st.lists(st.sampled_from(Event), max_size=40))
def test_i7_any_events_in_any_order(role: Role, course: int, events: list[Event]) -> None:
    """Illegal events change nothing, and what is done is done in the order that I7 needs."""
    machine = Handover(role)
    done: list[Action] = []
    seen: list[Event] = []
    for event in [event for event, _, _ in COURSES[role][:course]] + events:
        before = machine.state
        try:
            actions = machine.handle(event)
        except HandoverError as error:
            assert machine.state is before
            assert isinstance(error, RemoteProtocolError) == (event in FROM_PEER)
            continue
        seen.append(event)
        for action in actions:
            if action is A.SEND_COMMIT:
                assert E.RELEASED in seen
            if action is A.FENCE:
                assert E.PEER_CHECKS not in seen
            if action is A.RESTORE:
                assert A.SEND_COMMIT not in done or event is E.PEER_ABORTED
            if action is A.OWN:
                assert E.PEER_COMMIT in seen
                assert E.PEER_CHECKS not in seen
                assert A.FENCE not in done
            if action is A.START_GUEST:
                assert event is E.OWNED
            if action is A.TELL_ABORT and role is Role.TARGET:
                assert E.FENCED in seen or A.OWN not in done
            if action in (A.RELEASE, A.SEND_COMMIT, A.OWN, A.START_GUEST, A.RESTORE, A.FENCE):
                assert action not in done
            done.append(action)
    for _ in range(3):
        if machine.state is not S.IDLE and not machine.terminal:
            machine.handle(E.TIMEOUT)
    assert machine.terminal or machine.state is S.IDLE
