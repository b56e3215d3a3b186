"""Both roles of the handover at once, in every interleaving: an exhaustive search.

The world around the two machines is modelled here and independent of `sync.handover`: two links
that keep order until they are cut, two gateways that execute commands in order and remember who
owns the guest, processes that die at any moment, actions that fail before or after they had their
effect, deadlines and Ctrl-C at any time. The search visits every state that can be reached and
checks each of them.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from sync.handover import machine as handover
from sync.handover.machine import SOURCE, TARGET, Action, Event, Handover, HandoverError, Transition
from sync.handover.states import STANDSTILL, TERMINAL, HandoverState, Role

A, E, S = Action, Event, HandoverState


class Side(NamedTuple):
    state: HandoverState
    running: Action | None = None
    """The action that the process waits for."""
    queue: tuple[Action, ...] = ()
    """Commands that the gateway has not executed yet; one that nobody waits for was cancelled."""
    record: str = "none"
    guest: str = "-"
    """`runs`, `paused`, or `-`: never started here."""
    vmm: bool = True
    """Whether the target's VMM is there."""
    alive: bool = True
    hears: bool = True
    inbox: tuple[Event, ...] = ()


class World(NamedTuple):
    source: Side
    target: Side
    cut: bool = False
    greeting: Event = E.PEER_HELLO
    """What the source asks for: a handover, or a check."""


MESSAGES = {
    A.SEND_PREPARED: E.PREPARED,
    A.ASK_READY: E.PEER_ASKS,
    A.SEND_READY: E.PEER_READY,
    A.SEND_COMMIT: E.PEER_COMMIT,
    A.SEND_COMMITTED: E.PEER_COMMITTED,
    A.TELL_ABORT: E.PEER_ABORTED,
    A.TELL_START_FAILED: E.PEER_START_FAILED,
    A.ANSWER_CHECK: E.CHECKED,
}
COMPLETIONS = {
    A.MEDIATE: E.MEDIATED,
    A.RUN_ROUNDS: E.CONVERGED,
    A.PAUSE_VMM: E.PAUSED,
    A.STOP_DEVICES: E.STOPPED,
    A.SEND_FINAL: E.FINAL_SENT,
    A.VERIFY: E.VERIFIED,
    A.CHECK: E.CHECKED,
    A.ENTER_STANDBY: E.STOOD_BY,
    A.MAKE_READY: E.MADE_READY,
    A.ANSWER_CHECK: E.ANSWERED,
}
COMMANDS = frozenset({A.RELEASE, A.RESTORE, A.NOTE_MOVED, A.OWN, A.FENCE, A.START_GUEST})
BEGIN = World(
    Side(S.IDLE, record="owned", guest="runs"),
    Side(S.IDLE),
)


class Violation(AssertionError):
    """The machines, taken together, did something that must never happen."""


def execute(command: Action, side: Side) -> tuple[Side, Event]:
    """What the gateway (and for the guest, the VMM) makes of a command that succeeds."""
    match command, side.record:
        case A.RELEASE, "owned":
            return side._replace(record="released"), E.RELEASED
        case A.NOTE_MOVED, "released":
            return side._replace(record="moved"), E.RELEASED
        case A.RESTORE, ("owned" | "released"):
            return side._replace(record="owned", guest="runs"), E.RESTORED
        case A.OWN, "none":
            return side._replace(record="owned"), E.OWNED
        case A.OWN, "fenced":
            return side, E.FAILED
        case A.FENCE, ("none" | "owned" | "fenced"):
            return side._replace(record="fenced"), E.FENCED
        case A.FENCE, "run":
            return side, E.MAY_HAVE_RUN
        case A.START_GUEST, "owned":
            return side._replace(record="run", guest="runs"), E.STARTED
        case A.START_GUEST, "fenced":
            return side, E.FAILED
    raise Violation(f"{command} with the record {side.record}")


def failure(command: Action) -> Event:
    return {A.RESTORE: E.RESTORE_FAILED, A.FENCE: E.FENCE_FAILED}.get(command, E.FAILED)


@cache
def step(
    role: Role, state: HandoverState, event: Event
) -> tuple[HandoverState, tuple[Action, ...]]:
    machine = Handover(role)
    machine.state = state
    actions = machine.handle(event)
    return machine.state, actions


@cache
def has_deadline(role: Role, state: HandoverState) -> bool:
    """Of its own, or within the one budget of a guest that stands still."""
    machine = Handover(role)
    machine.state = state
    return machine.deadline_s is not None or state in STANDSTILL


class Model:
    """The steps that can happen next, to either side."""

    def __init__(self, faults: bool) -> None:
        self.faults = faults

    def deliver(self, world: World, role: Role, event: Event) -> World:
        """`world` after one side has handled `event` and begun what it was told to do."""
        me, peer = self.sides(world, role)
        state, actions = step(role, me.state, event)
        if state is not me.state:
            me = me._replace(state=state, running=None)
        for action in actions:
            message = world.greeting if action is A.PREPARE else MESSAGES.get(action)
            if message and not world.cut and peer.alive:
                peer = peer._replace(inbox=(*peer.inbox, message))
            if action in COMMANDS:
                me = me._replace(queue=(*me.queue, action))
            if action in COMMANDS - {A.NOTE_MOVED} or action in COMPLETIONS or action is A.PREPARE:
                me = me._replace(running=action)
        return self.world(world, role, me, peer)

    @staticmethod
    def sides(world: World, role: Role) -> tuple[Side, Side]:
        if role is Role.SOURCE:
            return world.source, world.target
        return world.target, world.source

    @staticmethod
    def world(world: World, role: Role, me: Side, peer: Side) -> World:
        if role is Role.SOURCE:
            return world._replace(source=me, target=peer)
        return world._replace(source=peer, target=me)

    def successors(self, world: World) -> Iterator[World]:
        for role in Role:
            yield from self.of_one(world, role)
        if self.faults and not world.cut:
            yield world._replace(cut=True)

    def of_one(self, world: World, role: Role) -> Iterator[World]:
        me, peer = self.sides(world, role)
        yield from self.of_gateway(world, role)
        if self.faults and role is Role.TARGET and world.greeting is E.PEER_HELLO:
            yield from self.of_vmm(world, role)
        if not me.alive:
            return
        if me.state is S.IDLE:
            yield self.deliver(world, role, E.START)
            return
        if me.inbox and me.hears:
            read = self.world(world, role, me._replace(inbox=me.inbox[1:]), peer)
            yield self.deliver(read, role, me.inbox[0])
        if me.running in COMPLETIONS:
            done = me._replace(running=None)
            if me.running is A.PAUSE_VMM:
                done = done._replace(guest="paused")
            yield self.deliver(self.world(world, role, done, peer), role, COMPLETIONS[me.running])
        if not self.faults:
            return
        if me.running in COMPLETIONS or me.running is A.PREPARE or me.state is S.COMMITTING:
            yield self.deliver(world, role, E.FAILED)
            if me.running is A.PAUSE_VMM:
                paused = self.world(world, role, me._replace(guest="paused"), peer)
                yield self.deliver(paused, role, E.FAILED)
        yield self.deliver(world, role, E.INTERRUPTED)
        if has_deadline(role, me.state):
            yield self.deliver(world, role, E.TIMEOUT)
        if me.hears and me.state is not S.LISTENING and (world.cut or not peer.alive):
            deaf = me._replace(hears=False, inbox=())
            yield self.deliver(self.world(world, role, deaf, peer), role, E.PEER_LOST)
        yield self.world(world, role, self.dead(me), peer)

    def of_vmm(self, world: World, role: Role) -> Iterator[World]:
        """The target's VMM dies: its gateway sees it, and later the process does."""
        me, peer = self.sides(world, role)
        if me.vmm:
            void = "fenced" if me.record in ("none", "owned") else me.record
            gone = me._replace(vmm=False, record=void, guest="-")
            yield self.world(world, role, gone, peer)
        elif me.alive and me.state not in (S.IDLE, S.LISTENING):
            yield self.deliver(world, role, E.FAILED)

    def of_gateway(self, world: World, role: Role) -> Iterator[World]:
        """The gateway executes its oldest command; who still waits for it hears of it."""
        me, peer = self.sides(world, role)
        if not me.queue:
            return
        command, rest = me.queue[0], me.queue[1:]
        after, event = execute(command, me._replace(queue=rest))
        awaited = me.running is command and not rest
        outcomes = [(after, event)]
        if self.faults and command is A.START_GUEST and me.record == "owned":
            # It dies, or fails, when no more is done than putting it on record.
            outcomes.append((after._replace(guest="-"), E.FAILED))
        if self.faults:
            outcomes += [(after, failure(command)), (me._replace(queue=rest), failure(command))]
        for side, outcome in outcomes:
            if awaited and me.alive:
                free = side._replace(running=None)
                yield self.deliver(self.world(world, role, free, peer), role, outcome)
            else:
                yield self.world(world, role, side, peer)

    @staticmethod
    def dead(me: Side) -> Side:
        """The process is killed: its lease ends, and the gateway does what is safe by itself."""
        for command in me.queue:
            me, _ = execute(command, me)
        me = me._replace(alive=False, running=None, queue=(), inbox=(), hears=False)
        if me.record == "owned" and me.guest == "paused":
            return me._replace(guest="runs")
        if me.record == "none":
            return me._replace(record="fenced")
        return me


def check(world: World) -> None:
    source, target = world.source, world.target
    if source.record == "owned" and target.record in ("owned", "run"):
        raise Violation("two owners")
    if source.guest == "runs" and target.guest == "runs":
        raise Violation("the guest runs twice")
    gone = source.record in ("released", "moved")
    if target.guest == "runs" and not (target.record == "run" and gone):
        raise Violation("the target runs a guest that it does not own alone")
    if source.guest == "runs" and source.record != "owned":
        raise Violation("the source runs a guest that it let go")
    if source.alive and source.state is S.ABORTED and source.guest != "runs":
        raise Violation("aborted, and the guest stands still")
    if source.alive and source.state is S.COMMITTED and target.guest != "runs" and target.vmm:
        raise Violation("the source claims a success that is none")
    if source.record == "moved" and target.record != "run":
        raise Violation("the source notes a move that was none")
    if source.alive and source.state is S.OWNER_FAILED and target.record != "run":
        raise Violation("the source names an owner that is none")
    if target.alive and target.state is S.COMMITTED and target.guest != "runs" and target.vmm:
        raise Violation("the target claims a success that is none")
    if target.alive and target.state is S.ABORTED and target.record not in ("fenced", "none"):
        raise Violation("the target says that it never starts, and may")


def explore(faults: bool, greeting: Event = E.PEER_HELLO) -> dict[World, tuple[World, ...]]:
    """Every world that can be reached, with its successors. Raises `Violation`."""
    step.cache_clear()
    model = Model(faults)
    graph: dict[World, tuple[World, ...]] = {}
    frontier = [BEGIN._replace(greeting=greeting)]
    while frontier:
        world = frontier.pop()
        if world in graph:
            continue
        check(world)
        following = tuple({after for after in model.successors(world) if after != world})
        graph[world] = following
        frontier += following
    return graph


@pytest.fixture(scope="module")
def graph() -> dict[World, tuple[World, ...]]:
    return explore(faults=True)


@pytest.fixture(scope="module")
def checks() -> dict[World, tuple[World, ...]]:
    return explore(faults=True, greeting=E.PEER_CHECKS)


def settled(side: Side) -> bool:
    return not side.alive or side.state in TERMINAL


def test_i7_never_two_owners_and_never_two_running_guests(
    graph: dict[World, tuple[World, ...]],
) -> None:
    assert len(graph) > 3_000


def test_i7_a_source_that_goes_on_means_a_target_that_never_starts(
    graph: dict[World, tuple[World, ...]],
) -> None:
    """Whatever follows a source that resumed: the target's record never becomes `owned`."""
    for world, following in graph.items():
        if world.source.state in (S.ABORTING, S.ABORTED, S.BROKEN):
            for after in (world, *following):
                assert after.target.record not in ("owned", "run")


def test_every_run_ends_with_both_sides_in_a_terminal_state(
    graph: dict[World, tuple[World, ...]],
) -> None:
    ends = {world for world, following in graph.items() if not following}
    assert ends
    assert all(settled(world.source) and settled(world.target) for world in ends)
    entered = dict.fromkeys(graph, 0)
    for following in graph.values():
        for after in following:
            entered[after] += 1
    free = [world for world, count in entered.items() if not count]
    ordered = 0
    while free:
        ordered += 1
        for after in graph[free.pop()]:
            entered[after] -= 1
            if not entered[after]:
                free.append(after)
    assert ordered == len(graph), "there is a cycle: a run can go on for ever"


def test_no_side_waits_without_a_deadline(graph: dict[World, tuple[World, ...]]) -> None:
    for world in graph:
        for role, side in zip(Role, world[:2], strict=True):
            # A receiver waits for as long as its source lives, whose silence is its death.
            if side.alive and side.state not in TERMINAL | {S.IDLE, S.LISTENING, S.RECEIVING}:
                assert has_deadline(role, side.state), side.state


def test_how_runs_can_end(graph: dict[World, tuple[World, ...]]) -> None:
    """Where both processes live to the end, an operator can act on the pair of states."""
    ends = {
        (world.source.state, world.target.state)
        for world in graph
        if world.source.alive and world.target.alive
        if settled(world.source) and settled(world.target)
    }
    gone_on = {S.ABORTED, S.BROKEN}
    assert ends == {
        (S.COMMITTED, S.COMMITTED),
        (S.OWNER_FAILED, S.OWNER_FAILED),
        *((source, target) for source in gone_on for target in gone_on),
        *((S.IN_DOUBT, target) for target in TERMINAL - {S.CHECKED}),
    }


def test_a_check_touches_neither_side(checks: dict[World, tuple[World, ...]]) -> None:
    for world in checks:
        assert (world.source.record, world.source.guest) == ("owned", "runs")
        assert world.target.guest == "-"
        assert not world.target.alive or world.target.record == "none"


def test_how_a_check_can_end(checks: dict[World, tuple[World, ...]]) -> None:
    """A source that says that it would work has heard so; the target may not know that it has."""
    living = [world for world in checks if world.source.alive and world.target.alive]
    ends = {
        (world.source.state, world.target.state)
        for world in living
        if settled(world.source) and settled(world.target)
    }
    assert ends == {
        (source, target)
        for source in (S.CHECKED, S.ABORTED, S.BROKEN)
        for target in (S.CHECKED, S.ABORTED)
    }
    unsettled = [world for world, following in checks.items() if not following]
    assert all(settled(world.source) and settled(world.target) for world in unsettled)
    assert all(
        has_deadline(role, side.state)
        for world in living
        for role, side in zip(Role, world[:2], strict=True)
        if side.state not in TERMINAL | {S.IDLE, S.LISTENING}
    )


def test_without_faults_a_check_succeeds() -> None:
    worlds = explore(faults=False, greeting=E.PEER_CHECKS)
    ends = [world for world, following in worlds.items() if not following]
    assert {(world.source.state, world.target.state) for world in ends} == {(S.CHECKED, S.CHECKED)}


def test_i8_an_abort_ends_with_the_guest_running_on_the_source(
    graph: dict[World, tuple[World, ...]],
) -> None:
    for world in graph:
        if world.source.state is S.ABORTED and world.source.alive:
            assert (world.source.guest, world.source.record) == ("runs", "owned")
            assert world.target.guest == "-"


def test_i8_a_source_killed_before_it_released_leaves_a_running_guest(
    graph: dict[World, tuple[World, ...]],
) -> None:
    for world in graph:
        if not world.source.alive and world.source.record == "owned":
            assert world.source.guest == "runs"


def test_without_faults_the_handover_succeeds() -> None:
    ends = [world for world, following in explore(faults=False).items() if not following]
    assert {(world.source.state, world.target.state) for world in ends} == {
        (S.COMMITTED, S.COMMITTED)
    }
    assert {(world.source.guest, world.target.guest) for world in ends} == {("paused", "runs")}


BREAKAGES = {
    "the source resumes when the commit's answer is lost": (
        Role.SOURCE,
        S.COMMITTING,
        E.PEER_LOST,
        Transition(S.ABORTING, (A.RESTORE,)),
    ),
    "the source resumes when the commit's answer is late": (
        Role.SOURCE,
        S.COMMITTING,
        E.TIMEOUT,
        Transition(S.ABORTING, (A.RESTORE,)),
    ),
    "the source commits before it has released": (
        Role.SOURCE,
        S.AWAITING_READY,
        E.PEER_READY,
        Transition(S.COMMITTING, (A.SEND_COMMIT,)),
    ),
    "the target starts before it owns": (
        Role.TARGET,
        S.READY,
        E.PEER_COMMIT,
        Transition(S.STARTING_GUEST, (A.START_GUEST,)),
    ),
    "the target owns before the commit": (
        Role.TARGET,
        S.READYING,
        E.MADE_READY,
        Transition(S.OWNING, (A.SEND_READY, A.OWN)),
    ),
    "the target gives up without a fence when it may own already": (
        Role.TARGET,
        S.OWNING,
        E.TIMEOUT,
        Transition(S.ABORTED, (A.TELL_ABORT,)),
    ),
    "the target tells before it has fenced": (
        Role.TARGET,
        S.OWNING,
        E.FAILED,
        Transition(S.DISOWNING, (A.TELL_ABORT, A.FENCE)),
    ),
    "the target claims success before the guest runs": (
        Role.TARGET,
        S.OWNING,
        E.OWNED,
        Transition(S.COMMITTED, (A.SEND_COMMITTED,)),
    ),
    "the target fences when the peer is lost though it owns": (
        Role.TARGET,
        S.STARTING_GUEST,
        E.PEER_LOST,
        Transition(S.ABORTED, (A.TELL_ABORT,)),
    ),
    "the source gives up without restoring": (
        Role.SOURCE,
        S.FINALIZING,
        E.PEER_LOST,
        Transition(S.ABORTED, (A.TELL_ABORT,)),
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_i7_the_search_finds_a_table_that_is_broken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    role, state, event, transition = BREAKAGES[name]
    tables = {Role.SOURCE: dict(SOURCE), Role.TARGET: dict(TARGET)}
    tables[role][state] = {**tables[role][state], event: transition}
    monkeypatch.setattr(handover, "TABLES", tables)
    with pytest.raises((Violation, HandoverError)):
        explore(faults=True)
    step.cache_clear()


@pytest.mark.parametrize(
    ("event", "transition"),
    [
        (E.FAILED, Transition(S.FENCING, (A.FENCE,))),
        (E.CHECKED, Transition(S.ENTERING_STANDBY, (A.ENTER_STANDBY,))),
    ],
)
def test_the_search_finds_a_check_that_goes_too_far(
    event: Event, transition: Transition, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {**TARGET, S.CHECKING_ONLY: {**TARGET[S.CHECKING_ONLY], event: transition}}
    monkeypatch.setattr(handover, "TABLES", {Role.SOURCE: SOURCE, Role.TARGET: target})
    worlds = explore(faults=True, greeting=E.PEER_CHECKS)
    step.cache_clear()
    with pytest.raises(AssertionError):
        test_a_check_touches_neither_side(worlds)
        test_how_a_check_can_end(worlds)
