"""The trackers against a gateway and a guest memory that are modelled here in plain Python."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import trio_test

from sync.dirty.merge import MergedTrackers
from sync.dirty.scan import ScanTracker
from sync.dirty.shared import LoggingTracker, MessageTracker, QueueTracker
from sync.dirty.tracker import DirtyError, Method, NoTracker, Tracker, choose_method
from sync.gateway.control.info import Supports
from sync.memory import PAGE_BYTES

N_PAGES = 150


def pages_in(bitmap: Any) -> set[int]:
    """The pages of a bitmap, bit by bit."""
    return {
        64 * word + bit
        for word, value in enumerate(bitmap.tolist())
        for bit in range(64)
        if value >> bit & 1
    }


@dataclass
class FakeMediation:
    dirty_fd: int | None
    n_pages: int
    half_bytes: int
    page_size: int = 4096
    layout_generation: int = 7


class FakeGateway:
    """Marks pages in one half of a memfd; `dirty` swaps the halves. Knows nothing of numpy."""

    def __init__(self, n_pages: int = N_PAGES, half_bytes: int = 32) -> None:
        self.n_pages = n_pages
        self.half_bytes = half_bytes
        self.fd = os.memfd_create("dirty")
        os.ftruncate(self.fd, 2 * half_bytes)
        self.active = 0
        self.generation = 7
        self.complete = True
        self.after_swap: Callable[[], None] = lambda: None

    def mark(self, page: int) -> None:
        at = self.active * self.half_bytes + page // 8
        byte = os.pread(self.fd, 1, at)[0]
        os.pwrite(self.fd, bytes([byte | 1 << page % 8]), at)

    def mediation(self, **changes: Any) -> FakeMediation:
        fields = {
            "dirty_fd": os.dup(self.fd),
            "n_pages": self.n_pages,
            "half_bytes": self.half_bytes,
        }
        return FakeMediation(**{**fields, **changes})

    async def dirty(self) -> tuple[int, int, bool]:
        quiet, self.active = self.active, 1 - self.active
        self.after_swap()
        await trio.lowlevel.checkpoint()
        return quiet, self.generation, self.complete

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()
    yield fake
    fake.close()


def scan(memory: Any, digests: Any) -> Any:
    """A scan by Python's own hash, page by page."""
    bitmap = np.zeros(-(-len(digests) // 64), np.uint64)
    for page in range(len(digests)):
        content = memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].tobytes()
        digest = np.uint64(hash(content) & (1 << 64) - 1)
        if digests[page] != digest:
            digests[page] = digest
            bitmap[page // 64] |= np.uint64(1 << page % 64)
    return bitmap


@pytest.mark.parametrize("kind", [LoggingTracker, QueueTracker, MessageTracker])
@given(rounds=st.lists(st.sets(st.integers(0, N_PAGES - 1), max_size=8), max_size=6))
def test_each_write_is_reported_once_and_remembered(
    kind: type[LoggingTracker], rounds: list[set[int]]
) -> None:
    async def main() -> None:
        gateway = FakeGateway()
        tracker = kind(gateway, N_PAGES)
        await tracker.start(gateway.mediation())
        for written in rounds:
            for page in written:
                gateway.mark(page)
            assert pages_in(await tracker.collect()) == written
        assert pages_in(await tracker.collect()) == set()
        assert pages_in(tracker.touched) == set().union(*rounds)
        await tracker.stop()
        gateway.close()

    trio.run(main)


class Machine:
    """A guest memory, a device that writes to it, and a copy of it on the other side."""

    def __init__(self, n_pages: int) -> None:
        self.memory = np.zeros(n_pages * PAGE_BYTES, np.uint8)
        self.copy = self.memory.copy()
        self.gateway = FakeGateway(n_pages)
        self.writes = 0

    def write(self, page: int) -> None:
        """DMA: the page changes, and the gateway marks it."""
        self.writes += 1
        self.memory[page * PAGE_BYTES + self.writes % PAGE_BYTES] ^= 0xA5
        self.gateway.mark(page)

    def send(self, page: int) -> None:
        place = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
        self.copy[place] = self.memory[place]


@pytest.mark.parametrize("kind", ["logging", "message", "scan"])
@settings(max_examples=30)
@given(data=st.data())
def test_i1_a_page_written_while_it_is_collected_or_copied_is_sent_again(
    kind: str, data: st.DataObject
) -> None:
    """The device writes at every point between two steps of ours; nothing may be missed."""
    n_pages = 70
    page = st.integers(0, n_pages - 1)

    async def main() -> None:
        machine = Machine(n_pages)
        tracker: Tracker
        if kind == "scan":
            tracker = ScanTracker(machine.memory, scan)
        elif kind == "logging":
            tracker = LoggingTracker(machine.gateway, n_pages)
        else:
            tracker = MessageTracker(machine.gateway, n_pages)
        await tracker.start(machine.gateway.mediation())

        def written_in_between() -> None:
            for each in data.draw(st.lists(page, max_size=3)):
                machine.write(each)

        machine.gateway.after_swap = written_in_between
        for _ in range(data.draw(st.integers(1, 3))):
            written_in_between()
            bitmap = await tracker.collect()
            written_in_between()
            for each in sorted(pages_in(bitmap)):
                machine.send(each)
                written_in_between()
        machine.gateway.after_swap = lambda: None
        for each in pages_in(await tracker.collect()):
            machine.send(each)
        assert np.array_equal(machine.copy, machine.memory)
        changed = np.flatnonzero(machine.copy.reshape(n_pages, PAGE_BYTES).any(axis=1))
        assert set(changed.tolist()) <= pages_in(tracker.touched)
        await tracker.stop()
        machine.gateway.close()

    trio.run(main)


@pytest.mark.parametrize("kind", ["logging", "message", "scan"])
@settings(max_examples=50)
@given(
    rounds=st.lists(
        st.tuples(
            st.sets(st.integers(0, N_PAGES - 1), max_size=6),
            st.sets(st.integers(0, N_PAGES - 1), max_size=6),
            st.integers(1, 6),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_i1_a_collection_that_is_given_up_loses_nothing(
    kind: str, rounds: list[tuple[set[int], set[int], int]]
) -> None:
    """Two devices write; a collection is cancelled at the n-th time that something was read."""

    async def main() -> None:
        machine, other = Machine(N_PAGES), FakeGateway()
        scopes = [trio.CancelScope()]
        left = 0

        def read_something() -> None:
            nonlocal left
            left -= 1
            if not left:
                scopes[-1].cancel()

        def scan_piece(memory: Any, digests: Any) -> Any:
            trio.from_thread.run_sync(read_something)
            return scan(memory, digests)

        machine.gateway.after_swap = other.after_swap = read_something
        tracker: Tracker
        if kind == "scan":
            tracker = ScanTracker(machine.memory, scan_piece)
        else:
            shared = LoggingTracker if kind == "logging" else MessageTracker
            tracker = shared(machine.gateway, N_PAGES)
        second = LoggingTracker(other, N_PAGES)
        await tracker.start(machine.gateway.mediation())
        await second.start(other.mediation())
        # The scan last: the other one has told by then.
        merged = MergedTrackers([second, tracker])
        owed: set[int] = set()
        for first_writes, second_writes, given_up_at in [*rounds, (set(), set(), 0)]:
            left = given_up_at
            for page in first_writes:
                machine.write(page)
            for page in second_writes:
                other.mark(page)
            owed |= first_writes | second_writes
            scopes.append(trio.CancelScope())
            with scopes[-1]:
                assert pages_in(await merged.collect()) == owed
                owed = set()
        assert not owed
        everything = set().union(*(first | second for first, second, _ in rounds))
        assert pages_in(merged.touched) == everything
        await merged.stop()
        machine.gateway.close()
        other.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sync.dirty.scan.PIECE_PAGES", 64)
        trio.run(main)


@trio_test
async def test_a_scan_is_given_up_after_the_piece_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sync.dirty.scan.PIECE_PAGES", 64)
    pieces = []
    scope = trio.CancelScope()

    def scan_piece(memory: Any, digests: Any) -> Any:
        pieces.append(len(digests))
        if len(pieces) > 3:
            trio.from_thread.run_sync(scope.cancel)
        return scan(memory, digests)

    tracker = ScanTracker(np.zeros(N_PAGES * PAGE_BYTES, np.uint8), scan_piece)
    await tracker.start(FakeMediation(None, N_PAGES, 0))
    assert pieces == [64, 64, 22]
    with scope:
        await tracker.collect()
    assert pieces == [64, 64, 22, 64]


@trio_test
async def test_bits_behind_the_last_page_do_not_count(gateway: FakeGateway) -> None:
    tracker = LoggingTracker(gateway, N_PAGES)
    await tracker.start(gateway.mediation())
    gateway.mark(N_PAGES - 1)
    gateway.mark(N_PAGES)
    assert pages_in(await tracker.collect()) == {N_PAGES - 1}
    await tracker.stop()
    await tracker.stop()


@trio_test
async def test_a_memory_map_that_changed_is_noticed(gateway: FakeGateway) -> None:
    tracker = LoggingTracker(gateway, N_PAGES)
    await tracker.start(gateway.mediation())
    gateway.generation += 1
    with pytest.raises(DirtyError, match="memory map changed"):
        await tracker.collect()
    await tracker.stop()


@trio_test
async def test_a_log_that_was_cut_short_stays_incomplete(gateway: FakeGateway) -> None:
    tracker = LoggingTracker(gateway, N_PAGES)
    await tracker.start(gateway.mediation(page_size=65536))
    assert tracker.page_size == 65536
    await tracker.collect()
    assert tracker.complete
    gateway.complete = False
    await tracker.collect()
    gateway.complete = True
    await tracker.collect()
    assert not tracker.complete
    await tracker.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_pages": N_PAGES + 1},
        {"half_bytes": 16},
        {"half_bytes": 28},
        {"half_bytes": 64},
        {"dirty_fd": None},
    ],
)
@trio_test
async def test_a_bitmap_that_does_not_fit_is_refused(
    gateway: FakeGateway, changes: dict[str, Any]
) -> None:
    mediation = gateway.mediation(**changes)
    tracker = LoggingTracker(gateway, N_PAGES)
    with pytest.raises(DirtyError):
        await tracker.start(mediation)
    if mediation.dirty_fd is not None:
        with pytest.raises(OSError):
            os.fstat(mediation.dirty_fd)


@trio_test
async def test_a_half_that_does_not_exist_is_refused(gateway: FakeGateway) -> None:
    tracker = LoggingTracker(gateway, N_PAGES)
    await tracker.start(gateway.mediation())
    gateway.active = -1
    with pytest.raises(DirtyError, match="half -1"):
        await tracker.collect()
    await tracker.stop()


@trio_test
async def test_the_scan_starts_from_what_was_there() -> None:
    memory = np.full(3 * PAGE_BYTES, 7, np.uint8)
    tracker = ScanTracker(memory, scan)
    with pytest.raises(DirtyError, match="not been started"):
        await tracker.collect()
    await tracker.start(FakeMediation(None, 3, 0))
    assert pages_in(await tracker.collect()) == set()
    memory[PAGE_BYTES] = 8
    assert pages_in(await tracker.collect()) == {1}
    assert pages_in(tracker.touched) == {1}
    await tracker.stop()


@trio_test
async def test_several_devices_are_one_bitmap() -> None:
    gateways = [FakeGateway(), FakeGateway()]
    trackers = [LoggingTracker(gateways[0], N_PAGES), MessageTracker(gateways[1], N_PAGES)]
    for gateway, tracker in zip(gateways, trackers, strict=True):
        await tracker.start(gateway.mediation())
    merged = MergedTrackers(trackers)
    gateways[0].mark(1)
    gateways[1].mark(1)
    gateways[1].mark(149)
    assert pages_in(await merged.collect()) == {1, 149}
    gateways[0].mark(64)
    assert pages_in(await merged.collect()) == {64}
    assert pages_in(merged.touched) == {1, 64, 149}
    assert merged.complete
    gateways[1].complete = False
    await merged.collect()
    assert not merged.complete
    await merged.stop()
    for gateway in gateways:
        gateway.close()
    with pytest.raises(DirtyError, match="same guest memory"):
        MergedTrackers([LoggingTracker(gateways[0], 1), LoggingTracker(gateways[1], 2)])


def test_the_choice_of_a_tracker() -> None:
    logging, queues = Supports(logging=True), Supports(queues=True)
    hardware = Supports(message=False)
    assert choose_method("auto", logging) == "logging"
    assert choose_method("auto", Supports()) == "message"
    assert choose_method("auto", Supports(logging=True, queues=True)) == "logging"
    assert choose_method("auto", queues) == "queues"
    assert choose_method("auto", hardware) == "scan"
    wanted: Method
    for wanted in ("scan", "message", "queues"):
        assert choose_method(wanted, Supports(logging=True, queues=True)) == wanted
    with pytest.raises(NoTracker, match="DMA logging"):
        choose_method("logging", queues)
    with pytest.raises(NoTracker, match="does not follow"):
        choose_method("queues", logging)
    with pytest.raises(NoTracker, match="of the host"):
        choose_method("message", hardware)
    asked = {each.method: each.asks_gateway_for for each in (LoggingTracker, ScanTracker)}
    assert asked == {"logging": "logging", "scan": "none"}
    assert MessageTracker.asks_gateway_for == "message"
    assert QueueTracker.asks_gateway_for == "queues"
