"""Signals ask a migration to end."""

import os
import signal
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from ferry.errors import Exit, Interrupted
from ferry.migration.stop_request import StopRequest, stopped_by_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


async def _until_asked(stop: StopRequest) -> Exit:
    with pytest.raises(Interrupted) as asked:
        await stop.wait_and_raise()
    assert str(asked.value) == "stopped by SIGHUP"
    return Exit.INTERRUPTED


def test_a_terminal_that_closes_asks_for_an_end() -> None:
    async def work(stop: StopRequest) -> Exit:
        os.kill(os.getpid(), signal.SIGHUP)
        return await _until_asked(stop)

    with_limit = trio.run(stopped_by_signals, work)
    assert with_limit is Exit.INTERRUPTED


def test_what_nohup_has_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def work(stop: StopRequest) -> Exit:
        os.kill(os.getpid(), signal.SIGHUP)
        await trio.testing.wait_all_tasks_blocked()
        return Exit.OK

    assert trio.run(stopped_by_signals, work) is Exit.OK
