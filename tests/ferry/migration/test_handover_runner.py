"""The loop around the handover machine: one action at a time, deadlines, late outcomes dropped."""

import trio
import trio.testing

from ferry.errors import DeadlinePassed, PeerAborted
from ferry.migration.handover_runner import HandoverRunner, Perform
from sync.handover.machine import Action, Event, Handover, RemoteProtocolError
from sync.handover.states import STANDSTILL, Deadlines, HandoverState, Role


class Script:
    """Performs every action of the source as told, and writes down when it ran."""

    runner: HandoverRunner

    def __init__(self) -> None:
        self.log: list[str] = []
        self.hang: set[Action] = set()
        self.fail: dict[Action, Exception] = {}

    def actions(self) -> dict[Action, Perform]:
        outcome = {
            Action.PREPARE: Event.PREPARED,
            Action.MEDIATE: Event.MEDIATED,
            Action.RUN_ROUNDS: Event.CONVERGED,
            Action.PAUSE_VMM: Event.PAUSED,
            Action.STOP_DEVICES: Event.STOPPED,
            Action.SEND_FINAL: Event.FINAL_SENT,
            Action.VERIFY: Event.VERIFIED,
            Action.ASK_READY: Event.PEER_READY,
            Action.RELEASE: Event.RELEASED,
            Action.SEND_COMMIT: Event.PEER_COMMITTED,
            Action.CONCLUDE: None,
            Action.TELL_ABORT: None,
            Action.RESTORE: Event.RESTORED,
        }
        return {action: self._one(action, event) for action, event in outcome.items()}

    def _one(self, action: Action, event: Event | None) -> Perform:
        async def perform() -> Event | None:
            self.log.append(f"+{action.name}")
            try:
                if action in self.hang:
                    await trio.sleep_forever()
                if action in self.fail:
                    raise self.fail[action]
                await trio.lowlevel.checkpoint()
            finally:
                self.log.append(f"-{action.name}")
            return event

        return perform


def run(
    script: Script, post: tuple[Event, Exception | None] | None = None
) -> tuple[HandoverState, HandoverRunner]:
    async def main() -> tuple[HandoverState, HandoverRunner]:
        async def on_state(state: HandoverState) -> None:
            if post is not None and state is HandoverState.PRECOPY:
                runner.post(*post)

        runner = HandoverRunner(
            Handover(Role.SOURCE, Deadlines(precopy_s=5.0)),
            script.actions(),
            failure_events={Action.RESTORE: Event.RESTORE_FAILED},
            on_state=on_state,
        )
        script.runner = runner
        return await runner.run(Event.START), runner

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


def test_everything_goes_well() -> None:
    script = Script()
    state, runner = run(script)
    assert state is HandoverState.COMMITTED
    assert runner.first_error is None
    # Each action has ended before the next one begins.
    assert script.log[::2] == [entry.replace("-", "+") for entry in script.log[1::2]]


def test_i8_a_failure_leads_back_with_its_reason() -> None:
    script = Script()
    script.fail[Action.VERIFY] = error = RuntimeError("differs")
    state, runner = run(script)
    assert state is HandoverState.ABORTED
    assert runner.first_error is error
    assert script.log[-4:] == ["+TELL_ABORT", "-TELL_ABORT", "+RESTORE", "-RESTORE"]


def test_i8_a_hanging_phase_ends_at_its_deadline() -> None:
    script = Script()
    script.hang.add(Action.RUN_ROUNDS)
    state, runner = run(script)
    assert state is HandoverState.ABORTED
    assert isinstance(runner.first_error, DeadlinePassed)
    assert script.log.index("-RUN_ROUNDS") < script.log.index("+TELL_ABORT")


def test_i8_an_interrupt_cancels_what_runs() -> None:
    script = Script()
    script.hang.add(Action.RUN_ROUNDS)
    state, _ = run(script, (Event.INTERRUPTED, None))
    assert state is HandoverState.ABORTED
    assert "+RESTORE" in script.log


def test_i8_an_action_that_fails_in_part_when_it_is_cancelled_is_no_obstacle() -> None:
    class Parts(Script):
        def actions(self) -> dict[Action, Perform]:
            return super().actions() | {Action.RUN_ROUNDS: self.run_rounds}

        async def run_rounds(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(self.fail_in_the_end)

        async def fail_in_the_end(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise RuntimeError

    reason = PeerAborted("no room")
    state, runner = run(Parts(), (Event.PEER_ABORTED, reason))
    assert state is HandoverState.ABORTED
    assert runner.first_error is reason


def test_the_peers_reason_is_kept() -> None:
    script = Script()
    script.hang.add(Action.RUN_ROUNDS)
    reason = PeerAborted("no room")
    state, runner = run(script, (Event.PEER_ABORTED, reason))
    assert state is HandoverState.ABORTED
    assert runner.first_error is reason


def test_i7_without_an_answer_to_the_commit_nothing_is_restored() -> None:
    script = Script()
    script.hang.add(Action.SEND_COMMIT)
    state, _ = run(script)
    assert state is HandoverState.IN_DOUBT
    assert "+RESTORE" not in script.log


def test_a_restore_that_fails_is_told_apart() -> None:
    script = Script()
    script.fail[Action.RUN_ROUNDS] = first = RuntimeError()
    script.fail[Action.RESTORE] = then = RuntimeError()
    state, runner = run(script)
    assert state is HandoverState.BROKEN
    assert (runner.first_error, runner.cleanup_error) == (first, then)


def test_a_restore_that_hangs_is_told_apart() -> None:
    script = Script()
    script.fail[Action.RUN_ROUNDS] = first = RuntimeError()
    script.hang.add(Action.RESTORE)
    state, runner = run(script)
    assert state is HandoverState.BROKEN
    assert runner.first_error is first
    assert isinstance(runner.cleanup_error, DeadlinePassed)


def test_a_peer_out_of_turn_counts_as_lost() -> None:
    script = Script()
    script.hang.add(Action.RUN_ROUNDS)
    state, runner = run(script, (Event.PEER_COMMITTED, None))
    assert state is HandoverState.ABORTED
    assert isinstance(runner.first_error, RemoteProtocolError)


def test_i8_a_peer_that_cannot_be_told_does_not_keep_us_from_restoring() -> None:
    script = Script()
    script.fail[Action.RUN_ROUNDS] = RuntimeError()
    script.fail[Action.TELL_ABORT] = RuntimeError()
    state, _ = run(script)
    assert state is HandoverState.ABORTED
    assert "+RESTORE" in script.log


def test_an_action_is_performed_as_the_phase_before_it_offered() -> None:
    class Offering(Script):
        def actions(self) -> dict[Action, Perform]:
            actions = super().actions()
            self.mediate = actions.pop(Action.MEDIATE)
            return actions | {Action.PREPARE: self.prepare}

        async def prepare(self) -> Event:
            self.runner.offer({Action.MEDIATE: self.mediate})
            return Event.PREPARED

    script = Offering()
    state, _ = run(script)
    assert state is HandoverState.COMMITTED
    assert "+MEDIATE" in script.log


def test_who_tells_of_an_event_goes_on_when_the_machine_has_taken_it() -> None:
    seen: list[HandoverState] = []

    class Told(Script):
        def actions(self) -> dict[Action, Perform]:
            return super().actions() | {Action.ASK_READY: self.ask}

        async def ask(self) -> None:
            trio.lowlevel.spawn_system_task(self.answer)

        async def answer(self) -> None:
            seen.append(self.runner.state)
            await self.runner.tell(Event.PEER_READY)
            seen.append(self.runner.state)

    state, _ = run(Told())
    assert state is HandoverState.COMMITTED
    assert seen == [HandoverState.AWAITING_READY, HandoverState.RELEASING]


def test_i10_all_phases_in_which_the_guest_stands_still_share_one_budget() -> None:
    class Slow(Script):
        def actions(self) -> dict[Action, Perform]:
            slow = (Action.STOP_DEVICES, Action.SEND_FINAL, Action.VERIFY)
            actions = super().actions()
            return actions | {each: self.takes_a_second(actions[each]) for each in slow}

        def takes_a_second(self, perform: Perform) -> Perform:
            async def slowly() -> Event | None:
                await trio.sleep(1.0)
                return await perform()

            return slowly

        def _one(self, action: Action, event: Event | None) -> Perform:
            perform = super()._one(action, event)

            async def with_budget() -> Event | None:
                if action is Action.PAUSE_VMM:
                    self.runner.allow(STANDSTILL, 2.5, "longer than")
                return await perform()

            return with_budget

    script = Slow()
    state, runner = run(script)
    assert state is HandoverState.ABORTED
    assert str(runner.first_error) == "longer than 2.5 s"
    assert "-SEND_FINAL" in script.log
    assert "+VERIFY" not in script.log
    assert script.log[-1] == "-RESTORE"
