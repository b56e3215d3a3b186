"""The tunnel, and the source VMM's stream on its way into it: what is passed on, and when."""

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from numpy.typing import NDArray

from ferry.errors import Mismatch
from ferry.migration import vmm_stream
from ferry.migration.pacing import Pace
from ferry.migration.vmm_stream import StreamForm, VmmStream
from ferry.nurseries import ungrouped
from sync.vmm.stream.errors import MappingRefuted, StreamNotFollowed
from sync.vmm.stream.kernel import follow_records
from sync.vmm.stream.mapping import FileRange
from tests.sync.vmm.stream.streams import PAGE, Block, Record, StreamWriter, parse
from transport.session.link import LinkThread, SessionEnd

N_PAGES = 96
BLOCK = Block(b"ram", N_PAGES)
TAIL = b"\4the state of the devices"


@pytest.fixture(autouse=True)
def as_python_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop over records is not compiled for these few."""
    monkeypatch.setattr(vmm_stream, "STREAM_KERNEL", follow_records)


class Tunnel(SessionEnd):
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.sent = b""
        self.ended = False

    def _threads(self) -> list[LinkThread]:
        return []

    async def tunnel_send(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data

    async def tunnel_send_eof(self) -> None:
        self.ended = True


class Host:
    """A source's memory, its stream, and what came of it."""

    def __init__(self, *, same: bool = True, **options: Any) -> None:
        rng = np.random.default_rng(1)
        self.memory: NDArray[np.uint8] = rng.integers(0, 256, N_PAGES * PAGE, np.uint8)
        self.said: list[str] = []
        self.tunnel = Tunnel()
        self.pace = Pace(300)
        self._behind = self.memory if same else rng.integers(0, 256, N_PAGES * PAGE, np.uint8)
        files = [FileRange(0, N_PAGES, "file", 0)]
        self.stream = VmmStream(self._behind, files, self.pace, self.said.append, **options)
        self.writer = StreamWriter([BLOCK])

    def records(self, pages: range) -> list[Record]:
        return [
            Record(b"ram", page, self.memory[page * PAGE : (page + 1) * PAGE].tobytes())
            for page in pages
        ]

    def pieces(self, last: range = range(0)) -> list[bytes]:
        """A stream; the last part holds `last`."""
        writer = self.writer
        return [
            writer.header() + writer.setup(),
            writer.part(self.records(range(N_PAGES))),
            writer.part(self.records(last), kind=3),
            TAIL,
        ]

    def run(
        self, pieces: list[bytes], during: Callable[[], Awaitable[None]], *, complete: bool = True
    ) -> None:
        """Has the VMM send `pieces` and close, while `during` runs."""

        async def judge() -> bool:
            assert not self.tunnel.ended
            return complete

        async def main() -> None:
            ours, theirs = trio.testing.memory_stream_pair()

            async def send() -> None:
                for piece in pieces:
                    await theirs.send_all(piece)
                await theirs.aclose()

            with trio.fail_after(60), ungrouped():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    nursery.start_soon(during)
                    await self.stream.carry(ours, self.tunnel, judge)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    async def release(self) -> None:
        await self.stream.tail_began.wait()
        self.stream.release_tail()

    def announced(self) -> set[int]:
        bits, _ = self.stream.collect()
        return {*np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()}


async def nothing() -> None:
    """Nothing is done while the stream goes."""


@pytest.mark.parametrize("complete", [True, False])
def test_the_end_of_a_stream_that_broke_off_is_not_passed_on(complete: bool) -> None:
    host = Host(why_closed="not asked for")

    host.run([b"a page"], nothing, complete=complete)
    assert host.tunnel.sent == b"a page" or not complete
    assert host.tunnel.ended is complete
    assert host.said == ["the VMM's stream is carried as it is: not asked for"]


def test_pages_are_announced_and_the_tail_waits_for_them() -> None:
    host = Host()
    found: list[set[int]] = []

    async def rounds() -> None:
        await host.stream.tail_began.wait()
        await trio.sleep(5)  # on a clock that jumps: all that can be passed on is
        found.append(host.announced())
        assert TAIL not in host.tunnel.sent
        assert not host.tunnel.ended
        host.stream.acknowledged()
        host.stream.release_tail()

    host.run(host.pieces(range(3)), rounds)
    assert found == [{*range(N_PAGES)}]
    assert host.tunnel.sent.endswith(TAIL)
    assert host.tunnel.ended
    parsed = parse(host.tunnel.sent)
    assert parsed.records == []
    report = host.stream.report()
    assert report["form"] == "open"
    assert report["tail_bytes"] == len(TAIL)
    assert report["pages"] == N_PAGES + 3


def test_i1_a_page_is_announced_again_after_it_was_collected() -> None:
    """Also while the round that it was collected for is under way."""
    host = Host()
    found: list[set[int]] = []
    original = host.stream._note

    def note(event: Any) -> None:
        original(event)
        host.stream.acknowledged()  # what was collected before this was announced
        found.append(host.announced())

    host.stream._note = note  # type: ignore[method-assign]

    async def release() -> None:
        await host.stream.tail_began.wait()
        assert host.announced() == set()
        host.stream.release_tail()

    host.run(host.pieces(range(7, 9)), release)
    assert found[0] == {*range(N_PAGES)}
    assert found[-1] == {7, 8}


def test_what_the_vmm_has_announced_it_has_no_longer_to_look_at() -> None:
    host = Host()
    host.pace.sent(1 << 20, 1 << 32, 1.0, 0.0)
    host.pace.remain(N_PAGES + 3)
    ahead = host.pace.max_backlog
    host.run(host.pieces(range(3)), host.release)
    assert host.pace.max_backlog == pytest.approx(ahead - N_PAGES - 3)


def test_the_vmm_is_not_read_while_too_much_is_announced_but_never_for_long() -> None:
    host = Host()
    host.pace.sent(1, 4096, 1.0, 0.0)
    host.stream._pace = Small()
    waits: list[float] = []

    async def rounds() -> None:
        began = trio.current_time()
        await host.stream.tail_began.wait()
        waits.append(trio.current_time() - began)
        host.stream.release_tail()

    host.run(host.pieces(), rounds)
    assert vmm_stream.UNREAD_S <= waits[0] <= 4 * vmm_stream.UNREAD_S


def test_from_the_switchover_on_everything_is_read_at_once() -> None:
    host = Host()
    host.stream._pace = Small()
    host.stream.hurry()

    async def rounds() -> None:
        began = trio.current_time()
        await host.stream.tail_began.wait()
        assert trio.current_time() == began
        host.stream.release_tail()

    host.run(host.pieces(), rounds)


class Small(Pace):
    """Lets hardly anything be under way."""

    def __init__(self) -> None:
        super().__init__(300)

    @property
    def max_backlog(self) -> float:
        return 1.0


def test_a_stream_of_another_form_is_carried_as_it_is() -> None:
    host = Host()
    data = b"a form of one's own, as a small VMM has it" * 3
    host.run([data], nothing)
    assert host.tunnel.sent == data
    assert host.stream.form is StreamForm.CLOSED
    assert "carried as it is: the stream begins with" in host.said[0]


def test_memory_that_is_not_the_vmms_is_carried_as_it_is() -> None:
    host = Host(same=False)
    pieces = host.pieces()

    async def release() -> None:
        await host.stream.tail_began.wait()
        host.stream.release_tail()

    host.run(pieces, release)
    assert host.tunnel.sent == b"".join(pieces)
    assert host.announced() == set()
    assert host.said == [
        "the VMM's stream is carried as it is: RAM block ram is not proven to be shared memory"
    ]


@pytest.mark.parametrize("same", [True, False])
def test_what_has_to_be_opened_and_cannot_is_refused(same: bool) -> None:
    host = Host(same=same, must_open=True)
    pieces = [b"a form of one's own"] if same else host.pieces()
    with pytest.raises(Mismatch, match="--vmm-stream open"):
        host.run(pieces, nothing)


def test_i6_a_proof_that_turns_out_wrong_lets_no_tail_through() -> None:
    host = Host()
    pieces = host.pieces()
    # The last page is not what the VMM has sent, and nobody says that it was written.
    host.memory[4 * PAGE] ^= 1
    with pytest.raises(MappingRefuted):
        host.run(pieces, nothing)
    assert TAIL not in host.tunnel.sent


def test_what_devices_wrote_does_not_count_against_the_proof() -> None:
    host = Host()
    pieces = host.pieces()
    host.memory[4 * PAGE] ^= 1

    async def release() -> None:
        while not host.stream.is_open:
            await trio.lowlevel.checkpoint()
        await host.stream.tail_began.wait()
        host.stream.release_tail()

    original = host.stream._note

    def note(event: Any) -> None:
        original(event)
        host.stream.wrote(np.array([4], np.uint32))

    host.stream._note = note  # type: ignore[method-assign]
    host.run(pieces, release)
    assert host.tunnel.sent.endswith(TAIL)


def test_a_record_that_nobody_knows_ends_a_stream_that_is_open() -> None:
    host = Host()
    pieces = host.pieces()[:2]
    delta = bytearray(host.writer.part(host.records(range(1))))
    delta[12] |= 0x40
    pieces.append(bytes(delta))
    with pytest.raises(StreamNotFollowed, match="XBZRLE"):
        host.run(pieces, nothing)
