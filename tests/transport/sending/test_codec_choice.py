"""The choice of a codec, on links and machines that exist only in numbers."""

import math
import random
from collections import Counter, deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transport.sending.codec_choice import EPOCH_FRAMES, PROBES_PAGES, Choice
from transport.sending.page_costs import LADDER
from transport.wire.codec import DELTA, NONE, Codec, Method

FRAME_PAGES = 256
WINDOW = 4
OVERHEAD_S = 50e-6  # of a lane, between two frames

# Seconds to encode a page, and bytes that it becomes: of files on one core.
FILES = {
    "none": (0.8e-6, 4104),
    "delta": (1.3e-6, 4104),
    "lz4": (7.6e-6, 2350),
    "zstd:1": (9.6e-6, 1620),
    "zstd:2": (11e-6, 1550),
    "zstd:3": (14e-6, 1480),
    "zstd:4": (16e-6, 1460),
    "zstd:5": (28e-6, 1430),
    "zstd:7": (43e-6, 1400),
    "zstd:9": (61e-6, 1390),
}
Costs = dict[str, tuple[float, float]]


class Lane:
    """A lane and its link, in virtual time.

    `shared`: sender and receiver share one core, so that what is applied is not encoded meanwhile.
    """

    def __init__(
        self, choice: Choice, costs: Costs, bytes_per_s: float, *, shared: bool = False
    ) -> None:
        self.choice = choice
        self.costs = costs
        self.bytes_per_s = bytes_per_s
        self.now = 0.0
        self.link_free = 0.0
        self.apply_s: dict[str, float] = {}  # of the receiver, a page
        self.answer_s = 0.0  # what passing from thread to thread costs, a frame
        self.late_s: dict[str, list[float]] = {}  # of a codec's next answers
        self.applied = 0.0
        self.shared = shared
        self.again = False
        self.under_way: deque[float] = deque()
        self.used: list[Codec] = []
        self.sent: list[int] = []

    def send(self, pages: int) -> float:
        """A round of `pages`; returns how long it took."""
        began = self.now
        left = pages
        while left:
            self._receive()
            while self.under_way and (len(self.under_way) == WINDOW or self.choice.probe_pages):
                self.now = max(self.now, self.under_way[0])
                self._receive()
            codec = self.choice.pick(
                self.now,
                begins=pages if left == pages else 0,
                frames_under_way=len(self.under_way),
                again=self.again,
            )
            self.used.append(codec)
            seconds, n_bytes = self.costs[str(codec)]
            sent = min(left, FRAME_PAGES, self.choice.frame_pages or FRAME_PAGES)
            self.sent.append(sent)
            left -= sent
            self.now += seconds * sent
            frame_bytes = int(n_bytes * sent)
            self.choice.encoded(self.now, pages=sent, n_bytes=frame_bytes)
            self.link_free = max(self.link_free, self.now) + frame_bytes / self.bytes_per_s
            apply_s = sent * self.apply_s.get(str(codec), 0.0)
            self.applied = max(self.link_free, self.applied) + apply_s
            late_s = self.late_s.get(str(codec))
            self.applied += self.answer_s + (late_s.pop() if late_s else 0.0)
            self.under_way.append(self.applied)
            self.now += OVERHEAD_S + (apply_s if self.shared else 0.0)
        if self.under_way:
            self.now = max(self.now, self.under_way[-1])
        self._receive()
        return self.now - began

    def send_short(self, rounds: int, pages: int = FRAME_PAGES) -> list[float]:
        """So many rounds of `pages`, with the guest's run in between; how long each took."""
        taken = []
        for _ in range(rounds):
            taken.append(self.send(pages))
            self.now += 0.1
        return taken

    def _receive(self) -> None:
        while self.under_way and self.under_way[0] <= self.now:
            self.choice.acknowledged(self.under_way.popleft())


def best_fixed(costs: Costs, bytes_per_s: float, pages: int) -> float:
    """What the best of the codecs would take in the steady state."""
    between = OVERHEAD_S / FRAME_PAGES
    return pages * min(
        max(seconds + between, n_bytes / bytes_per_s) for seconds, n_bytes in costs.values()
    )


MBIT = 1e6 / 8 / 2  # of a link that two lanes share


@pytest.mark.parametrize("rate", [10 * MBIT, 100 * MBIT, 1000 * MBIT, 10_000 * MBIT, 1e11])
def test_within_a_few_percent_of_the_best_fixed_codec(rate: float) -> None:
    pages = 150_000  # of a lane: somewhat more than 1 GiB of content in all
    taken = Lane(Choice(), FILES, rate).send(pages)
    assert taken <= 1.05 * best_fixed(FILES, rate, pages)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (10 * MBIT, {"zstd:7", "zstd:9"}),
        (1e11, {"none"}),
        (1000 * MBIT, {"zstd:2", "zstd:3", "zstd:4", "zstd:5"}),
    ],
)
def test_a_slow_link_gets_a_strong_codec_and_a_fast_one_none(
    rate: float, expected: set[str]
) -> None:
    lane = Lane(Choice(), FILES, rate)
    lane.send(100_000)
    assert str(lane.choice.codec) in expected


STEPS = len(LADDER) - 1
LEVELS = STEPS - 3  # of one compressor, which differ less than compressors do


@settings(max_examples=40, deadline=None)
@given(
    first=st.floats(0.3e-6, 3e-6),
    slower=st.lists(st.floats(1.02, 3.0), min_size=STEPS, max_size=STEPS),
    smaller=st.tuples(
        st.lists(st.floats(0.6, 1.0), min_size=3, max_size=3),
        st.lists(st.floats(0.9, 1.0), min_size=LEVELS, max_size=LEVELS),
    ).map(lambda parts: parts[0] + parts[1]),
    rate=st.floats(5.0, 11.0).map(lambda power: math.pow(10, power)),
)
@example(1e-6, [1.02] * 9, [1.0] * 9, 1e9)
def test_on_no_machine_and_link_it_takes_twice_what_the_best_does(
    first: float, slower: list[float], smaller: list[float], rate: float
) -> None:
    costs: Costs = {}
    seconds, n_bytes = first, 4104.0
    for codec, factor, shrink in zip(LADDER, [1.0, *slower], [1.0, *smaller], strict=True):
        seconds *= factor
        n_bytes *= shrink
        costs[str(codec)] = (seconds, n_bytes)
    pages = 150_000
    taken = Lane(Choice(), costs, rate).send(pages)
    # Before anything is known, the window is filled as it happens.
    start = max(
        2 * WINDOW * FRAME_PAGES * max(seconds, n_bytes / rate)
        for seconds, n_bytes in (costs["none"], costs["lz4"])
    )
    assert taken <= 2 * best_fixed(costs, rate, pages) + start


def test_it_follows_a_link_that_changes() -> None:
    lane = Lane(Choice(), FILES, 100 * MBIT)
    lane.send(50_000)
    assert lane.choice.codec.level >= 4  # a lighter level is tried now and then
    lane.bytes_per_s = 1e11
    lane.send(400_000)
    assert lane.choice.codec is NONE
    lane.bytes_per_s = 100 * MBIT
    lane.send(100_000)
    assert lane.choice.codec.level >= 4


def test_few_pages_go_as_they_are_until_that_has_proven_right() -> None:
    lane = Lane(Choice(), FILES, 100 * MBIT)
    lane.send(50_000)
    lane.used.clear()
    lane.sent.clear()
    lane.bytes_per_s = 1e11
    lane.send(400_000)
    first = next(n for n, codec in enumerate(lane.used) if codec in (NONE, DELTA))
    assert set(lane.sent[:first]) == {FRAME_PAGES}
    assert max(lane.sent[first : first + EPOCH_FRAMES]) < FRAME_PAGES
    assert lane.sent[-2] == FRAME_PAGES


class SlowAtFirst(dict[str, tuple[float, float]]):
    """Behind three probes a dozen frames take far longer than later ones."""

    frames = 0

    def __getitem__(self, codec: str) -> tuple[float, float]:
        seconds, n_bytes = super().__getitem__(codec)
        self.frames += 1
        return seconds * (16 if 3 < self.frames <= 15 else 1), n_bytes


def test_few_pages_go_as_they_are_where_a_change_was_taken_back() -> None:
    """A moment in which compression is slow does not tell that the link is fast."""
    lane = Lane(Choice(), SlowAtFirst(FILES), 300 * MBIT)
    lane.send(20_000)
    after_probes = list(zip(lane.used, lane.sent, strict=True))[3:]
    raw = [pages for codec, pages in after_probes if codec is NONE]
    assert len(raw) >= EPOCH_FRAMES
    assert max(raw) < FRAME_PAGES


def test_a_short_round_is_not_cut_up_for_a_doubt_about_long_ones() -> None:
    lane = Lane(Choice(), FILES, 100 * MBIT)
    lane.send(50_000)
    lane.bytes_per_s = 1e11
    lane.used.clear()
    while NONE not in lane.used:
        lane.send(FRAME_PAGES)
    assert lane.choice.codec.method is Method.ZSTD
    assert lane.sent[-1] == FRAME_PAGES


def test_it_follows_content_that_changes() -> None:
    """From data that nothing makes shorter to data that everything does."""
    noise = {name: (seconds, 4104.0) for name, (seconds, _) in FILES.items()}
    lane = Lane(Choice(), noise, 1000 * MBIT)
    assert lane.send(100_000) <= 1.05 * best_fixed(noise, 1000 * MBIT, 100_000)
    lane.costs = FILES
    lane.send(50_000)
    taken = lane.send(100_000)
    assert taken <= 1.05 * best_fixed(FILES, 1000 * MBIT, 100_000)


def test_at_the_end_of_a_round_nothing_overlaps_so_a_fast_codec_is_taken() -> None:
    lane = Lane(Choice(), FILES, 1000 * MBIT)
    lane.send(100_000)
    lane.used.clear()
    lane.send(256)
    # One frame: the time to encode it counts in full, and so does the time on the link.
    alone = {
        name: seconds + n_bytes / lane.bytes_per_s for name, (seconds, n_bytes) in FILES.items()
    }
    assert str(lane.used[0]) in sorted(alone, key=alone.__getitem__)[:3]


@pytest.mark.parametrize("rate", [10_000 * MBIT, 1e11])
def test_a_codec_that_holds_up_more_than_the_link_is_left(rate: float) -> None:
    """As on one machine, where whoever compresses takes time from whoever applies."""
    lane = Lane(Choice(), FILES, rate)
    lane.apply_s = {"none": 6e-6, "lz4": 7e-6}
    lane.send(20_000)
    lane.used.clear()
    pages = 150_000
    taken = lane.send(pages)
    assert taken <= 1.1 * pages * 6e-6


def test_where_both_ends_share_a_core_it_is_not_taken_for_compression() -> None:
    """What is waited for there is the receiver, which gets no faster by fewer bytes."""
    lane = Lane(Choice(), FILES, 1e10, shared=True)
    lane.apply_s = dict.fromkeys(FILES, 5e-6)
    pages = 150_000
    assert lane.send(pages) <= 1.05 * pages * (FILES["none"][0] + 5e-6 + OVERHEAD_S / FRAME_PAGES)


def test_a_change_that_was_wrong_is_taken_back_and_not_made_again_soon() -> None:
    """The model sees a link that holds frames up, but it is the receiver, which LZ4 holds up more:
    there the pages that get through are what counts."""
    lane = Lane(Choice(), FILES, 1e10)
    lane.apply_s = dict.fromkeys(FILES, 40e-6) | {"none": 20e-6, "delta": 20e-6}
    lane.send(30_000)
    lane.used.clear()
    pages = 200_000
    assert lane.send(pages) <= 1.1 * pages * 20e-6
    assert any(codec not in (NONE, DELTA) for codec in lane.used)


class MixedContent(dict[str, tuple[float, float]]):
    """`FILES`, some of which compress better than others."""

    def __init__(self, seed: int) -> None:
        super().__init__(FILES)
        self._random = random.Random(seed)

    def __getitem__(self, codec: str) -> tuple[float, float]:
        seconds, n_bytes = super().__getitem__(codec)
        return seconds, min(n_bytes * math.exp(self._random.gauss(0.0, 0.25)), 4104.0)


class Disturbed(MixedContent):
    """On a machine whose cores others take now and then, for several frames in a row."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._slow_frames = 0

    def __getitem__(self, codec: str) -> tuple[float, float]:
        seconds, n_bytes = super().__getitem__(codec)
        if self._slow_frames:
            self._slow_frames -= 1
        elif self._random.random() < 0.03:
            self._slow_frames = self._random.randrange(1, 16)
        return seconds * (3.0 if self._slow_frames else self._random.uniform(1.0, 1.5)), n_bytes


def test_a_link_is_not_taken_for_faster_whenever_the_sender_is_held_up() -> None:
    pages: Counter[Method] = Counter()
    for seed in range(20):
        lane = Lane(Choice(), Disturbed(seed), 1000 * MBIT)
        lane.send(100_000)
        for codec, n in zip(lane.used, lane.sent, strict=True):
            pages[codec.method] += n
    assert pages[Method.ZSTD] >= 0.98 * pages.total()


@pytest.mark.parametrize("applied", [1.0, 1.35, 1.6])
def test_a_level_that_holds_up_more_than_the_link_is_left(applied: float) -> None:
    """As where a receiver gets less of a core the more the sender takes, which the model takes for
    a slower link. How many pages get through does not tell, for that depends on what they hold."""
    pages = 38_000  # 1.2 s
    apply_s = {codec: applied * (seconds + 10e-6) for codec, (seconds, _) in FILES.items()}
    best_s = min(
        max(seconds, n_bytes / (1000 * MBIT), apply_s[codec])
        for codec, (seconds, n_bytes) in FILES.items()
    )
    taken = []
    for seed in range(20):
        lane = Lane(Choice(), MixedContent(seed), 1000 * MBIT)
        lane.apply_s = apply_s
        taken.append(lane.send(pages))
    assert sum(taken) / len(taken) <= 1.15 * best_s * pages


@pytest.mark.parametrize("late_s", [0.001, 0.004, 0.008])
@pytest.mark.parametrize("probe", range(len(PROBES_PAGES)))
def test_a_scheduler_that_holds_up_a_probe_does_not_make_a_fast_link_slow(
    probe: int, late_s: float
) -> None:
    lane = Lane(Choice(), FILES, 1e11)
    lane.late_s["none"] = [late_s, *[0.0] * probe]
    lane.send(100_000)
    assert set(lane.used) == {NONE}


@pytest.mark.parametrize("late_s", [0.014, 0.035])
def test_another_lane_that_has_begun_does_not_make_a_fast_link_slow(late_s: float) -> None:
    """It holds up the second probe."""
    lane = Lane(Choice(), FILES, 1e11)
    lane.late_s["none"] = [late_s, 0.0]
    lane.send(100_000)
    assert set(lane.used) == {NONE}


def test_a_probe_that_was_held_up_for_long_is_soon_found_to_be_wrong() -> None:
    lane = Lane(Choice(), FILES, 1e11)
    lane.late_s["none"] = [0.04, 0.0]
    lane.send(100_000)
    pages = Counter[Method]()
    for codec, n in zip(lane.used, lane.sent, strict=True):
        pages[codec.method] += n
    assert 0 < pages.total() - pages[Method.NONE] <= 5000  # two epochs


def test_little_is_sent_as_it_is_before_a_slow_link_is_known() -> None:
    lane = Lane(Choice(), FILES, 10 * MBIT)
    lane.send(20_000)
    raw = lane.used.index(next(codec for codec in lane.used if codec is not NONE))
    assert raw <= 2
    assert NONE not in lane.used[raw:]


@pytest.mark.parametrize(("changed_bytes", "expected"), [(400, DELTA), (4104, NONE)])
def test_short_rounds_take_deltas_only_where_pages_have_bases(
    changed_bytes: int, expected: Codec
) -> None:
    costs = FILES | {"delta": (2e-6, changed_bytes), "lz4": (7e-6, min(changed_bytes, 2350))}
    lane = Lane(Choice(), costs, 1e9)
    lane.apply_s = {"none": 1e-6, "delta": 1.3e-6, "lz4": 2e-6}
    for _ in range(40):
        lane.send(256)
        lane.now += 0.1
    lane.used.clear()
    for _ in range(60):
        lane.send(256)
        lane.now += 0.1
    assert lane.used.count(expected) >= 0.9 * len(lane.used)


@pytest.mark.parametrize("seed", range(20))
def test_deltas_that_save_nothing_are_tried_and_hardly_used(seed: int) -> None:
    """However the answers happen to come."""
    noise = random.Random(seed)
    lane = Lane(Choice(), FILES | {"delta": (2e-6, 4104)}, 1e10)
    lane.answer_s = 5e-4
    for _ in range(400):
        lane.late_s = {str(codec): [max(0.0, noise.gauss(0, 3e-4))] for codec in LADDER}
        lane.send_short(1)
    # Two rounds for a trial, in 34.
    assert lane.used[60:].count(DELTA) <= 30


def test_deltas_are_found_to_be_short_although_the_first_ones_have_no_bases() -> None:
    """As in a guest that writes the same few pages again and again."""
    lane = Lane(Choice(), dict(FILES), 1e9)
    lane.apply_s = {"none": 1e-6, "delta": 1.3e-6, "lz4": 2e-6}
    lane.again = True
    for _ in range(100):
        kept = bool(lane.used) and lane.used[-1] is DELTA
        lane.costs["delta"] = (2e-6, 400 if kept else 4104)
        lane.send(256)
        lane.now += 0.1
    assert lane.used[-50:].count(DELTA) >= 45


RAW = (NONE, DELTA)
LATE = st.dictionaries(
    st.sampled_from([str(codec) for codec in LADDER]),
    st.lists(st.floats(0.0, 0.1), min_size=1, max_size=2),
)
"""How late the first answers to a codec's frames are."""
ANSWER_S = st.floats(0.0, 3e-3)


def used_in_short_rounds(
    rate: float, long_pages: int, late_s: dict[str, list[float]], answer_s: float
) -> list[Codec]:
    """The codecs of sixty short rounds behind a long one."""
    lane = Lane(Choice(), FILES, rate)
    lane.send(long_pages)
    lane.late_s = {codec: [*late] for codec, late in late_s.items()}
    lane.answer_s = answer_s
    lane.used.clear()
    lane.send_short(60)
    return lane.used


@given(late_s=LATE, answer_s=ANSWER_S, rate=st.sampled_from([2e9, 1e10]))
@example(late_s={"none": [0.02], "delta": [0.02, 0.02]}, answer_s=1e-3, rate=1e10)
def test_on_a_fast_link_no_late_answer_keeps_short_rounds_from_going_as_they_are(
    late_s: dict[str, list[float]], answer_s: float, rate: float
) -> None:
    used = used_in_short_rounds(rate, 20_000, late_s, answer_s)
    assert sum(codec not in RAW for codec in used) <= len(LADDER)


def test_one_late_answer_of_each_does_not_count() -> None:
    lane = Lane(Choice(), FILES, 1e10)
    lane.send_short(40)
    lane.late_s = {"none": [0.02], "delta": [0.02]}
    lane.used.clear()
    lane.send_short(20)
    assert set(lane.used) <= set(RAW)


@given(late_s=LATE, answer_s=ANSWER_S, rate=st.sampled_from([10 * MBIT, 100 * MBIT]))
def test_on_a_slow_link_that_is_known_short_rounds_never_go_as_they_are(
    late_s: dict[str, list[float]], answer_s: float, rate: float
) -> None:
    assert not set(RAW) & set(used_in_short_rounds(rate, 5_000, late_s, answer_s))


RATES = st.sampled_from([10 * MBIT, 100 * MBIT, 1000 * MBIT, 10_000 * MBIT, 1e11])


@given(rates=st.lists(RATES, min_size=2, max_size=4), late_s=LATE, answer_s=ANSWER_S)
def test_short_rounds_find_out_that_a_link_has_changed(
    rates: list[float], late_s: dict[str, list[float]], answer_s: float
) -> None:
    lane = Lane(Choice(), FILES, rates[0])
    lane.send(5_000)
    lane.answer_s = answer_s
    for rate in rates:
        lane.bytes_per_s = rate
        lane.late_s = {codec: [*late] for codec, late in late_s.items()}
        lane.used.clear()
        lane.send_short(80)
        taken = sorted(lane.send_short(20))[10]
        best = min(seconds + n_bytes / rate for seconds, n_bytes in FILES.values())
        # A quarter is what encoding costs beside its time.
        assert taken <= 1.25 * (FRAME_PAGES * best + answer_s + OVERHEAD_S)
        # The link may be slower than in any long round.
        assert rate > 100 * MBIT or sum(codec in RAW for codec in lane.used) <= 16


def test_an_answer_that_was_held_up_does_not_keep_the_best_codec_away_for_long() -> None:
    """A scheduler's whim in one short round must not decide about the next fifty."""
    lane = Lane(Choice(), FILES, 1e9)
    lane.apply_s = apply_s = {"none": 1e-6, "delta": 2e-6}
    for _ in range(40):
        lane.send(256)
        lane.now += 0.1
    lane.apply_s = apply_s | {"none": 1e-4}
    lane.used.clear()
    while NONE not in lane.used:
        lane.send(256)
    lane.apply_s = apply_s
    lane.used.clear()
    for _ in range(50):
        lane.send(256)
        lane.now += 0.1
    assert lane.used.count(NONE) >= 0.8 * len(lane.used)


def test_what_is_sent_again_is_kept_as_a_base() -> None:
    lane = Lane(Choice(), FILES, 1e11)
    lane.send(20_000)
    assert lane.used.count(NONE) > 0.8 * len(lane.used)
    lane.used.clear()
    lane.again = True
    lane.send(20_000)
    assert lane.used.count(DELTA) > 0.8 * len(lane.used)


def test_a_probe_counts_although_zeros_have_taken_room_in_it() -> None:
    choice = Choice()
    for number in range(len(PROBES_PAGES)):
        choice.pick(number, begins=65536, frames_under_way=0)
        pages = choice.probe_pages - 1
        choice.encoded(number + 0.1, pages=pages, n_bytes=pages * 4104)
        choice.acknowledged(number + 0.2)
    assert not choice.probe_pages


def test_rounds_without_content_teach_nothing() -> None:
    choice = Choice()
    for number in range(100):
        assert choice.pick(number, begins=65536, frames_under_way=0) is NONE
        choice.encoded(number + 0.5, pages=0, n_bytes=40)
        choice.acknowledged(number + 0.6)
    assert choice.probe_pages


@pytest.mark.parametrize("codec", [NONE, Codec(Method.ZSTD, 6)])
def test_one_codec_is_no_choice(codec: Codec) -> None:
    lane = Lane(Choice([codec]), {str(codec): (1e-6, 4104)}, 10 * MBIT)
    lane.send(5_000)
    lane.send_short(5)
    assert set(lane.used) == {codec}
