"""What both ends of a migration have in common: signals, phases, the exit code, devices, tunnel."""

import os
import signal
from dataclasses import dataclass

import trio

from ferry.errors import Exit, Interrupted, NotOwner
from ferry.exit_codes import describe, exit_code_of
from ferry.migration.handover_runner import Runner
from ferry.progress import Reporter
from sync.handover.machine import Event
from sync.handover.states import State


@dataclass(frozen=True)
class Shell:
    """Reports the phases and ends them on a signal. `break_at` names the phase in which the
    process stops itself, for failure drills; SIGCONT lets it go on."""

    reporter: Reporter
    break_at: str

    async def on_state(self, state: State) -> None:
        self.reporter.event("phase", phase=state.value)
        if state.value == self.break_at:
            os.kill(os.getpid(), signal.SIGSTOP)

    async def watch_signals(
        self, runner: Runner, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                runner.post(Event.INTERRUPTED, Interrupted(f"stopped by {name}"))


def break_at_choices() -> tuple[str, ...]:
    return tuple(state.value for state in State)


_EXIT_OF_STATE = {
    State.IN_DOUBT: Exit.IN_DOUBT,
    State.BROKEN: Exit.BROKEN,
    State.OWNER_FAILED: Exit.OWNER_FAILED,
}


def conclude(reporter: Reporter, state: State, runner: Runner, advice: dict[State, str]) -> Exit:
    """The exit code for a terminal `state`; tells the user what went wrong and what to do."""
    if state in (State.COMMITTED, State.CHECKED):
        return Exit.OK
    error = runner.first_error
    reason = describe(error) if error is not None else "no reason is known"
    if runner.cleanup_error not in (None, error):
        reason += f"; then {describe(runner.cleanup_error)}"
    if not reason.endswith((".", "?")):
        reason += "."
    # What is said of the guest is not so where it was not this host's to begin with.
    hint = "" if isinstance(error, NotOwner) else advice.get(state, "")
    code = _EXIT_OF_STATE.get(state)
    if code is None:
        code = exit_code_of(error) if error is not None else Exit.INTERNAL
    reporter.event(
        "error",
        message=f"{reason} {hint}".strip(),
        state=state.value,
        exit_code=int(code),
        exit_name=code.name.lower(),
    )
    return code
