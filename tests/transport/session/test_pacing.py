"""The token bucket, against the definition of a rate."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.session.pacing import BURST_S, MIN_PIECE_BYTES, SharedBucket, TokenBucket

RATES = st.integers(1000, 10**9)
STEPS = st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 1 << 20)), min_size=1, max_size=40)


@given(RATES, STEPS)
def test_no_interval_lets_more_through_than_the_rate(
    rate: int, steps: list[tuple[float, int]]
) -> None:
    bucket, now, sent = TokenBucket(rate, 0.0), 0.0, []
    for pause, n_bytes in steps:
        now += pause
        sent.append((bucket.reserve(n_bytes, now), n_bytes))
    for first, last in itertools.combinations_with_replacement(range(len(sent)), 2):
        passed = sent[last][0] - sent[first][0]
        # A piece goes when its bytes have been paid, so the interval's first one is not counted.
        n_bytes = sum(size for _, size in sent[first + 1 : last + 1])
        assert n_bytes <= rate * (passed + BURST_S) * (1 + 1e-9) + 1


@given(RATES, STEPS)
def test_who_asks_first_goes_first_and_nobody_before_asking(
    rate: int, steps: list[tuple[float, int]]
) -> None:
    bucket, now, last = TokenBucket(rate, 0.0), 0.0, 0.0
    for pause, n_bytes in steps:
        now += pause
        due = bucket.reserve(n_bytes, now)
        assert due >= max(now, last) - 1e-9
        last = due


@given(RATES, STEPS)
def test_nothing_waits_longer_than_the_debt_before_it(
    rate: int, steps: list[tuple[float, int]]
) -> None:
    bucket, now, total = TokenBucket(rate, 0.0), 0.0, 0
    for pause, n_bytes in steps:
        now += pause
        total += n_bytes
        assert bucket.reserve(n_bytes, now) <= now + total / rate + 1e-6


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(1000, 10.0)
    bucket.reserve(1000, 10.0)
    assert bucket.reserve(0, 5.0) == bucket.reserve(0, 10.0) > 10.0


@pytest.mark.parametrize("rate", [0, -1])
def test_a_limit_must_let_something_through(rate: int) -> None:
    with pytest.raises(ValueError, match="lets nothing through"):
        SharedBucket(rate)


def test_without_a_limit_nothing_waits_and_pieces_stay_whole() -> None:
    bucket = SharedBucket(None)
    assert bucket.reserve(1 << 40) == 0.0
    assert bucket.piece_bytes(1 << 20) == 1 << 20


def test_pieces_shrink_with_the_limit_down_to_a_floor() -> None:
    assert SharedBucket(10**9).piece_bytes(1 << 20) == 1 << 20
    assert SharedBucket(10**7).piece_bytes(1 << 20) == 10**7 * BURST_S
    assert SharedBucket(10**3).piece_bytes(1 << 20) == MIN_PIECE_BYTES
    assert SharedBucket(10**3).piece_bytes(4096) == 4096


def test_the_bucket_reads_its_clock() -> None:
    times = iter([0.0, 0.0, 100.0])
    bucket = SharedBucket(1000, clock=lambda: next(times))
    assert bucket.reserve(1000 + int(1000 * BURST_S)) == pytest.approx(1.0)
    assert bucket.reserve(0) == 100.0


def test_a_limit_that_changes_holds_from_then_on() -> None:
    now = 0.0
    bucket = SharedBucket(1000, lambda: now)
    bucket.limit(None)
    assert bucket.reserve(10**9) == 0.0
    assert bucket.piece_bytes(1 << 20) == 1 << 20
    bucket.limit(10**6)
    assert bucket.reserve(2 * 10**6) == pytest.approx(2 - BURST_S)
    with pytest.raises(ValueError):
        bucket.limit(0)
    assert bucket.piece_bytes(1 << 20) == MIN_PIECE_BYTES
