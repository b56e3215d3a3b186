"""Rounds that are given up lose no page, and progress goes on while a round takes long."""

import dataclasses
import io
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import trio
import trio.testing
from numpy.typing import NDArray

from ferry.errors import NotConverged
from ferry.migration.pacing import Pace
from ferry.migration.precopy import Precopy
from ferry.migration.report import Report
from ferry.migration.send_options import Options
from ferry.migration.verification import RollingProof
from ferry.migration.vmm_stream import VmmStream
from ferry.progress import Reporter
from sync.convergence import Limits
from sync.dirty.tracker import Bitmap
from sync.registers.interface import NOTHING_LEFT, StateLeft
from sync.vmm.driver import VmmProgress
from sync.vmm.errors import VmmError, VmmGone
from transport.sender import RoundStatistics
from transport.session.link import LinkState

N_PAGES = 256
FIRST_PASS = VmmProgress("active", 0, 300 << 20, 512 << 20, 7, 1, 4096, 0, "")
OPTIONS = Options(to="ipc:///x", qmp="q")
MEMORY = np.zeros(N_PAGES * 4096, np.uint8)
PACE = Pace(300)


class FakeDirty:
    """Each collection finds the next set of pages."""

    n_pages = N_PAGES

    def __init__(self, *found: set[int], takes_s: float = 0.0) -> None:
        self._found = list(found)
        self._takes_s = takes_s

    async def collect(self) -> Bitmap:
        await trio.sleep(self._takes_s)
        bits = np.zeros(N_PAGES, np.uint8)
        bits[sorted(self._found.pop(0) if self._found else set())] = 1
        return np.packbits(bits, bitorder="little").view(np.uint64)


class FakeLink:
    """A round takes as long as `busy` says, and moves half of its pages before it is stuck."""

    def __init__(self, busy: Callable[[], Any] = trio.lowlevel.checkpoint) -> None:
        self.sent: list[set[int]] = []
        self._busy = busy
        self._now: RoundStatistics | None = None
        self.verified: list[set[int]] = []
        self.differing = np.empty(0, np.uint32)
        self.sender = SimpleNamespace(
            round_progress=lambda: self._now,
            statistics=lambda: SimpleNamespace(round_trip_ns=0),
            verify=self._verify,
            link=LinkState(),
        )

    async def _verify(self, indices: NDArray[np.uint32]) -> NDArray[np.uint32]:
        await trio.lowlevel.checkpoint()
        self.verified.append({int(page) for page in indices})
        return self.differing

    async def send_pages(self, indices: NDArray[np.uint32]) -> RoundStatistics:
        pages = len(indices)
        self._now = RoundStatistics(1, pages, pages // 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
        await self._busy()
        self.sent.append({int(page) for page in indices})
        return RoundStatistics(1, pages, pages, pages, 0, 0, 0, 0, 0, pages, 0, 0, 1)

    def wire_bytes(self) -> dict[str, int]:
        return {"pages": int(trio.current_time()) * 1000, "VMM stream": 0}


class FakeVmm:
    def __init__(self, progress: VmmProgress = FIRST_PASS, paused_at: float = float("inf")) -> None:
        self.answer: VmmProgress | Exception = progress
        self._paused_at = paused_at

    async def paused_within(self, seconds: float) -> bool:
        now = trio.current_time()
        await trio.sleep(max(0.0, min(seconds, self._paused_at - now)))
        return trio.current_time() >= self._paused_at

    async def progress(self) -> VmmProgress:
        await trio.lowlevel.checkpoint()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    check_migration = progress


def precopy(
    link: FakeLink,
    dirty: FakeDirty,
    vmm: FakeVmm,
    said: io.StringIO | None = None,
    proof_ms: float = 0.0,
    stream: VmmStream | None = None,
    proof: RollingProof | None = None,
    throttle: Callable[[], Any] | None = None,
    options: Options = OPTIONS,
    state: StateLeft = NOTHING_LEFT,
) -> Precopy:
    async def proof_ns() -> int:
        return int(proof_ms * 1e6)

    async def state_left() -> StateLeft:
        return state

    reporter = Reporter("send", as_json=True, stream=said or io.StringIO())
    return Precopy(
        options,
        cast(Any, link),
        cast(Any, vmm),
        cast(Any, dirty),
        stream or VmmStream(MEMORY, [], PACE, lambda _: None, why_closed="not asked for"),
        PACE,
        proof or RollingProof(N_PAGES),
        proof_ns,
        state_left,
        throttle or trio.lowlevel.checkpoint,
        Report(session=""),
        reporter,
    )


def taking(*seconds: float) -> Callable[[], Any]:
    """Rounds that take so long, one after the other."""
    left = list(seconds)

    async def busy() -> None:
        await trio.sleep(left.pop(0))

    return busy


def test_i1_what_a_given_up_round_did_not_send_is_sent_by_the_last_one() -> None:
    link = FakeLink(trio.sleep_forever)

    async def body() -> None:
        rounds = precopy(link, FakeDirty({1, 200}, {2}), FakeVmm(), io.StringIO())
        with trio.move_on_after(0.5):
            await rounds.keep_small()
        assert link.sent == []
        link._busy = trio.lowlevel.checkpoint
        await rounds.finish()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == [{1, 2, 200}]


def test_what_a_finished_round_has_sent_is_not_sent_again() -> None:
    link = FakeLink()

    async def body() -> None:
        rounds = precopy(link, FakeDirty({1}, {2}, {3}), FakeVmm(), io.StringIO())
        with trio.move_on_after(0.15):
            await rounds.keep_small()
        await rounds.finish()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == [{1}, {2}, {3}]


def test_progress_unites_both_streams_in_the_middle_of_a_round() -> None:
    said = io.StringIO()

    async def body() -> None:
        rounds = precopy(FakeLink(trio.sleep_forever), FakeDirty(set(range(8))), FakeVmm(), said)
        with trio.move_on_after(3.5):
            await rounds.converge()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["progress"] * 3
    last = events[-1]
    assert last["own_remaining_bytes"] == 4 * 4096
    assert last["vmm_remaining_bytes"] == 300 << 20
    assert last["remaining_bytes"] == (300 << 20) + 4 * 4096
    assert last["vmm_dirty_bytes_per_s"] == 7 * 4096
    assert (last["round"], last["vmm_round"]) == (1, 1)
    assert last["predicted_downtime_ms"] is None
    line = io.StringIO()
    Reporter("send", as_json=False, stream=line).event("progress", **last)
    assert "left of devices 16.0 KiB, of the VMM 300.0 MiB" in line.getvalue()
    assert "downtime not known yet" in line.getvalue()
    assert "%" not in line.getvalue()


def test_a_guest_that_the_vmm_has_paused_by_itself_waits_for_no_more_rounds() -> None:
    link = FakeLink()

    async def body() -> None:
        paused_at = trio.current_time() + 0.25
        rounds = precopy(link, FakeDirty(*({n} for n in range(9))), FakeVmm(paused_at=paused_at))
        await rounds.converge()
        assert trio.current_time() == pytest.approx(paused_at)
        await rounds.finish()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == [{0}, {1}, {2}, {3}]


def test_i10_a_round_under_way_keeps_no_guest_waiting_that_the_vmm_has_paused_by_itself() -> None:
    link = FakeLink(trio.sleep_forever)

    async def body() -> None:
        paused_at = trio.current_time() + 5.0
        rounds = precopy(link, FakeDirty({1, 2}), FakeVmm(paused_at=paused_at))
        with pytest.raises(NotConverged, match=r"300 ms.*the guest goes on.*--downtime-limit"):
            await rounds.converge()
        assert trio.current_time() == pytest.approx(paused_at + OPTIONS.downtime_limit / 1e3)

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == []


def test_a_round_that_is_done_soon_after_the_guest_was_paused_is_waited_for() -> None:
    link = FakeLink(taking(5.2, 0.05))

    async def body() -> None:
        rounds = precopy(link, FakeDirty({1, 2}, {3}), FakeVmm(paused_at=trio.current_time() + 5.0))
        await rounds.converge()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == [{1, 2}, {3}]


def test_i10_what_was_written_during_a_long_round_is_sent_in_time_too() -> None:
    link = FakeLink(taking(4.9, 1.0))

    async def body() -> None:
        paused_at = trio.current_time() + 4.8
        rounds = precopy(link, FakeDirty({1, 2}, {3}), FakeVmm(paused_at=paused_at))
        with pytest.raises(NotConverged):
            await rounds.converge()
        assert trio.current_time() == pytest.approx(paused_at + OPTIONS.downtime_limit / 1e3)

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == [{1, 2}]


def test_a_scan_and_the_proof_are_part_of_the_downtime_that_is_predicted() -> None:
    said = io.StringIO()
    later = dataclasses.replace(FIRST_PASS, rounds=2, remaining_bytes=0)

    async def body() -> None:
        dirty = FakeDirty(takes_s=1.5)
        await precopy(FakeLink(), dirty, FakeVmm(later), said, proof_ms=200.0).converge()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    predicted = [e["predicted_downtime_ms"] for e in events if e["event"] == "round"]
    assert predicted[0] == pytest.approx(1500 + 200 + Limits().fixed_cost_ms)


def test_a_devices_own_state_that_does_not_fit_is_found_while_the_guest_runs() -> None:
    later = dataclasses.replace(FIRST_PASS, rounds=2, remaining_bytes=0)
    large = StateLeft(256 << 20, 20.0)

    async def body(on_stall: Literal["switch", "abort"]) -> Precopy:
        options = dataclasses.replace(OPTIONS, on_stall=on_stall)
        rounds = precopy(
            FakeLink(), FakeDirty({1, 2}), FakeVmm(later), options=options, state=large
        )
        await rounds.converge()
        return rounds

    clock = trio.testing.MockClock(autojump_threshold=0)
    with pytest.raises(NotConverged, match="give-up"):
        trio.run(body, "abort", clock=clock)
    switched = trio.run(body, "switch", clock=trio.testing.MockClock(autojump_threshold=0))
    assert switched.decided_downtime_ms > 5000
    assert switched.decided_for_vmm_ms < 100


@pytest.mark.parametrize("error", [VmmGone("gone"), VmmError("refused")])
def test_a_vmm_that_fails_ends_the_rounds_with_its_own_error(error: Exception) -> None:
    vmm = FakeVmm()
    vmm.answer = error

    async def body() -> None:
        await precopy(FakeLink(), FakeDirty(), vmm, io.StringIO()).converge()

    with pytest.raises(type(error), match=str(error)):
        trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


class OpenStream(VmmStream):
    """Open; what it announces comes with each collection."""

    is_open = True
    is_exclusive = True

    def __init__(self, *found: set[int]) -> None:
        super().__init__(MEMORY, [], PACE, lambda _: None, why_closed="it is scripted")
        self._found = list(found)
        self.told: list[set[int]] = []

    def collect(self) -> tuple[Bitmap, float]:
        found = self._found.pop(0) if self._found else set()
        bits = np.zeros(N_PAGES, np.uint8)
        bits[sorted(found)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint64), float(len(found))

    def wrote(self, pages: NDArray[np.uint32]) -> None:
        self.told.append({int(page) for page in pages})


def test_i1_what_is_announced_and_what_devices_wrote_is_one_dirty_set() -> None:
    link, stream = FakeLink(), OpenStream({1, 2}, {2, 250})

    async def body() -> None:
        rounds = precopy(link, FakeDirty({2, 9}, {7}), FakeVmm(), stream=stream)
        with trio.move_on_after(0.05):
            await rounds.keep_small()
        await rounds.finish()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == [{1, 2, 9}, {2, 7, 250}]
    assert stream.told[:2] == [{2, 9}, {7}]


def test_i1_what_is_found_beside_a_round_is_owed_after_it() -> None:
    link = FakeLink(taking(0.15, 0.15, 1e9, 0.0))
    dirty = FakeDirty({1}, {1, 2}, {3}, {4, 5})

    async def body() -> None:
        rounds = precopy(link, dirty, FakeVmm(paused_at=0.4), stream=OpenStream())
        with pytest.raises(NotConverged):
            await rounds.converge()
        await rounds.finish()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert link.sent == [{1}, {1, 2}, {3, 4, 5}]


def test_a_pass_of_the_vmm_is_judged_once_by_what_it_has_still_to_announce() -> None:
    said = io.StringIO()
    later = dataclasses.replace(FIRST_PASS, rounds=2, remaining_bytes=40 << 20)

    async def body() -> None:
        vmm = FakeVmm(later)
        options = dataclasses.replace(OPTIONS, on_stall="abort", max_rounds=5)
        rounds = precopy(FakeLink(), FakeDirty(), vmm, said, stream=OpenStream(), options=options)
        with trio.move_on_after(20) as scope:
            await rounds.converge()
        assert scope.cancelled_caught

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    judged = [e for e in events if e["event"] == "round" and e["remaining_pages"] is not None]
    assert [event["remaining_pages"] for event in judged] == [10240]
    assert len([event for event in events if event["event"] == "round"]) < 10


def test_a_round_in_which_the_link_was_lost_is_not_judged_by() -> None:
    said = io.StringIO()
    later = dataclasses.replace(FIRST_PASS, rounds=2, remaining_bytes=0)

    async def lose_link() -> None:
        await trio.sleep(30)
        links = link.sender.link.resumed + 1
        link.sender.link = LinkState(resumed=min(links, 2))

    link = FakeLink(lose_link)

    async def body() -> None:
        await precopy(link, FakeDirty({1}, {2}, {3}), FakeVmm(later), said).converge()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    judged = [e["predicted_downtime_ms"] is not None for e in events if e["event"] == "round"]
    assert judged == [False, False, True, False]  # the last one follows from the decision


def test_memory_that_was_never_used_does_not_promise_a_short_downtime() -> None:
    """As many pages are left as the first pass has sent, but that sent zeros: no switch yet."""
    said = io.StringIO()
    later = dataclasses.replace(FIRST_PASS, rounds=2, remaining_bytes=250 * 4096)

    class Unused(FakeLink):
        async def send_pages(self, pages: NDArray[np.uint32]) -> RoundStatistics:
            round_ = await super().send_pages(pages)
            return dataclasses.replace(round_, zero=round_.sent_pages, duration_ns=10**8)

    async def body() -> None:
        stream, vmm = OpenStream(set(range(250))), FakeVmm(later)
        with trio.move_on_after(2):
            await precopy(Unused(), FakeDirty(), vmm, said, stream=stream).converge()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    rows = [json.loads(line) for line in said.getvalue().splitlines()]
    predicted = [r["predicted_downtime_ms"] for r in rows if r.get("predicted_downtime_ms")]
    assert predicted[0] > OPTIONS.downtime_limit


@pytest.mark.parametrize("counts", [True, False])
def test_a_stall_throttles_the_guest_once_before_it_switches(counts: bool) -> None:
    """Also where the VMM looks again at what is dirty and does not count that as a pass."""
    throttled: list[float] = []

    class Busy(FakeVmm):
        """Whenever it is asked again it has begun another pass, with as much to do as before."""

        async def check_migration(self) -> VmmProgress:
            await trio.lowlevel.checkpoint()
            now = self.answer
            assert isinstance(now, VmmProgress)
            rounds = now.rounds + 1 if counts or now.rounds < 2 else now.rounds
            left = (200 if now.remaining_bytes == 400 << 20 else 400) << 20
            self.answer = dataclasses.replace(now, rounds=rounds, remaining_bytes=left)
            return self.answer

    async def throttle() -> None:
        throttled.append(trio.current_time())

    async def body() -> None:
        options = dataclasses.replace(OPTIONS, on_stall="throttle")
        await precopy(
            FakeLink(), FakeDirty(), Busy(), stream=OpenStream(), options=options, throttle=throttle
        ).converge()

    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(throttled) == 1
