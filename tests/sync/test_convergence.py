"""The pre-copy policy against a simple model of a guest and a link.

The model counts distinct pages of a working set that is written at random, and a link of constant
speed; the policy sees only what a round reports, and its predictions are held against what the
model says the downtime would be.
"""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.convergence import Convergence, Decision, Limits, Reason, Round, Verdict

PAGE_BYTES = 4096


def dirtied(working_set: int, writes: float) -> int:
    """Distinct pages after that many random writes (the coupon collector's expectation)."""
    return round(working_set * -math.expm1(-writes / working_set)) if working_set else 0


def moved(
    sent_pages: int,
    wire_bytes: int,
    duration_ns: int,
    dirty_pages: int,
    vmm_remaining_bytes: int = 0,
    interval_ns: int | None = None,
) -> Round:
    """A round after which the next begins at once, unless `interval_ns` says otherwise."""
    interval_ns = duration_ns if interval_ns is None else interval_ns
    return Round(sent_pages, wire_bytes, duration_ns, interval_ns, dirty_pages, vmm_remaining_bytes)


class Simulation:
    """A guest that writes pages at a constant rate while a link of constant speed carries them."""

    def __init__(
        self, memory: int, working_set: int, writes_per_s: float, pages_per_s: float
    ) -> None:
        self.left = memory
        self.working_set = working_set
        self.writes_per_s = writes_per_s
        self.pages_per_s = pages_per_s

    def round(self) -> Round:
        seconds = max(self.left, 1) / self.pages_per_s
        sent, self.left = self.left, dirtied(self.working_set, self.writes_per_s * seconds)
        return moved(sent, sent * PAGE_BYTES, round(seconds * 1e9), self.left)

    def downtime_ms(self) -> float:
        return self.left / self.pages_per_s * 1e3


def run(simulation: Simulation, limits: Limits) -> tuple[Decision, int]:
    policy = Convergence(limits)
    while True:
        decision = policy.observe(simulation.round())
        if decision.verdict is not Verdict.CONTINUE:
            return decision, policy.rounds
        assert policy.rounds < limits.max_rounds


@given(
    memory=st.integers(1, 1 << 22),
    share=st.floats(0, 1),
    writes_per_s=st.floats(0, 1e6),
    pages_per_s=st.floats(1e3, 1e6),
    on_stall=st.sampled_from(["switch", "abort"]),
)
def test_it_ends_and_keeps_the_limit_that_it_claims_to_keep(
    memory: int, share: float, writes_per_s: float, pages_per_s: float, on_stall: str
) -> None:
    limits = Limits(on_stall=on_stall)  # type: ignore[arg-type]
    simulation = Simulation(memory, round(memory * share), writes_per_s, pages_per_s)
    decision, rounds = run(simulation, limits)
    assert rounds <= limits.max_rounds
    if decision.reason is Reason.DOWNTIME:
        assert simulation.downtime_ms() + limits.fixed_cost_ms <= limits.downtime_ms * 1.001
    else:
        assert decision.predicted_downtime_ms > limits.downtime_ms
        assert decision.verdict is (Verdict.SWITCH if on_stall == "switch" else Verdict.GIVE_UP)
    assert decision.predicted_downtime_ms == pytest.approx(
        simulation.downtime_ms() + limits.fixed_cost_ms
    )


def test_a_guest_that_writes_slower_than_the_link_carries_converges() -> None:
    decision, rounds = run(Simulation(1 << 20, 1 << 18, 20_000, 100_000), Limits())
    assert (decision.verdict, decision.reason) == (Verdict.SWITCH, Reason.DOWNTIME)
    assert 1 < rounds < 6


def test_a_guest_that_writes_faster_stalls() -> None:
    def busy() -> Simulation:
        return Simulation(1 << 20, 1 << 19, 400_000, 100_000)

    decision, _ = run(busy(), Limits())
    assert (decision.verdict, decision.reason) == (Verdict.SWITCH, Reason.STALL)
    decision, rounds = run(busy(), Limits(on_stall="abort"))
    assert (decision.verdict, decision.reason) == (Verdict.GIVE_UP, Reason.STALL)
    assert rounds < 10


def feed(policy: Convergence, left: list[int], seconds: float = 1.0) -> list[Decision]:
    """Rounds that each take `seconds` and leave `left` pages; 1000 pages are sent in each."""
    return [
        policy.observe(moved(1000, 1000 * PAGE_BYTES, round(seconds * 1e9), pages))
        for pages in left
    ]


def test_a_stalled_migration_waits_for_the_best_moment() -> None:
    decisions = feed(Convergence(Limits()), [5000, 900, 2000, 2100, 1900, 901, 900])
    verdicts = [decision.verdict for decision in decisions]
    assert verdicts == [Verdict.CONTINUE] * 6 + [Verdict.SWITCH]
    assert [decision.reason for decision in decisions[3:]] == [
        Reason.COPYING,
        Reason.STALL,
        Reason.STALL,
        Reason.STALL,
    ]


def test_small_gains_are_no_progress() -> None:
    decisions = feed(Convergence(Limits(on_stall="abort")), [1000, 999, 998, 997])
    assert decisions[-1].verdict is Verdict.GIVE_UP
    assert decisions[-1].reason is Reason.STALL


def test_the_last_round_and_the_timeout_end_it() -> None:
    limits = Limits(max_rounds=4, stall_rounds=9)
    assert [d.verdict for d in feed(Convergence(limits), [900, 900, 900, 901])] == [
        *[Verdict.CONTINUE] * 3,
        Verdict.SWITCH,
    ]
    limits = Limits(timeout_s=2.5, stall_rounds=9, on_stall="abort")
    decisions = feed(Convergence(limits), [900, 900, 900])
    assert [d.reason for d in decisions] == [Reason.COPYING, Reason.COPYING, Reason.TIMEOUT]
    assert decisions[-1].verdict is Verdict.GIVE_UP


def test_the_threshold_overrides_the_prediction() -> None:
    limits = Limits(downtime_ms=60, threshold_pages=500)
    decisions = feed(Convergence(limits), [501, 500])
    assert decisions[0].verdict is Verdict.CONTINUE
    assert (decisions[1].verdict, decisions[1].reason) == (Verdict.SWITCH, Reason.THRESHOLD)
    assert decisions[1].predicted_downtime_ms > limits.downtime_ms


def test_the_fixed_cost_and_the_vmm_count() -> None:
    policy = Convergence(Limits(downtime_ms=100, fixed_cost_ms=60))
    fast = moved(100_000, 100_000_000, 1_000_000_000, 0, vmm_remaining_bytes=4_100_000)
    assert policy.observe(fast).predicted_downtime_ms == pytest.approx(101)
    assert policy.observe(fast).verdict is Verdict.CONTINUE
    less = moved(100_000, 100_000_000, 1_000_000_000, 0, vmm_remaining_bytes=3_900_000)
    assert policy.observe(less).verdict is Verdict.SWITCH


def test_state_of_the_devices_own_counts_by_link_or_by_device_whichever_is_slower() -> None:
    policy = Convergence(Limits(downtime_ms=100, fixed_cost_ms=50))
    quiet = moved(1000, 100_000_000, 1_000_000_000, 0)
    slow_device = dataclasses.replace(quiet, state_bytes=1_000_000, state_ns=60_000_000)
    assert policy.observe(slow_device).predicted_downtime_ms == pytest.approx(110)
    assert policy.state_ms == pytest.approx(60)
    slow_link = dataclasses.replace(quiet, state_bytes=7_000_000, state_ns=60_000_000)
    decision = policy.observe(slow_link)
    assert decision.verdict is Verdict.CONTINUE
    assert decision.predicted_downtime_ms == pytest.approx(120)
    small = dataclasses.replace(quiet, state_bytes=4_000_000, state_ns=10_000_000)
    assert policy.observe(small).verdict is Verdict.SWITCH


@pytest.mark.parametrize("what", ["collect_ns", "proof_ns"])
def test_reading_the_bitmap_once_more_and_the_proof_count(what: str) -> None:
    policy = Convergence(Limits(downtime_ms=100, fixed_cost_ms=50))
    quiet = moved(1000, 1_000_000, 1_000_000_000, 0)
    slow = policy.observe(dataclasses.replace(quiet, **{what: 51_000_000}))
    assert slow.verdict is Verdict.CONTINUE
    assert slow.predicted_downtime_ms == pytest.approx(101)
    fast = policy.observe(dataclasses.replace(quiet, **{what: 49_000_000}))
    assert fast.verdict is Verdict.SWITCH


def test_cheap_pages_do_not_make_the_vmm_look_slow() -> None:
    """A round of zero pages moves few bytes; the link is as fast as it was."""
    policy = Convergence(Limits(downtime_ms=100))
    policy.observe(moved(50_000, 200_000_000, 1_000_000_000, 90_000, 9_000_000))
    zeros = moved(90_000, 1000, 100_000_000, 0, vmm_remaining_bytes=1_000_000)
    assert policy.observe(zeros).verdict is Verdict.SWITCH


def test_nothing_is_predicted_before_anything_was_measured() -> None:
    policy = Convergence(Limits())
    decision = policy.observe(moved(0, 0, 0, 10))
    assert decision.verdict is Verdict.CONTINUE
    assert math.isinf(decision.predicted_downtime_ms)
    assert Convergence(Limits()).observe(moved(0, 0, 0, 0)).verdict is Verdict.SWITCH


def test_rates_are_means_over_the_last_rounds() -> None:
    policy = Convergence(Limits(max_rounds=9, stall_rounds=9))
    policy.observe(moved(1, 1, 10_000_000_000, 9000))
    for pages in (1000, 2000, 3000):
        policy.observe(moved(pages, pages * 10, 1_000_000_000, 3000))
    assert policy.rates.sent_pages_per_s == 2000
    assert policy.rates.wire_bytes_per_s == 20_000
    assert policy.rates.dirty_pages_per_s == 3000


def test_waiting_between_rounds_does_not_make_the_link_look_slow() -> None:
    policy = Convergence(Limits())
    policy.observe(moved(1000, 4_096_000, 10_000_000, 500, interval_ns=100_000_000))
    assert policy.rates.sent_pages_per_s == 100_000
    assert policy.rates.dirty_pages_per_s == 5000


@pytest.mark.parametrize(
    "bad",
    [
        {"downtime_ms": 0},
        {"downtime_ms": float("nan")},
        {"max_rounds": 0},
        {"timeout_s": -1},
        {"threshold_pages": -1},
        {"fixed_cost_ms": float("inf")},
        {"stall_rounds": 0},
        {"on_stall": "hope"},
    ],
)
def test_limits_without_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Limits(**bad)  # type: ignore[arg-type]


def test_negative_quantities_are_refused() -> None:
    with pytest.raises(ValueError, match="wire_bytes"):
        moved(0, -1, 0, 0)


def test_limits_may_change_on_the_way() -> None:
    policy = Convergence(Limits(downtime_ms=100, fixed_cost_ms=60))
    slow = Round(
        sent_pages=1000, wire_bytes=4096000, duration_ns=10**9, interval_ns=10**9, dirty_pages=200
    )
    assert policy.observe(slow).verdict is Verdict.CONTINUE
    policy.heed(1000, "abort")
    decision = policy.observe(slow)
    assert (decision.verdict, decision.reason) == (Verdict.SWITCH, Reason.DOWNTIME)
