"""Drives a handover state machine: performs its actions, keeps its deadlines, feeds it events.

The machine (`sync.handover`) decides; this loop only starts what it asks for. One action runs at
a time: when the machine moves on because of something else (the peer is gone, a deadline, a
signal), the running action is cancelled and has ended before the next one starts, so that no two
of them talk to a gateway at once.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import trio

from ferry.errors import DeadlinePassed
from ferry.exit_codes import describe
from sync.handover.machine import Action, Event, Handover, RemoteProtocolError
from sync.handover.states import HandoverState, Role

Perform = Callable[[], Awaitable[Event | None]]

BEST_EFFORT = frozenset(
    {Action.TELL_ABORT, Action.TELL_START_FAILED, Action.SEND_COMMITTED, Action.NOTE_MOVED}
)
"""Telling the peer, or one's own record what the peer's says, may fail; what follows it must not be
left out because of that."""


class _Occurrence(NamedTuple):
    event: Event
    started: int | None = None
    """The number of the action that brought it about, if one did."""
    taken: trio.Event | None = None
    """Set when the machine has taken it, for whoever waits for that."""


class HandoverRunner:
    """Runs `machine` to a terminal state.

    `perform` gives a coroutine function for each action that the machine may ask for at first; it
    returns the event that it brought about, or None. What later ones need is not there yet: they
    are offered when it is. What an action raises becomes `Event.FAILED`, or the event
    named in `failure_events` for that action. `first_error` keeps what went wrong first,
    `cleanup_error` what then kept an action of `failure_events` from cleaning up.
    """

    def __init__(
        self,
        machine: Handover,
        perform: Mapping[Action, Perform],
        *,
        failure_events: Mapping[Action, Event],
        on_state: Callable[[HandoverState], Awaitable[None]],
    ) -> None:
        self._machine = machine
        self._perform = dict(perform)
        self._failure_events = failure_events
        self._on_state = on_state
        self._events_in, self._events = trio.open_memory_channel[_Occurrence](math.inf)
        self._started = 0
        self._entered = 0.0
        self._budget: tuple[frozenset[HandoverState], float, str] = (frozenset(), math.inf, "")
        self._running: trio.CancelScope | None = None
        self._idle = trio.Event()
        self._idle.set()
        self.first_error: BaseException | None = None
        self.cleanup_error: BaseException | None = None

    def post(self, event: Event, error: BaseException | None = None) -> None:
        """Tells the machine of something that happened; `error` is why, where there is one."""
        if error is not None and self.first_error is None:
            self.first_error = error
        self._events_in.send_nowait(_Occurrence(event))

    async def tell(self, event: Event, error: BaseException | None = None) -> None:
        """Tells the machine of something that happened, as `post` does, and waits until it has
        taken it: `state` is then what follows. Waits for ever if the machine ends before."""
        if error is not None and self.first_error is None:
            self.first_error = error
        taken = trio.Event()
        self._events_in.send_nowait(_Occurrence(event, taken=taken))
        await taken.wait()

    @property
    def role(self) -> Role:
        """The side of the handover that the machine is."""
        return self._machine.role

    @property
    def state(self) -> HandoverState:
        """The state that the machine is in."""
        return self._machine.state

    def offer(self, perform: Mapping[Action, Perform]) -> None:
        """Says how these actions are performed from now on."""
        self._perform |= perform

    def allow(self, states: frozenset[HandoverState], seconds: float, else_: str) -> None:
        """All of `states` together may take so long from now on; `else_` and the seconds are what
        is said if they take longer. The state that the machine is in now keeps its limit."""
        text = f"{else_} {seconds:.1f} s"
        self._budget = (states, trio.current_time() + seconds, text)

    def _until(self) -> tuple[float, str]:
        """When the state's time is over, and what to say then."""
        state, limit_s = self._machine.state, self._machine.deadline_s
        states, budget_until, text = self._budget
        until = math.inf if limit_s is None else self._entered + limit_s
        if state in states and budget_until < until:
            return budget_until, text
        return until, f"{state.value} took longer than {limit_s or 0:.0f} s"

    @property
    def reason(self) -> str:
        """One line that says what went wrong first, for the peer or a person."""
        return describe(self.first_error) if self.first_error else "no reason"

    async def run(self, first: Event) -> HandoverState:
        """Feeds `first`, then runs until the machine has reached a terminal state."""
        async with trio.open_nursery() as nursery:
            await self._feed(nursery, first)
            while not self._machine.terminal:
                until, what = self._until()
                with trio.move_on_at(until) as scope:
                    event, started, taken = await self._events.receive()
                    if started not in (None, self._started):
                        continue  # from an action that something else has overtaken
                if scope.cancelled_caught:
                    passed = DeadlinePassed(what)
                    if self.first_error is None:
                        self.first_error = passed
                    else:
                        self.cleanup_error = passed
                    event, taken = Event.TIMEOUT, None
                await self._feed(nursery, event)
                if taken is not None:
                    taken.set()
            # What a terminal state asks for (telling the peer) is bounded by itself.
            await self._idle.wait()
        return self._machine.state

    async def _feed(self, nursery: trio.Nursery, event: Event) -> None:
        before = self._machine.state
        try:
            actions = self._machine.handle(event)
        except RemoteProtocolError as error:
            # Nothing that it says from here on can be relied on.
            self.post(Event.PEER_LOST, error)
            return
        if self._machine.state is not before:
            if self._running is not None:
                self._running.cancel()
            await self._idle.wait()
            self._entered = trio.current_time()
            await self._on_state(self._machine.state)
        if actions:
            self._idle = trio.Event()
            self._running = trio.CancelScope()
            self._started += 1
            nursery.start_soon(self._run_actions, actions, self._started, self._running, self._idle)

    async def _run_actions(
        self,
        actions: tuple[Action, ...],
        started: int,
        scope: trio.CancelScope,
        idle: trio.Event,
    ) -> None:
        try:
            with scope:
                for action in actions:
                    try:
                        event = await self._perform[action]()
                    except Exception as error:
                        if action in BEST_EFFORT:
                            continue
                        self.first_error = self.first_error or error
                        if action in self._failure_events:
                            self.cleanup_error = error
                        event = self._failure_events.get(action, Event.FAILED)
                        self._events_in.send_nowait(_Occurrence(event, started))
                        return
                    if event is not None:
                        self._events_in.send_nowait(_Occurrence(event, started))
        except Exception:
            # Parts of it failed while the others were cancelled.
            if not scope.cancel_called:
                raise
        finally:
            idle.set()
