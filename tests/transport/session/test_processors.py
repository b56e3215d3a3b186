"""Lanes that rest are kept apart, and go where the kernel wants once they have much to do."""

import os
import threading
from typing import Any
from unittest import mock

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from transport.sending.lanes import SendLane
from transport.session.processors import SHORT_MESSAGES, Processors, current_processor


@given(
    allowed=st.sets(st.integers(0, 300), min_size=1, max_size=40),
    lanes=st.integers(1, 16),
)
def test_lanes_share_the_processors_and_no_two_one_unless_they_must(
    allowed: set[int], lanes: int
) -> None:
    taken: list[set[int]] = []
    with (
        mock.patch("os.sched_getaffinity", lambda _pid: allowed),
        mock.patch("os.sched_setaffinity", lambda _pid, processors: taken.append(set(processors))),
    ):
        for lane in range(lanes):
            Processors(lane, lanes).rest()
    assert len(taken) == lanes
    assert all(taken)
    assert set().union(*taken) == allowed
    users = [sum(processor in each for each in taken) for processor in allowed]
    assert max(users) <= -(-lanes // len(allowed))


def test_a_rest_keeps_a_lane_apart_and_a_long_round_does_not() -> None:
    seen: list[set[int]] = []

    def run() -> None:
        processors = Processors(1, 2)
        for messages in (1, SHORT_MESSAGES, SHORT_MESSAGES + 1, SHORT_MESSAGES):
            for _ in range(messages):
                processors.work()
            seen.append(os.sched_getaffinity(0))
            processors.rest()

    allowed = os.sched_getaffinity(0)
    own = set(sorted(allowed)[1::2]) or allowed
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [allowed, own, allowed, own]


def test_where_it_is_forbidden_a_lane_runs_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_pid: int, _processors: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    Processors(0, 2).rest()


def of_threads(name: str) -> list[set[int]]:
    """Where the lanes' threads may run, by lane."""
    threads = sorted((thread.name, thread.native_id) for thread in threading.enumerate())
    return [os.sched_getaffinity(number or 0) for each, number in threads if each.startswith(name)]


def test_both_ends_keep_their_lanes_apart_between_rounds(link_pair: Any) -> None:
    allowed = os.sched_getaffinity(0)

    async def main() -> None:
        async with link_pair(n_pages=4096) as pair:
            await pair.sender.send_round(np.arange(4096, dtype=np.uint32), 0)
            for name in ("ferry-lane", "ferry-apply"):
                for _ in range(1000):
                    if not set.intersection(*of_threads(name)):
                        break
                    await trio.sleep(0.01)
                first, second = of_threads(name)
                assert not first & second
                assert first | second == allowed

    if len(allowed) < 2:
        pytest.skip("one processor is not to be shared out")
    trio.run(main)


@pytest.mark.parametrize("lane", [0, 1])
def test_the_lane_that_would_take_the_callers_processor_is_woken_last(
    lane: int, link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[int] = []
    wake = SendLane.wake

    def noted(self: SendLane) -> None:
        woken.append(pair_lanes.index(self))
        wake(self)

    pair_lanes: list[SendLane] = []
    # Lanes that rest on processors 0 and 1, whatever this machine has.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _pid, _processors: None)
    monkeypatch.setattr("transport.sender.current_processor", lambda: lane)

    async def main() -> None:
        async with link_pair(n_pages=256) as pair:
            pages = np.arange(256, dtype=np.uint32)
            await pair.sender.send_round(pages, 0)
            pair_lanes.extend(pair.sender._lanes)
            while not all(each.rests_on(number) for number, each in enumerate(pair_lanes)):
                await trio.lowlevel.checkpoint()
            monkeypatch.setattr(SendLane, "wake", noted)
            await pair.sender.send_round(pages, 1)

    trio.run(main)
    assert woken == [1 - lane, lane]


def test_the_processor_that_a_thread_runs_on_is_one_that_it_may_run_on() -> None:
    assert current_processor() in os.sched_getaffinity(0)
