"""When the gateway polls and when it sleeps, with a clock that only the test moves."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.gateway.engine.busy_poll import REST_WINDOWS, BusyPoll, usable_window_s

WINDOW_S = 100e-6
STEP_S = 1e-6
"""What a poll and letting others run takes here."""
EVENTS = [(3, 1)]


@dataclass
class World:
    """An epoll with one event `after_s` from when it is set; counts polls and sleeps."""

    now: float = 1000.0
    event_at: float = 0.0
    polls: int = 0
    sleeps: int = 0
    polled_s: float = 0.0
    stolen_s: float = 0.0
    """For how long somebody else runs when let."""

    def poll(self, timeout_s: float) -> list[tuple[int, int]]:
        if timeout_s == 0:
            self.polls += 1
            return EVENTS if self.event_at <= self.now else []
        self.sleeps += 1
        if self.event_at > self.now + timeout_s:
            self.now += timeout_s
            return []
        self.now = max(self.now, self.event_at)
        return EVENTS

    def let_run(self) -> None:
        self.now += STEP_S + self.stolen_s
        self.polled_s += STEP_S

    def wait(self, busy: BusyPoll, after_s: float, kind: bool = False) -> bool:
        """Waits for an event that comes `after_s` from now; whether without sleep."""
        sleeps = self.sleeps
        self.event_at = self.now + after_s
        assert busy.wait(10.0, kind) == EVENTS
        return self.sleeps == sleeps


def make(window_s: float = WINDOW_S) -> tuple[World, BusyPoll]:
    world = World()
    busy = BusyPoll(world.poll, window_s, clock=lambda: world.now, let_run=world.let_run)
    return world, busy


def test_it_polls_only_after_a_wait_that_was_short() -> None:
    world, busy = make()
    assert [world.wait(busy, 30e-6) for _ in range(4)] == [False, True, True, True]
    assert not world.wait(busy, 1.0), "the window is over before the event"
    world.now += 1.0
    polls = world.polls
    assert not world.wait(busy, 30e-6), "the last wait was long"
    assert world.polls == polls


def test_an_idle_guest_costs_no_poll() -> None:
    world, busy = make()
    for _ in range(100):
        world.wait(busy, 0.01)
        world.event_at = world.now + 100
        assert busy.wait(0.5, False) == []
    assert world.polls == 0


def test_waits_for_the_device_and_for_the_guest_do_not_judge_each_other() -> None:
    world, busy = make()
    world.wait(busy, 30e-6, kind=True)
    for _ in range(10):
        assert not world.wait(busy, 1.0, kind=False)
        assert world.wait(busy, 30e-6, kind=True)


def test_somebody_else_who_takes_the_core_is_left_alone() -> None:
    world, busy = make()
    world.wait(busy, 30e-6)
    world.stolen_s = 3e-3
    began = world.now
    world.wait(busy, 5e-3)
    world.wait(busy, 30e-6)
    polls = world.polls
    while world.now < began + 0.9 * REST_WINDOWS * world.stolen_s:
        assert not world.wait(busy, 30e-6)
    assert world.polls == polls == 1


def test_without_a_window_it_only_sleeps() -> None:
    world, busy = make(0.0)
    assert not any(world.wait(busy, 1e-6) for _ in range(10))
    assert world.polls == 0


def test_one_processor_has_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert usable_window_s(WINDOW_S) == 0
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3})
    assert usable_window_s(WINDOW_S) == WINDOW_S


@given(st.lists(st.tuples(st.floats(0, 400e-6), st.booleans()), max_size=300))
def test_what_is_polled_in_vain_is_bounded(waits: list[tuple[float, bool]]) -> None:
    world, busy = make()
    began, vain_s = world.now, 0.0
    for after_s, kind in waits:
        before = world.polled_s
        if not world.wait(busy, after_s, kind):
            vain_s += world.polled_s - before
    # The last window is not rested yet.
    assert vain_s <= (world.now - began) / (1 + REST_WINDOWS) + WINDOW_S + STEP_S
