"""How far the VMM may be ahead: by simulation, and by the numbers."""

import pytest
import trio
import trio.testing

from ferry.migration.pacing import (
    FIRST_BYTES_PER_S,
    LOOKED_AT_PER_S,
    MAX_AHEAD_S,
    MIN_BACKLOG,
    Pace,
    keep_pace,
)

LIMIT_MS = 300.0


def send(pace: Pace, pages: float, duration_s: float, round_trip_s: float) -> None:
    """Pages that halve."""
    pace.sent(pages, int(pages * 2048), duration_s, round_trip_s)


@pytest.mark.parametrize("link_pages_per_s", [3000.0, 30_000.0, 400_000.0])
@pytest.mark.parametrize("fixed_s", [0.0005, 0.02])
def test_i10_the_backlog_fits_into_a_part_of_the_downtime(
    link_pages_per_s: float, fixed_s: float
) -> None:
    pace = Pace(LIMIT_MS)
    under_way = announced = 0.0
    for _ in range(60):
        under_way, announced = announced, 0.0
        duration_s = fixed_s + under_way / link_pages_per_s
        # The VMM announces what it may, meanwhile.
        rate = pace.bytes_per_s(under_way) / 4096
        announced = min(max(0.0, pace.max_backlog - under_way), rate * duration_s) + 1
        send(pace, under_way, duration_s, 0.0)
    backlog_s = pace.max_backlog / link_pages_per_s
    assert backlog_s <= LIMIT_MS / 1e3 / 3 or pace.max_backlog == MIN_BACKLOG
    assert under_way / (fixed_s + under_way / link_pages_per_s) >= link_pages_per_s / 2 or (
        pace.max_backlog == MIN_BACKLOG
    )


def test_the_vmm_is_slower_than_the_lanes_while_much_is_under_way() -> None:
    pace = Pace(LIMIT_MS)
    assert pace.bytes_per_s(0) == FIRST_BYTES_PER_S
    send(pace, 3000, 1.0, 0.0)
    assert pace.bytes_per_s(0) > 3000 * 4096 > pace.bytes_per_s(pace.max_backlog)


def test_a_bandwidth_that_somebody_has_chosen_is_never_exceeded() -> None:
    pace = Pace(LIMIT_MS, 1 << 22)
    assert pace.bytes_per_s(0) == 1 << 22
    send(pace, 1 << 20, 1.0, 0.0)
    assert pace.bytes_per_s(0) == 1 << 22


def test_the_round_trip_is_not_taken_for_the_links_rate() -> None:
    pace = Pace(LIMIT_MS)
    send(pace, 100, 0.2, 0.1)
    assert pace.max_backlog == pytest.approx(256)
    send(pace, 10_000, 0.2, 0.1)
    assert pace.max_backlog == pytest.approx(10_000)


def test_rounds_that_cost_next_to_nothing_do_not_raise_the_rate() -> None:
    pace = Pace(LIMIT_MS)
    send(pace, 10_000, 1.0, 0.0)
    backlog = pace.max_backlog
    pace.sent(10_000, 10_000, 0.1, 0.0)  # next to no bytes
    send(pace, 1000, 0.008, 0.007)  # over with the first answer
    assert pace.max_backlog == backlog


@pytest.mark.parametrize("bandwidth", [None, 6_000_000])
def test_i10_short_pages_or_what_a_limit_lets_through_at_once_do_not_raise_the_rate(
    bandwidth: int | None,
) -> None:
    pace = Pace(3000, bandwidth=bandwidth)
    for _ in range(4):
        pace.sent(1500, 1500 * 4000, 1.0, 0.0)
    backlog = pace.max_backlog
    duration_s = 0.004 if bandwidth else 0.02
    pace.sent(150, 120_000, duration_s, 0.0)
    assert backlog <= pace.max_backlog < 1.1 * backlog


def test_while_the_vmm_has_much_to_look_at_rounds_are_longer() -> None:
    pace = Pace(LIMIT_MS)
    send(pace, 10_000, 1.0, 0.0)
    backlog, round_cost = pace.max_backlog, pace.round_cost
    pace.remain(LOOKED_AT_PER_S // 4)
    assert pace.max_backlog == pytest.approx(backlog + 10_000 / 4)
    assert pace.round_cost == pytest.approx(round_cost + 10_000 / 8)
    pace.announced(LOOKED_AT_PER_S // 4 + 1)
    assert (pace.max_backlog, pace.round_cost) == (backlog, round_cost)
    pace.remain(1 << 40)
    assert pace.max_backlog == pytest.approx(backlog + 10_000 * MAX_AHEAD_S)


def test_pages_of_zeros_cost_next_to_nothing() -> None:
    assert Pace.cost_of(100, 100) < 2
    assert Pace.cost_of(100, 0) == 100


def test_the_vmm_is_told_its_rate_when_it_changes() -> None:
    told: list[int] = []

    class Stream:
        backlog = 0.0

    async def limit(rate: int) -> None:
        told.append(rate)

    async def main() -> None:
        pace = Pace(LIMIT_MS)
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_pace, pace, Stream(), limit)
                await trio.sleep(5)
                send(pace, 3000, 1.0, 0.0)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert told == [FIRST_BYTES_PER_S, int(3000 * 4096 * 1.5)]
