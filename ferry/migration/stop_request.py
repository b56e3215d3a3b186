"""How a migration is asked to end before its time: by a signal, or by whoever runs it."""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import trio

from ferry.errors import Exit, Interrupted
from ferry.migration.handover_runner import HandoverRunner
from ferry.nurseries import alongside
from sync.handover.machine import Event


class StopRequest:
    """Somebody's wish that a migration ends. Before the commit it does, afterwards it goes on."""

    def __init__(self) -> None:
        self._asked = trio.Event()
        self._reason = ""

    def ask(self, reason: str) -> None:
        """Makes the request; it stands from now on."""
        self._reason = self._reason or reason
        self._asked.set()

    async def pass_to(self, runner: HandoverRunner) -> None:
        """Waits for the request, and tells the handover of it."""
        await self._asked.wait()
        runner.post(Event.INTERRUPTED, Interrupted(self._reason))

    async def wait_and_raise(self) -> None:
        """Waits for the request, and raises `Interrupted`."""
        await self._asked.wait()
        raise Interrupted(self._reason)


async def stopped_by_signals(work: Callable[[StopRequest], Awaitable[Exit]]) -> Exit:
    """Runs `work`, which SIGINT, SIGTERM and SIGHUP (a terminal that closes) ask to stop, and
    returns its exit code. What the starter has ignored, as nohup does, stays ignored."""
    stop = StopRequest()
    asked = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    with trio.open_signal_receiver(*asked) as signals:
        async with alongside(partial(_ask_when_signalled, stop, signals)):
            return await work(stop)


async def _ask_when_signalled(stop: StopRequest, signals: AsyncIterator[int]) -> None:
    async for number in signals:
        stop.ask(f"stopped by {signal.Signals(number).name}")
