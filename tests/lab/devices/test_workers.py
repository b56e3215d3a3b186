"""Threads and holds."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.devices.workers import Hold, Workers

DEADLINE_S = 10


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    started = []

    def new(
        count: int,
        step: Callable[..., Any],
        failed: Callable[..., Any] = lambda work: None,
        holds: set[Hold] | tuple[()] = (),
    ) -> Workers[Any]:
        workers = Workers(count, step, failed, set(holds))
        started.append(workers)
        return workers

    yield new
    for workers in started:
        workers.close()


def test_what_is_kicked_is_stepped_by_several_threads(start: Callable[..., Any]) -> None:
    meeting = threading.Barrier(3)
    workers = start(2, lambda work: meeting.wait(DEADLINE_S))
    workers.kick("a")
    workers.kick("b")
    meeting.wait(DEADLINE_S)


def test_a_hold_waits_for_what_runs_and_keeps_what_was_kicked(start: Callable[..., Any]) -> None:
    entered, go, done = threading.Event(), threading.Event(), threading.Semaphore(0)
    stepped = []

    def step(work: int) -> None:
        entered.set()
        assert go.wait(DEADLINE_S)
        stepped.append(work)
        done.release()

    workers = start(2, step)
    workers.kick(1)
    assert entered.wait(DEADLINE_S)
    holder = threading.Thread(target=workers.hold, args=(Hold.STOPPED,))
    holder.start()
    # The hold is on as soon as the gate refuses new work, which only its lock can tell.
    while not workers._holds:
        pass
    workers.kick(2)
    assert holder.is_alive()
    go.set()
    holder.join(DEADLINE_S)
    assert stepped == [1]
    with workers.quiet():
        workers.release(Hold.STOPPED)
        assert stepped == [1]
    assert done.acquire(timeout=DEADLINE_S)
    assert done.acquire(timeout=DEADLINE_S)
    assert stepped == [1, 2]


def test_every_hold_has_to_go(start: Callable[..., Any]) -> None:
    done = threading.Event()
    workers = start(1, lambda work: done.set(), holds={Hold.NO_CLIENT, Hold.NO_BUS_MASTER})
    workers.kick(1)
    workers.release(Hold.NO_CLIENT)
    assert not done.is_set()
    workers.release(Hold.NO_BUS_MASTER)
    assert done.wait(DEADLINE_S)


def test_what_was_cancelled_is_not_stepped(start: Callable[..., Any]) -> None:
    stepped, done = [], threading.Event()

    def step(work: int) -> None:
        stepped.append(work)
        done.set()

    workers = start(1, step, holds={Hold.STOPPED})
    workers.kick(1)
    workers.cancel_all()
    workers.kick(2)
    workers.release(Hold.STOPPED)
    assert done.wait(DEADLINE_S)
    assert stepped == [2]


def test_a_step_that_fails_does_not_end_its_thread(start: Callable[..., Any]) -> None:
    told: list[Any] = []
    done = threading.Event()

    def step(work: str) -> None:
        if work == "bad":
            raise RuntimeError("on purpose")
        done.set()

    workers = start(1, step, told.append)
    workers.kick("bad")
    workers.kick("good")
    assert done.wait(DEADLINE_S)
    assert told == ["bad"]
    workers.hold(Hold.STOPPED)
