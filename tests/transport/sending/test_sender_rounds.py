"""Rounds and comparisons over real sockets, against plain copies of memory."""

import itertools
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transport.running import run_trio
from transport.receiver import ReceiverOptions
from transport.receiving import apply
from transport.sender import RoundStatistics, SenderOptions
from transport.sending import rounds
from transport.sending.codec_choice import Choice
from transport.session.watch import WATCH_S
from transport.wire.codec import LZ4, Codec, Method
from transport.wire.errors import PeerClosed, PeerLost, RecordError
from transport.wire.frames import split_by_lane
from transport.wire.records import Ack

PAGE = 4096
DEADLINE_S = 20
SMALL_FRAMES = SenderOptions(lanes=3, frame_bytes=16 << 10, codec=LZ4)


def page_list(*pages: int) -> npt.NDArray[np.uint32]:
    return np.array(pages, np.uint32)


def every_page(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    return np.arange(memory.size // PAGE, dtype=np.uint32)


def scribble(memory: npt.NDArray[np.uint8], pages: npt.NDArray[np.uint32], rng: Any) -> None:
    """Change pages in the ways that lead to every form on the wire."""
    for page in pages:
        view = memory[int(page) * PAGE : (int(page) + 1) * PAGE]
        match rng.randrange(4):
            case 0:
                view[:] = 0
            case 1:
                view[:] = np.frombuffer(rng.randbytes(PAGE), np.uint8)
            case 2:
                view[:] = rng.randrange(256)
            case 3:
                view[rng.randrange(PAGE)] ^= 1 + rng.randrange(255)


@pytest.fixture
def slow_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the receiver's lanes overtake each other: each frame waits for up to some ms."""
    rng = random.Random(7)
    handle = apply.ApplyLane._handle

    def slowly(self: Any, *arguments: Any) -> bytes:
        threading.Event().wait(rng.random() * 0.004)
        return handle(self, *arguments)

    monkeypatch.setattr(apply.ApplyLane, "_handle", slowly)


def test_a_round_brings_every_page_over(bind_url: str, link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(bind_url, n_pages=1000, sending=SMALL_FRAMES) as pair:
            rng = random.Random(1)
            for round_no in range(4):
                scribble(pair.source, every_page(pair.source), rng)
                done = await pair.sender.send_round(every_page(pair.source), round_no)
                assert np.array_equal(pair.source, pair.target)
                assert done.pages == done.done_pages == 1000
                assert done.sent_pages + done.same == 1000
                sent = done.zero + done.delta + done.copy + done.lz4 + done.raw
                assert sent == done.sent_pages
                assert done.resent == 0
                assert done.round_no == round_no
            assert pair.receiver.statistics().pages_applied > 1000

    run_trio(scenario)


def test_the_choice_of_a_codec_hears_of_each_round_once(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pages and frames it has; a round may be shorter than the one in front of it."""
    begun = []
    pick = Choice.pick

    def spy(self: Choice, now: float, **arguments: Any) -> Codec:
        begun.append(arguments["begins"])
        return pick(self, now, **arguments)

    monkeypatch.setattr(Choice, "pick", spy)

    async def scenario() -> None:
        async with link_pair(n_pages=1000, sending=SMALL_FRAMES) as pair:
            for round_no, n_pages in enumerate((1000, 900, 300)):
                scribble(pair.source, every_page(pair.source), random.Random(round_no))
                begun.clear()
                pages = np.arange(n_pages, dtype=np.uint32)
                await pair.sender.send_round(pages, round_no)
                expected = [part.size for part in split_by_lane(pages, SMALL_FRAMES.lanes)]
                assert sorted(filter(None, begun)) == sorted(expected)
                assert 0 in begun

    run_trio(scenario)


def test_only_the_pages_asked_for_are_sent(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=500) as pair:
            pair.source[:] = 1
            await pair.sender.send_round(page_list(0, 63, 64, 65, 499), 1)
            held = pair.target.reshape(-1, PAGE).any(axis=1).nonzero()[0]
            assert held.tolist() == [0, 63, 64, 65, 499]
            done = await pair.sender.send_round(page_list(), 2)
            assert (done.pages, done.sent_pages, done.wire_bytes) == (0, 0, 0)

    run_trio(scenario)


def test_unchanged_pages_do_not_cross_the_wire(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=300) as pair:
            pair.source[:] = 3
            await pair.sender.send_round(every_page(pair.source), 1)
            done = await pair.sender.send_round(every_page(pair.source), 2)
            assert (done.same, done.wire_bytes, done.done_pages) == (300, 0, 300)

    run_trio(scenario)


# The fixture is a factory without state, so that examples may share it.
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    lanes=st.integers(1, 4),
    cached_pages=st.integers(0, 200),
    dirty=st.lists(st.lists(st.integers(0, 399), max_size=120), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_any_rounds_records_and_tunnel_bytes_interleaved_arrive_intact(
    link_pair: Any, lanes: int, cached_pages: int, dirty: list[list[int]], seed: int
) -> None:
    rng = random.Random(seed)

    async def scenario() -> None:
        options = SenderOptions(lanes=lanes, frame_bytes=16 << 10)
        async with link_pair(n_pages=400, sending=options, cache_bytes=cached_pages * PAGE) as pair:
            payloads = [rng.randbytes(rng.randrange(3000)) for _ in range(30)]
            stream = rng.randbytes(500_000)

            async def records() -> None:
                for number, payload in enumerate(payloads):
                    await pair.sender.send_record(number, payload)
                    await pair.receiver.send_record(number, payload)

            async def tunnel() -> None:
                for start in range(0, len(stream), 7919):
                    await pair.sender.tunnel_send(stream[start : start + 7919])
                await pair.sender.tunnel_send_eof()

            async def receive(link: Any) -> None:
                for number, payload in enumerate(payloads):
                    record = await link.receive_record()
                    assert (record.kind, record.payload) == (number, payload)

            async def receive_tunnel() -> None:
                got = bytearray()
                while chunk := await pair.receiver.tunnel_receive():
                    got += chunk
                assert got == stream

            async with trio.open_nursery() as nursery:
                for task in (records, tunnel, receive_tunnel):
                    nursery.start_soon(task)
                nursery.start_soon(receive, pair.sender)
                nursery.start_soon(receive, pair.receiver)
                expected = pair.target.copy()
                for round_no, pages in enumerate(dirty):
                    indices = np.unique(np.array(pages, np.uint32))
                    scribble(pair.source, indices, rng)
                    await pair.sender.send_round(indices, round_no)
                    for page in indices:
                        part = slice(int(page) * PAGE, (int(page) + 1) * PAGE)
                        expected[part] = pair.source[part]
                    assert np.array_equal(pair.target, expected)

    run_trio(scenario)


@pytest.mark.usefixtures("slow_receiver")
def test_i3_a_newer_copy_stays_whatever_lanes_and_cancelled_rounds_do(link_pair: Any) -> None:
    async def scenario() -> None:
        options = SenderOptions(lanes=4, frame_bytes=16 << 10)
        async with link_pair(
            n_pages=512, sending=options, receiving=ReceiverOptions(window_frames=8)
        ) as pair:
            rng = random.Random(3)
            pages = every_page(pair.source)
            for round_no in range(12):
                scribble(pair.source, pages, rng)
                if round_no % 3 != 2:
                    # Leave older copies of all these pages under way on every lane.
                    with trio.move_on_after(0.01 * rng.random()):
                        await pair.sender.send_round(pages, round_no)
                else:
                    await pair.sender.send_round(pages, round_no)
                    assert np.array_equal(pair.source, pair.target)
                    await pair.sender.send_record(round_no, b"", flush=True)
                    assert np.array_equal(pair.source, pair.target)

    run_trio(scenario)


def test_i3_all_copies_of_a_page_take_the_same_lane(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes_of_page: dict[int, set[int]] = {}
    encode = rounds.LaneSource.encode

    def spy(self: Any, indices: Any, start: int, *rest: Any) -> Any:
        frame = encode(self, indices, start, *rest)
        for page in indices[start : start + frame.consumed]:
            lanes_of_page.setdefault(int(page), set()).add(self._lane)
        return frame

    monkeypatch.setattr(rounds.LaneSource, "encode", spy)

    async def scenario() -> None:
        async with link_pair(n_pages=700, sending=SMALL_FRAMES) as pair:
            rng = random.Random(5)
            for round_no in range(6):
                indices = np.array(sorted(rng.sample(range(700), 300)), np.uint32)
                await pair.sender.send_round(indices, round_no)

    run_trio(scenario)
    assert {len(lanes) for lanes in lanes_of_page.values()} == {1}
    assert set.union(*lanes_of_page.values()) == {0, 1, 2}


def test_pages_that_are_written_again_and_again_become_deltas(link_pair: Any) -> None:
    """By whichever codec: those that compress nothing keep bases after the first round, too."""

    async def scenario() -> None:
        async with link_pair(n_pages=8192, cache_bytes=8192 * PAGE) as pair:
            rng = np.random.default_rng(1)
            pair.source[:] = rng.integers(0, 256, pair.source.size, np.uint8)
            found = []
            for round_no in range(3):
                found.append(await pair.sender.send_round(every_page(pair.source), round_no))
                pair.source[::PAGE] ^= 1
            assert found[2].delta > found[2].pages // 2
            assert found[2].wire_bytes < found[0].wire_bytes // 2

    run_trio(scenario)


def test_i5_a_delta_on_another_base_is_resent_in_full_within_the_round(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=600, cache_bytes=1200 * PAGE, sending=SMALL_FRAMES) as pair:
            rng = np.random.default_rng(1)
            pair.source[:] = rng.integers(0, 256, pair.source.size, np.uint8)
            await pair.sender.send_round(every_page(pair.source), 1)
            overwritten = page_list(3, 64, 300, 599)
            for page in overwritten:  # as the VMM's own stream does it
                pair.target[int(page) * PAGE + 7] ^= 1
            pair.source[::PAGE] ^= 1
            done = await pair.sender.send_round(every_page(pair.source), 2)
            assert done.resent == 4
            assert done.sent_pages == 604
            assert done.done_pages == 600
            assert np.array_equal(pair.source, pair.target)
            assert pair.receiver.statistics().pages_rejected == 4

    run_trio(scenario)


@pytest.mark.parametrize("codec", [LZ4, Codec(Method.ZSTD, 1)])
def test_i5_copies_of_a_page_that_is_another_there_are_resent_in_full_within_the_round(
    codec: Codec, link_pair: Any
) -> None:
    async def scenario() -> None:
        options = SenderOptions(lanes=2, frame_bytes=16 << 10, codec=codec)
        async with link_pair(n_pages=640, sending=options) as pair:
            pages = pair.source.reshape(-1, PAGE)
            # One for each lane, so that their digests share no entry of a table.
            contents = np.random.default_rng(1).integers(0, 256, (2, PAGE), np.uint8)
            pages[[0, 64]] = contents
            await pair.sender.send_round(page_list(0, 64), 1)
            pair.target[:PAGE] ^= 1  # as the VMM's own stream does it
            pages[128:] = contents[np.arange(128, 640) // 64 % 2]
            done = await pair.sender.send_round(every_page(pair.source)[128:], 2)
            assert done.copy == done.done_pages == 512
            assert done.resent == 256
            assert done.sent_pages == 512 + 256
            assert np.array_equal(pair.source[128 * PAGE :], pair.target[128 * PAGE :])
            assert pair.receiver.statistics().pages_rejected == 256
            # The session goes on, and so do copies.
            pages[2:50] = contents[0]
            done = await pair.sender.send_round(every_page(pair.source)[1:128], 3)
            assert (done.resent, done.copy) == (0, 48)
            assert (await pair.sender.verify()).tolist() == [0]

    run_trio(scenario)


def test_i6_verify_finds_every_page_that_differs_and_the_next_round_mends_it(
    bind_url: str, link_pair: Any
) -> None:
    async def scenario() -> None:
        async with link_pair(bind_url, n_pages=3000) as pair:
            rng = random.Random(2)
            scribble(pair.source, every_page(pair.source), rng)
            await pair.sender.send_round(every_page(pair.source), 1)
            assert (await pair.sender.verify()).size == 0
            for count in (1, 2, 40, 700):
                broken = sorted(rng.sample(range(3000), count))
                for page in broken:
                    pair.target[page * PAGE + rng.randrange(PAGE)] ^= 1 << rng.randrange(8)
                asked = np.array(sorted(rng.sample(range(3000), 1500)), np.uint32)
                some = await pair.sender.verify(asked)
                assert some.tolist() == sorted(set(broken) & set(asked.tolist()))
                found = await pair.sender.verify()
                assert found.dtype == np.uint32
                assert found.tolist() == broken
                await pair.sender.send_round(found, 2)
                assert (await pair.sender.verify()).size == 0
                assert np.array_equal(pair.source, pair.target)
            assert (await pair.sender.verify(page_list())).size == 0

    run_trio(scenario)


def test_regions_are_compared_by_digest(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=20_000) as pair:
            pair.target[19_999 * PAGE] = 1
            regions = [(0, 20_000), (0, 19_999), (5, 10), (7, 0)]
            compared = await pair.sender.compare_regions(regions)
            assert [(region.first_page, region.n_pages) for region in compared] == regions
            assert [region.equal for region in compared] == [False, True, True, True]
            assert all(len(region.local) == 64 for region in compared)
            for outside in ((0, 20_001), (20_000, 1), (-1, 1), (1, -1)):
                with pytest.raises(ValueError, match="pages"):
                    await pair.sender.compare_regions([outside])

    run_trio(scenario)


@pytest.mark.usefixtures("slow_receiver")
def test_progress_can_be_read_while_a_round_runs(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=2000, sending=SMALL_FRAMES) as pair:
            assert pair.sender.round_progress() is None
            pair.source[:] = np.random.default_rng(1).integers(0, 256, pair.source.size, np.uint8)
            seen: list[RoundStatistics] = []

            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    while True:
                        if (progress := pair.sender.round_progress()) is not None:
                            seen.append(progress)
                        await trio.sleep(0.005)

                nursery.start_soon(watch)
                done = await pair.sender.send_round(every_page(pair.source), 1)
                nursery.cancel_scope.cancel()
            assert any(0 < progress.done_pages < 2000 for progress in seen)
            for earlier, later in itertools.pairwise(seen):
                assert earlier.wire_bytes <= later.wire_bytes
                assert earlier.done_pages <= later.done_pages
            assert pair.sender.round_progress() == done
            assert pair.sender.statistics().lane_bytes == done.wire_bytes

    run_trio(scenario)


def test_a_cancelled_round_leaves_a_session_that_works(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=4000, sending=SMALL_FRAMES) as pair:
            for round_no in range(5):
                scribble(pair.source, every_page(pair.source)[::7], random.Random(round_no))
                with trio.move_on_after(0.001 * round_no):
                    await pair.sender.send_round(every_page(pair.source), round_no)
            await pair.sender.send_round(every_page(pair.source), 9)
            assert np.array_equal(pair.source, pair.target)

    run_trio(scenario)


def _has_begun(sender: Any) -> bool:
    progress = sender.round_progress()
    return progress is not None and progress.done_pages > 0


@pytest.mark.usefixtures("slow_receiver")
def test_a_cancelled_round_sends_no_more(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=4000, sending=SMALL_FRAMES) as pair:
            pair.source[:] = np.random.default_rng(1).integers(0, 256, pair.source.size, np.uint8)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pair.sender.send_round, every_page(pair.source), 1)
                    # Progress notifies nobody.
                    for _ in iter(lambda: _has_begun(pair.sender), True):
                        await trio.sleep(0.001)
                    scope.cancel()
            await pair.sender.send_round(page_list(0, 64, 128), 2)  # behind it on every lane
            assert 0 < pair.receiver.statistics().pages_applied < 4000

    run_trio(scenario)


def test_a_bandwidth_limit_makes_small_frames_and_starves_nobody(link_pair: Any) -> None:
    async def scenario() -> None:
        options = SenderOptions(bandwidth_bytes_per_s=8_000_000)
        async with link_pair(n_pages=500, sending=options) as pair:
            pair.source[:] = np.random.default_rng(1).integers(0, 256, pair.source.size, np.uint8)
            got = 0

            async with trio.open_nursery() as nursery:

                async def fill_tunnel() -> None:
                    while True:
                        await pair.sender.tunnel_send(bytes(100_000))

                async def drain_tunnel() -> None:
                    nonlocal got
                    while True:
                        got += len(await pair.receiver.tunnel_receive())

                nursery.start_soon(fill_tunnel)
                nursery.start_soon(drain_tunnel)
                started = trio.current_time()
                done = await pair.sender.send_round(every_page(pair.source), 1)
                passed = trio.current_time() - started
                total = done.wire_bytes + got
                nursery.cancel_scope.cancel()
            assert np.array_equal(pair.source, pair.target)
            frames = pair.receiver.statistics().frames
            assert done.wire_bytes / frames <= 8_000_000 * 0.02
            assert got > done.wire_bytes / 10
            # Not a measurement: the bucket's arithmetic bounds what can have gone in this time.
            assert total <= 8_000_000 * (passed + 0.1) + 500_000

    run_trio(scenario)


def test_i9_acknowledgements_that_never_come_end_the_round(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()

    def stuck(*_: Any) -> bytes:
        forever.wait(DEADLINE_S)
        return Ack(0, page_list()).pack()

    monkeypatch.setattr(apply.ApplyLane, "_handle", stuck)

    async def scenario() -> None:
        async with link_pair(n_pages=10, sending=SenderOptions(progress_timeout_s=0.3)) as pair:
            with pytest.raises(PeerLost, match="applied nothing"):
                await pair.sender.send_round(every_page(pair.source), 1)
            forever.set()

    run_trio(scenario)


def test_a_round_that_waits_as_the_link_is_left_ends(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the descriptor that it waits for is given back before trio looks at it again."""
    asked, answered = threading.Event(), threading.Event()

    def stuck(*_: Any) -> bytes:
        asked.set()
        answered.wait(DEADLINE_S)
        return Ack(0, page_list()).pack()

    monkeypatch.setattr(apply.ApplyLane, "_handle", stuck)

    async def scenario() -> None:
        async def perform(pair: Any) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await pair.sender.send_round(every_page(pair.source), 1)
            answered.set()

        async with trio.open_nursery() as nursery:
            with pytest.raises(ExceptionGroup):
                async with link_pair(n_pages=10) as pair:
                    nursery.start_soon(perform, pair)
                    await trio.to_thread.run_sync(asked.wait, DEADLINE_S)
                    monkeypatch.setattr(pair.sender._performed, "set", lambda: None)
                    raise OSError("left")

    run_trio(scenario)


def test_a_time_in_which_this_side_was_stopped_is_not_the_receivers_silence(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_s = 0.0
    applied = threading.Event()
    handle = apply.ApplyLane._handle

    def late(*arguments: Any) -> bytes:
        nonlocal stopped_s
        stopped_s = 3600.0
        applied.wait(4 * WATCH_S)  # the lane looks at its progress meanwhile
        return handle(*arguments)

    async def scenario() -> None:
        async with link_pair(n_pages=10, sending=SenderOptions(progress_timeout_s=60)) as pair:
            await pair.sender.verify()
            monkeypatch.setattr(apply.ApplyLane, "_handle", late)
            clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped_s)
            monkeypatch.setattr("transport.sending.lanes.time", clock)
            await pair.sender.send_round(every_page(pair.source), 1)
            assert np.array_equal(pair.source, pair.target)

    run_trio(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        Ack(1, page_list()),
        Ack(0, page_list(50)),
        Ack(0, page_list(0, 64)),
        Ack(0, page_list(1)),
    ],
    ids=["sequence", "not sent", "other lane", "rejected for ever"],
)
def test_i9_acknowledgements_of_what_was_not_sent_end_the_session(
    answer: Ack, link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = [0]

    def lie(self: Any, *_: Any) -> bytes:
        sequence[0] += 1
        return Ack(answer.sequence + sequence[0] - 1, answer.rejected).pack()

    async def scenario() -> None:
        async with link_pair(n_pages=70, sending=SenderOptions(lanes=2)) as pair:
            monkeypatch.setattr(apply.ApplyLane, "_handle", lie)
            with pytest.raises(RecordError) as failed:
                await pair.sender.send_round(page_list(0, 1, 2), 1)
            # The other side is told what it did.
            with pytest.raises(PeerClosed, match=str(failed.value)):
                await pair.receiver.receive_record()

    run_trio(scenario)
