"""What both ends of a migration have in common: signals, phases, the exit code, devices, tunnel."""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from ferry.errors import Exit, Interrupted, NotOwner
from ferry.exit_codes import describe, exit_code_of
from ferry.migration.handover_runner import Runner
from ferry.nurseries import alongside
from ferry.progress import Reporter
from sync.handover.machine import Event
from sync.handover.states import State


class StopRequest:
    """Somebody's wish that a migration ends. Before the commit it does, afterwards it goes on."""

    def __init__(self) -> None:
        self._asked = trio.Event()
        self._reason = ""

    def ask(self, reason: str) -> None:
        """Makes the request; it stands from now on."""
        self._reason = self._reason or reason
        self._asked.set()

    async def pass_to(self, runner: Runner) -> None:
        """Waits for the request, and tells the handover of it."""
        await self._asked.wait()
        runner.post(Event.INTERRUPTED, Interrupted(self._reason))

    async def wait_and_raise(self) -> None:
        """Waits for the request, and raises `Interrupted`."""
        await self._asked.wait()
        raise Interrupted(self._reason)


async def stopped_by_signals(work: Callable[[StopRequest], Awaitable[Exit]]) -> Exit:
    """What `work` returns; SIGINT and SIGTERM ask it to stop, and do nothing else."""
    stop = StopRequest()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with alongside(partial(_ask_when_signalled, stop, signals)):
            return await work(stop)


async def _ask_when_signalled(stop: StopRequest, signals: AsyncIterator[int]) -> None:
    async for number in signals:
        stop.ask(f"stopped by {signal.Signals(number).name}")


@dataclass(frozen=True)
class Shell:
    """Reports the phases. `break_at` names the phase in which the process stops itself, for
    failure drills; SIGCONT lets it go on."""

    reporter: Reporter
    break_at: str

    async def on_state(self, state: State) -> None:
        self.reporter.event("phase", phase=state.value)
        if state.value == self.break_at:
            os.kill(os.getpid(), signal.SIGSTOP)


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
