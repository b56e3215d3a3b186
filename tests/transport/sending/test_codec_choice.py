"""The choice of a codec, on links and machines that exist only in numbers."""

import math
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transport.sending.codec_choice import Choice
from transport.wire.codec import DELTA, LZ4, NONE, Codec, Method

WINDOW_FRAMES = 4
OVERHEAD_S = 1e-4  # of a lane, a frame
FRAME_BYTES = 5 << 19
COMPRESSED_FRAME_BYTES = 1 << 20
PAGE = 4104

Costs = dict[Codec, tuple[float, float]]
"""Seconds to encode a page, and the bytes that it becomes."""
ZSTD1, ZSTD3 = Codec(Method.ZSTD, 1), Codec(Method.ZSTD, 3)
FILES: Costs = {  # as measured, on one core
    NONE: (0.8e-6, PAGE),
    DELTA: (1.3e-6, PAGE),
    LZ4: (7.6e-6, 2350),
    ZSTD1: (9.6e-6, 1620),
    ZSTD3: (14e-6, 1480),
}
NOISE: Costs = {codec: (seconds, PAGE) for codec, (seconds, _) in FILES.items()}
FIXED = (NONE, LZ4, ZSTD1, ZSTD3)
WARM_UP_FRAMES = 120


class Lane:
    """A lane, its link and its receiver, in virtual time."""

    def __init__(
        self,
        choice: Choice,
        bytes_per_s: float,
        costs: Costs = FILES,
        *,
        apply_s: Callable[[Codec], float] = lambda codec: 0.5e-6,
        latency_s: float = 3e-4,
        mixed: float = 0.2,
        seed: int = 0,
    ) -> None:
        """`apply_s`: the receiver's, a page; `mixed`: how much pages differ in what they become."""
        self.choice = choice
        self.bytes_per_s = bytes_per_s
        self.costs = costs
        self.apply_s = apply_s
        self.latency_s = latency_s
        self.late_s = 0.0
        """Up to so much later than that some answers come."""
        self.one_core = False
        """Whether the receiver takes its time from the sender's."""
        self.again = False
        self.now = 0.0
        self.used: list[tuple[Codec, int]] = []
        """The codecs of frames, and their pages."""
        self._mixed = mixed
        self._random = random.Random(seed)
        self._link_free = 0.0
        self._applied = 0.0
        self._under_way: deque[float] = deque()

    def send(self, pages: int) -> float:
        """A round of so many pages with content; returns how long it took."""
        return self._round(pages, math.inf)

    def send_frames(self, frames: int) -> None:
        """So many frames of a round that is longer."""
        self._round(1 << 40, frames)

    def stall(self, seconds: float) -> None:
        """The link carries nothing for so long, from now on."""
        self._link_free = max(self._link_free, self.now) + seconds

    def pages_of(self, codec: Codec) -> int:
        return sum(pages for used, pages in self.used if used == codec)

    def _round(self, pages: int, frames: float) -> float:
        began, left, number = self.now, pages, 0
        while left and number < frames:
            self._receive()
            while len(self._under_way) == WINDOW_FRAMES:
                self.now = max(self.now, self._under_way[0])
                self._receive()
            codec = self.choice.pick(self.now, begins=0 if number else pages, again=self.again)
            sent = self._encode(codec, left)
            left -= sent
            number += 1
            if self.one_core:
                self.now += sent * self.apply_s(codec)
        if self._under_way:
            self.now = max(self.now, self._under_way[-1])
        self._receive()
        return self.now - began

    def _encode(self, codec: Codec, left: int) -> int:
        seconds, n_bytes = self.costs[codec]
        if n_bytes < PAGE:
            n_bytes = min(PAGE, n_bytes * math.exp(self._random.gauss(0.0, self._mixed)))
        pages = min(left, self.choice.frame_pages or left, self._room(codec, n_bytes))
        self.now += OVERHEAD_S / 2 + pages * seconds
        frame_bytes = int(pages * n_bytes)
        self.choice.encoded(self.now, looked=pages, pages=pages, n_bytes=frame_bytes)
        self._link_free = max(self._link_free, self.now) + frame_bytes / self.bytes_per_s
        arrived = self._link_free + self.latency_s
        self._applied = max(self._applied, arrived) + pages * self.apply_s(codec)
        if self.late_s and self._random.random() < 0.1:
            self._applied += self._random.uniform(0.0, self.late_s)
        self._under_way.append(self._applied)
        self.used.append((codec, pages))
        self.now += OVERHEAD_S / 2
        return pages

    def _room(self, codec: Codec, n_bytes: float) -> int:
        if codec.method is Method.ZSTD:
            return COMPRESSED_FRAME_BYTES // PAGE
        room = COMPRESSED_FRAME_BYTES if codec.method is Method.LZ4 else FRAME_BYTES
        return int(room / n_bytes)

    def _receive(self) -> None:
        while self._under_way and self._under_way[0] <= self.now:
            self.choice.acknowledged(self._under_way.popleft())


def best_page_s(bytes_per_s: float, costs: Costs = FILES) -> float:
    """What a page takes with the best codec, when nothing else is used."""
    pages = 60_000
    return min(Lane(Choice(codec), bytes_per_s, costs).send(pages) for codec in FIXED) / pages


def assert_settled(lane: Lane, frames: int = WARM_UP_FRAMES) -> None:
    """Once so many frames have been sent, it is near the best fixed codec."""
    best_s = best_page_s(lane.bytes_per_s, lane.costs)
    lane.send_frames(frames)
    pages = max(60_000, int(0.5 / best_s))  # so that a trial, of milliseconds, is but a part
    assert lane.send(pages) <= 1.15 * best_s * pages


RATES = st.floats(math.log10(5e6), 10.0).map(lambda power: math.pow(10.0, power))
MBIT = 1e6 / 8 / 2  # of a link that two lanes share


@given(rate=RATES, slower=st.floats(0.6, 2.5), seed=st.integers(0, 1 << 30))
@example(rate=100 * MBIT, slower=1.0, seed=0)
@example(rate=1000 * MBIT, slower=1.0, seed=0)
@example(rate=10_000 * MBIT, slower=1.0, seed=0)
@settings(deadline=None)
def test_it_comes_near_the_best_fixed_codec_on_any_link_and_machine(
    rate: float, slower: float, seed: int
) -> None:
    costs = {codec: (slower * seconds, n) for codec, (seconds, n) in FILES.items()}
    assert_settled(Lane(Choice(), rate, costs, seed=seed))


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(100 * MBIT, ZSTD3), (300e6, LZ4), (10_000 * MBIT, NONE), (1e11, NONE)],
)
def test_a_slow_link_gets_a_strong_codec_and_a_fast_one_none(rate: float, expected: Codec) -> None:
    lane = Lane(Choice(), rate)
    lane.send(100_000)
    assert lane.pages_of(expected) >= 85_000


def test_a_slow_machine_need_not_try_a_codec_to_know_that_it_takes_long() -> None:
    costs = {codec: (3 * seconds, n) for codec, (seconds, n) in FILES.items()}
    lane = Lane(Choice(), 4e8, costs)
    lane.send_frames(40)
    assert {codec for codec, _ in lane.used} == {NONE}


@given(rates=st.lists(RATES, min_size=2, max_size=4), seed=st.integers(0, 1 << 30))
@example(rates=[100 * MBIT, 1e10, 100 * MBIT], seed=0)
@settings(max_examples=50, deadline=None)
def test_it_follows_a_link_that_changes(rates: list[float], seed: int) -> None:
    lane = Lane(Choice(), rates[0], seed=seed)
    for rate in rates:
        lane.bytes_per_s = rate
        assert_settled(lane, 300)


@given(rate=RATES, frames=st.integers(0, 200), seed=st.integers(0, 1 << 30))
@settings(max_examples=50, deadline=None)
def test_half_a_second_of_silence_does_not_throw_it_off_for_good(
    rate: float, frames: int, seed: int
) -> None:
    lane = Lane(Choice(), rate, seed=seed)
    lane.send_frames(frames)
    lane.stall(0.5)
    assert_settled(lane, 200)


@pytest.mark.parametrize("rate", [100 * MBIT, 1000 * MBIT, 10_000 * MBIT])
def test_it_follows_content_that_changes(rate: float) -> None:
    """From data that nothing makes shorter to data that everything does, and back."""
    lane = Lane(Choice(), rate, NOISE)
    for costs in (NOISE, FILES, NOISE):
        lane.costs = costs
        assert_settled(lane, 600)


class Disturbed(dict[Codec, tuple[float, float]]):
    """`FILES` on a machine whose core others take now and then, for several frames in a row."""

    def __init__(self, seed: int) -> None:
        super().__init__(FILES)
        self._random = random.Random(seed)
        self._slow_frames = 0

    def __getitem__(self, codec: Codec) -> tuple[float, float]:
        seconds, n_bytes = super().__getitem__(codec)
        if self._slow_frames:
            self._slow_frames -= 1
        elif self._random.random() < 0.03:
            self._slow_frames = self._random.randrange(1, 16)
        return seconds * (3.0 if self._slow_frames else self._random.uniform(1.0, 1.5)), n_bytes


@pytest.mark.parametrize("seed", range(10))
def test_a_sender_that_is_held_up_now_and_then_keeps_its_codec(seed: int) -> None:
    slow = Lane(Choice(), 100 * MBIT, Disturbed(seed), seed=seed)
    slow.send(100_000)
    assert slow.pages_of(ZSTD1) + slow.pages_of(ZSTD3) >= 95_000
    fast = Lane(Choice(), 1e10, Disturbed(seed), seed=seed)
    fast.send(100_000)
    assert fast.pages_of(NONE) >= 90_000


class Interrupted(dict[Codec, tuple[float, float]]):
    """`FILES` on a machine where one frame in ten waits for the core for long."""

    def __init__(self, seed: int) -> None:
        super().__init__(FILES)
        self._random = random.Random(seed)

    def __getitem__(self, codec: Codec) -> tuple[float, float]:
        seconds, n_bytes = super().__getitem__(codec)
        return seconds * (20.0 if self._random.random() < 0.1 else 1.0), n_bytes


@pytest.mark.parametrize("seed", range(10))
def test_frames_that_had_to_wait_for_the_core_are_no_reason_to_compress_less(seed: int) -> None:
    lane = Lane(Choice(), 500 * MBIT, Interrupted(seed), seed=seed)
    lane.send(100_000)
    assert lane.pages_of(ZSTD1) + lane.pages_of(ZSTD3) >= 90_000


@pytest.mark.parametrize("seed", range(10))
def test_answers_that_a_scheduler_holds_up_do_not_make_a_fast_link_slow(seed: int) -> None:
    lane = Lane(Choice(), 2e9, seed=seed)
    lane.late_s = 0.02
    lane.send(200_000)
    assert lane.pages_of(NONE) >= 190_000


def test_a_trial_ends_where_no_page_has_content() -> None:
    lane = Lane(Choice(), 1000 * MBIT)
    lane.send(50_000)
    choice = lane.choice
    picked = []
    for number in range(2000):
        picked.append(choice.pick(lane.now, begins=0 if number else 1 << 30))
        lane.now += 1e-3
        choice.encoded(lane.now, looked=4000, pages=400, n_bytes=600_000)
        lane.now += 2e-3
        choice.acknowledged(lane.now)
    assert picked.count(choice.codec) >= 0.9 * len(picked)


def test_where_both_ends_share_a_core_it_is_not_taken_for_compression() -> None:
    """What is waited for there is the receiver, which gets no faster by fewer bytes."""
    lane = Lane(Choice(), 1e10, apply_s=lambda codec: 5e-6)
    lane.one_core = True
    lane.send(100_000)
    assert lane.pages_of(NONE) >= 90_000


def test_little_is_sent_as_it_is_before_a_slow_link_is_known() -> None:
    lane = Lane(Choice(), 10 * MBIT)
    lane.send(20_000)
    assert lane.pages_of(NONE) <= 1000


def test_no_frame_keeps_a_link_busy_for_long() -> None:
    """Not even one that goes as it is, on trial."""
    lane = Lane(Choice(), 20 * MBIT, mixed=0.0)
    lane.send(100_000)
    lane.used.clear()
    lane.send(200_000)
    assert lane.pages_of(NONE)
    seconds = [pages * FILES[codec][1] / lane.bytes_per_s for codec, pages in lane.used]
    assert max(seconds) < 0.1


def test_a_codec_that_is_not_in_use_is_tried_for_a_hundredth_of_the_time() -> None:
    lane = Lane(Choice(), 1000 * MBIT)
    lane.send(100_000)
    lane.used.clear()
    took_s = lane.send(200_000)
    for codec in (NONE, LZ4):
        tried_s = lane.pages_of(codec) * FILES[codec][1] / lane.bytes_per_s
        assert 0 < tried_s < 0.03 * took_s


@pytest.mark.parametrize("rate", [100 * MBIT, 1000 * MBIT, 4e8, 10_000 * MBIT])
def test_a_short_round_gets_the_codec_with_which_one_frame_is_there_first(rate: float) -> None:
    """Nothing overlaps there."""
    lane = Lane(Choice(), rate, latency_s=1e-4)
    lane.send(100_000)
    lane.used.clear()
    for _ in range(20):
        lane.send(256)
    alone = {codec: seconds + n / rate for codec, (seconds, n) in FILES.items()}
    least_s = min(alone.values())
    assert all(alone[codec] <= 1.15 * least_s for codec, _ in lane.used)


@given(rates=st.lists(RATES, min_size=2, max_size=3), seed=st.integers(0, 1 << 30))
@settings(max_examples=50, deadline=None)
def test_short_rounds_find_out_that_a_link_has_changed(rates: list[float], seed: int) -> None:
    lane = Lane(Choice(), rates[0], latency_s=5e-5, seed=seed)
    lane.send(20_000)
    for rate in rates:
        lane.bytes_per_s = rate
        for _ in range(40):
            lane.send(256)
        taken_s = sum(lane.send(256) for _ in range(20)) / 20
        alone_s = min(256 * (seconds + n / rate) for seconds, n in FILES.values())
        assert taken_s <= 1.25 * (alone_s + OVERHEAD_S + lane.latency_s)


@pytest.mark.parametrize("rate", [100 * MBIT, 10_000 * MBIT])
def test_short_rounds_do_not_throw_off_long_ones(rate: float) -> None:
    lane = Lane(Choice(), rate)
    lane.send(50_000)
    for _ in range(100):
        lane.send(100)
    assert_settled(lane, 0)


@pytest.mark.parametrize(("rate", "best"), [(100 * MBIT, ZSTD3), (10_000 * MBIT, NONE)])
def test_pages_of_zeros_and_short_deltas_do_not_throw_it_off(rate: float, best: Codec) -> None:
    """Rounds of them are answered as late as others, and carry next to nothing."""
    lane = Lane(Choice(), rate)
    lane.send(50_000)
    choice = lane.choice
    for number in range(400):
        choice.pick(lane.now, begins=0 if number % 100 else 1 << 20)
        lane.now += 2e-3
        content = number % 40
        choice.encoded(lane.now, looked=4000, pages=content, n_bytes=8000 + 30 * content)
        lane.now += 1e-3
        choice.acknowledged(lane.now)
    lane.send(256)
    assert lane.used[-1][0] == best
    assert_settled(lane, 0)


def test_what_is_sent_again_is_kept_as_a_base_where_nothing_is_compressed() -> None:
    lane = Lane(Choice(), 1e10)
    lane.send(50_000)
    lane.used.clear()
    lane.again = True
    lane.send(50_000)
    lane.send(256)
    assert not lane.pages_of(NONE)
    assert lane.pages_of(DELTA) >= 45_000
    assert lane.used[-1][0] == DELTA


def test_deltas_are_found_to_be_short_where_pages_are_compressed() -> None:
    lane = Lane(Choice(), 1000 * MBIT, FILES | {DELTA: (2e-6, 300)})
    lane.send(50_000)
    lane.again = True
    lane.send_frames(600)
    lane.used.clear()
    lane.send(50_000)
    assert lane.pages_of(DELTA) >= 45_000


@pytest.mark.parametrize("codec", [NONE, LZ4, Codec(Method.ZSTD, 6)])
def test_one_codec_is_no_choice(codec: Codec) -> None:
    lane = Lane(Choice(codec), 10 * MBIT, {codec: (1e-6, PAGE)})
    lane.send(5_000)
    lane.again = True
    lane.send(100)
    assert {used for used, _ in lane.used} == {codec}
    assert lane.choice.codec == codec
    assert not lane.choice.frame_pages
