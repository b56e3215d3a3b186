"""The reader against a writer and a parser that know the format, and nothing of the reader."""

import struct
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.vmm.stream.errors import StreamCorrupt, StreamError, StreamNotFollowed, TailTooLong
from sync.vmm.stream.reader import (
    BlockList,
    DecisionDue,
    Event,
    PageRange,
    Sample,
    StreamReader,
)
from tests.sync.vmm.stream.reading import (
    Outcome,
    carry_all,
    cut,
    drain,
    every,
    leave,
    new_reader,
    read,
    read_or_close,
    take_all,
)
from tests.sync.vmm.stream.streams import PAGE, Block, Parsed, Record, StreamWriter, parse

MOST_PIECES = 20_000
"""Some pages, byte by byte; the rest of a stream is one more piece."""
TAIL = b"\4\0\0\0\3\3cpu" + bytes(range(200)) + b"\0\6\0\0\0\2{}"


def content(seed: int) -> bytes:
    return struct.pack("<I", seed) * (PAGE // 4)


@dataclass
class Plan:
    """A stream, and what the caller does with each of its blocks."""

    data: bytes
    blocks: tuple[Block, ...]
    ranges: dict[str, list[PageRange]]
    """Of the blocks that are taken over."""
    patience: dict[str, int]
    """How many samples the caller waits for before it decides a block; None at once."""

    def decide(self, reader: StreamReader, event: Event) -> None:
        match event:
            case BlockList(blocks):
                assert [(b.name.encode("latin-1"), b.n_pages) for b in blocks] == [
                    (b.name, b.n_pages) for b in self.blocks
                ]
                self._waiting = dict(self.patience)
                for block in blocks:
                    if block.name not in self._waiting:
                        self._decide(reader, block.name)
            case Sample(name):
                if name in self._waiting:
                    self._waiting[name] -= 1
                    if self._waiting[name] < 1:
                        self._decide(reader, name)
            case DecisionDue(name):
                self._decide(reader, name)

    def _decide(self, reader: StreamReader, name: str) -> None:
        self._waiting.pop(name, None)
        if name in self.ranges:
            reader.take(name, self.ranges[name])
        else:
            reader.carry(name)

    def flat(self, record: Record) -> int | None:
        for first, n_pages, flat in self.ranges.get(record.block.decode("latin-1"), ()):
            if first <= record.page < first + n_pages:
                return flat + record.page - first
        return None

    def check(self, outcome: Outcome, written: Parsed) -> None:
        """The outcome is what was written, no more and no less."""
        flats = [(self.flat(record), record) for record in written.records]
        taken = [(flat, record.content is None) for flat, record in flats if flat is not None]
        assert outcome.announced == taken
        passed = parse(bytes(outcome.passed_on))
        assert passed.records == [record for flat, record in flats if flat is None]
        assert (passed.blocks, passed.commands) == (written.blocks, written.commands)
        assert [kind for kind, _ in passed.sections] == [kind for kind, _ in written.sections]
        assert passed.tail == written.tail
        assert outcome.tail_at == len(outcome.passed_on) - len(written.tail)
        order = {block.name: number for number, block in enumerate(written.blocks)}
        places = [(order[record.block], record.page) for record in written.records]
        backwards = sum(b <= a for a, b in pairwise(places))
        assert outcome.n_pass_ends == backwards
        if not taken:
            assert outcome.passed_on == self.data


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = draw(st.lists(st.binary(min_size=1, max_size=255), min_size=1, max_size=4, unique=True))
    blocks = [Block(name, draw(st.integers(1, 40))) for name in names]
    writer = StreamWriter(blocks, section=draw(st.integers(0, 2**32 - 1)))
    data = writer.header(draw(st.none() | st.binary(min_size=16, max_size=16))) + writer.setup()
    n_sections = draw(st.integers(1, 4))
    for number in range(n_sections):
        if draw(st.booleans()):
            data += draw(
                st.sampled_from([writer.command(1), writer.command(2, b"ping"), writer.command(11)])
            )
        records = list[Record]()
        for _ in range(draw(st.integers(0, 12))):
            block = draw(st.sampled_from(blocks))
            page = draw(st.integers(0, block.n_pages - 1))
            for more in range(draw(st.integers(1, 4))):
                if page + more < block.n_pages:
                    seed = draw(st.none() | st.integers(0, 2**32 - 1))
                    filled = None if seed is None else content(seed)
                    records.append(Record(block.name, page + more, filled))
        data += writer.part(records, 3 if number == n_sections - 1 else 2)
    data += draw(st.sampled_from([TAIL, b"\0"]))
    ranges, patience = dict[str, list[PageRange]](), dict[str, int]()
    for number, block in enumerate(blocks):
        name = block.name.decode("latin-1")
        if draw(st.booleans()):
            edges = sorted(draw(st.sets(st.integers(0, block.n_pages), max_size=4)))
            ranges[name] = [
                PageRange(first, end - first, 1000 * number + 3 * first)
                for first, end in zip(edges[::2], edges[1::2], strict=False)
            ] or [PageRange(0, block.n_pages, 1000 * number)]
        if draw(st.booleans()):
            patience[name] = draw(st.integers(1, 30))
    return Plan(data, tuple(blocks), ranges, patience)


cuts = st.lists(st.integers(1, 9000), max_size=20)


@given(plans(), cuts)
def test_all_is_announced_or_passed_on(plan: Plan, sizes: list[int]) -> None:
    outcome = read(new_reader(), cut(plan.data, sizes), plan.decide)
    plan.check(outcome, parse(plan.data))


@settings(max_examples=10)
@given(plans(), st.sampled_from([1, 7, 4096, 1 << 20]))
def test_however_the_bytes_are_cut(plan: Plan, n_bytes: int) -> None:
    sizes = [n_bytes] * min(MOST_PIECES, len(plan.data) // n_bytes)
    outcome = read(new_reader(), cut(plan.data, sizes), plan.decide)
    plan.check(outcome, parse(plan.data))


@settings(max_examples=20)
@given(plans(), cuts)
def test_the_loop_is_the_same_uncompiled(plan: Plan, sizes: list[int]) -> None:
    outcome = read(new_reader(plain=True), cut(plan.data, sizes), plan.decide)
    plan.check(outcome, parse(plan.data))


@given(plans(), cuts, st.data())
def test_truncated_streams_never_look_whole(
    plan: Plan, sizes: list[int], data: st.DataObject
) -> None:
    n_left = len(plan.data) - len(parse(plan.data).tail)
    short = plan.data[: data.draw(st.integers(0, n_left))]
    outcome = Outcome()
    with pytest.raises(StreamCorrupt):
        read(new_reader(), cut(short, sizes), plan.decide, outcome)
    if not plan.ranges:
        assert short.startswith(outcome.passed_on)


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with some bytes changed, left out or put in; most of them not inside of pages."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(damaged) - 1) | st.integers(0, min(200, len(damaged) - 1)))
        match draw(st.sampled_from(["flip", "set", "cut", "insert"])):
            case "flip":
                damaged[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                damaged[at] = draw(st.integers(0, 255))
            case "cut":
                del damaged[at : at + draw(st.integers(1, 9))]
            case "insert":
                damaged[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(damaged)


@settings(max_examples=300)
@given(plans(), cuts, st.data())
def test_damaged_streams_end_in_words_or_are_read_as_they_are(
    plan: Plan, sizes: list[int], data: st.DataObject
) -> None:
    damaged = data.draw(damages(plan.data))
    outcome = Outcome()
    ranges, patience = plan.ranges, plan.patience

    def decide(reader: StreamReader, event: Event) -> None:
        if isinstance(event, BlockList):
            plan.blocks = tuple(Block(b.name.encode("latin-1"), b.n_pages) for b in event.blocks)
            sizes_ = {b.name: b.n_pages for b in event.blocks}
            plan.ranges = {
                name: [r for r in ranges[name] if r.first + r.n_pages <= sizes_[name]]
                for name in ranges
                if name in sizes_
            }
            plan.patience = {name: n for name, n in patience.items() if name in sizes_}
        plan.decide(reader, event)

    reader = new_reader()
    try:
        read(reader, cut(damaged, sizes), decide, outcome)
    except StreamError:
        if not reader.has_taken:
            assert damaged.startswith(outcome.passed_on)
        return
    plan.data = damaged
    plan.check(outcome, parse(damaged))


BLOCKS = (Block(b"ram", 64), Block(b"pc.bios", 8))


def _pages(numbers: Sequence[int], block: bytes = b"ram") -> list[Record]:
    return [Record(block, number, content(number)) for number in numbers]


def _stream(*parts: bytes) -> bytes:
    writer = StreamWriter(BLOCKS)
    return writer.header() + writer.setup() + b"".join(parts)


def _with_flags(flags: int) -> bytes:
    writer = StreamWriter(BLOCKS)
    record = struct.pack(">Q", flags) + b"\3ram" + bytes(64)
    return writer.header() + writer.setup() + writer.opening(2) + record


def _unlike(*parts: bytes) -> bytes:
    return StreamWriter(BLOCKS).header() + b"".join(parts)


def _subsection(name: bytes, body: bytes) -> bytes:
    return b"\5" + bytes([len(name)]) + name + struct.pack(">I", 1) + body


MANY_BLOCKS = [Block(b"block%d" % number, 1) for number in range(600)]

NOT_FOLLOWED = {
    "multifd": struct.pack(">II", 0x11223344, 1) + bytes(24),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    "version": b"QEVM\0\0\0\2" + bytes(8),
    "machine name": b"QEVM\0\0\0\3\7" + struct.pack(">I", 256) + bytes(256),
    "page size": _unlike(_subsection(b"configuration/target-page-bits", b"\0\0\0\x0e")),
    "capabilities": _unlike(_subsection(b"configuration/capabilities", b"\0\0\0\1\nmapped-ram")),
    "other iterable section": _unlike(StreamWriter(BLOCKS).setup(b"dirty-bitmap")),
    "ram of another version": _unlike(StreamWriter(BLOCKS).setup(version=5)),
    "early device": _unlike(b"\4\0\0\0\1\x0avirtio-mem" + bytes(8)),
    "early device behind the ram's setup": _stream(b"\4\0\0\0\1\x0avirtio-mem" + bytes(8)),
    "postcopy": _unlike(StreamWriter(BLOCKS).command(3, bytes(16))),
    "unknown piece": _unlike(b"\x09" + bytes(8)),
    "unknown piece behind a part": _stream(
        StreamWriter(BLOCKS).part(_pages([1, 2])), b"\x33" + bytes(8)
    ),
    "no footer": _unlike(StreamWriter(BLOCKS).setup()[:-5] + b"\2\0\0\0\2"),
    "too many blocks": StreamWriter(MANY_BLOCKS).header() + StreamWriter(MANY_BLOCKS).setup(),
    "odd block": _unlike(
        StreamWriter(BLOCKS).setup()[:16], struct.pack(">Q", PAGE | 4), b"\1x", bytes(7), b"\1"
    ),
    **{f"flag {flag:#x}": _with_flags(flag) for flag in (0x40, 0x48, 0x80, 0x100, 0x200, 1, 0, 10)},
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
@pytest.mark.parametrize("n_bytes", [13, 1 << 20])
def test_what_is_not_followed_is_carried_closed(name: str, n_bytes: int) -> None:
    data = NOT_FOLLOWED[name] + bytes(range(256))
    outcome, error = read_or_close(new_reader(), every(data, n_bytes), carry_all)
    assert error
    assert outcome.passed_on == data
    assert not outcome.announced


def test_an_early_device_is_told_by_name() -> None:
    data = NOT_FOLLOWED["early device behind the ram's setup"]
    _, error = read_or_close(new_reader(), [data], carry_all)
    assert "'virtio-mem' comes before the end of the RAM" in str(error)


def test_what_is_held_is_carried_closed() -> None:
    writer = StreamWriter(BLOCKS)
    data = _stream(writer.part(_pages(range(5))), writer.opening(2), struct.pack(">Q", 0x40))
    reader = new_reader()
    outcome, error = read_or_close(reader, every(data + TAIL, 1000), leave)
    assert error and "XBZRLE" in str(error)
    assert outcome.passed_on == data + TAIL
    assert len(outcome.samples) == 5


def test_after_pages_were_taken_over_there_is_no_way_back() -> None:
    writer = StreamWriter(BLOCKS)
    data = _stream(writer.part(_pages([1])), writer.opening(2), struct.pack(">Q", 0x40))
    reader, outcome = new_reader(), Outcome()
    with pytest.raises(StreamNotFollowed):
        read(reader, [data], take_all, outcome)
    assert reader.has_taken
    for call in (reader.carry_closed, reader.next_event):
        with pytest.raises(StreamNotFollowed):
            call()


def _corrupt() -> dict[str, bytes]:
    writer = StreamWriter(BLOCKS)
    page = bytes(PAGE)
    return {
        "another footer": writer.part([])[:-1] + b"\x63",
        "unknown section": b"\2\0\0\0\x63",
        "second start": writer.setup(),
        "second list": writer.opening(2) + writer.block_list(),
        "after its end": writer.part([], 3) + writer.part([]),
        "end without ram": b"\0",
        "unknown block": writer.opening(2) + struct.pack(">Q", 8) + b"\3rom" + page,
        "behind the block": writer.opening(2) + struct.pack(">Q", 64 * PAGE | 8) + b"\3ram" + page,
        "continues nothing": writer.opening(2) + struct.pack(">Q", 0x28) + page,
        "not zero": writer.opening(2) + struct.pack(">Q", 2) + b"\3ram\1",
        "command": b"\x08\0\x0b\0\1\0",
    }


@pytest.mark.parametrize("name", _corrupt())
def test_contradictions(name: str) -> None:
    reader = new_reader()
    with pytest.raises(StreamCorrupt):
        read(reader, [_stream(_corrupt()[name], TAIL)], carry_all)
    with pytest.raises(StreamCorrupt):
        reader.carry_closed()


def test_a_list_of_blocks_that_is_longer_than_all_ram() -> None:
    setup = StreamWriter(BLOCKS).setup()
    data = setup[:17] + struct.pack(">Q", 71 * PAGE | 4) + setup[25:]
    with pytest.raises(StreamCorrupt, match="longer than all RAM"):
        read(new_reader(), [_unlike(data)], carry_all)


def test_the_tail_has_a_cap() -> None:
    data = _stream(StreamWriter(BLOCKS).part([], 3)) + b"\4" + bytes(199)
    assert read(new_reader(tail_bytes=200), every(data, 50), carry_all).passed_on == data
    outcome = Outcome()
    with pytest.raises(TailTooLong):
        read(new_reader(tail_bytes=199), every(data, 50), carry_all, outcome)
    assert len(outcome.passed_on) < len(data)


def test_samples_are_the_pages_of_undecided_blocks() -> None:
    writer = StreamWriter(BLOCKS)
    first = [*_pages([3, 4]), Record(b"ram", 5, None), *_pages([1], b"pc.bios")]
    data = _stream(writer.part(first), writer.part(_pages([9])), writer.part([], 3), TAIL)

    def decide(reader: StreamReader, event: Event) -> None:
        if isinstance(event, BlockList):
            reader.carry("pc.bios")

    outcome = read(new_reader(), every(data, 777), decide)
    assert [(s.block, s.page, s.content) for s in outcome.samples] == [
        ("ram", number, content(number)) for number in (3, 4, 9)
    ]
    assert outcome.due == ["ram"]
    assert outcome.passed_on == data


def test_nothing_of_an_undecided_block_is_passed_on() -> None:
    writer = StreamWriter(BLOCKS)
    reader, outcome = new_reader(), Outcome()
    before = _stream()
    reader.feed(before + writer.part(_pages(range(10)) + _pages([0], b"pc.bios")))
    drain(reader, leave, outcome)
    assert outcome.passed_on == before + writer.opening(2)
    reader.take("ram", [PageRange(0, 64, 0)])
    drain(reader, leave, outcome)
    assert [page for page, _ in outcome.announced] == list(range(10))
    assert outcome.passed_on == before + writer.opening(2)
    reader.carry("pc.bios")
    drain(reader, leave, outcome)
    assert parse(bytes(outcome.passed_on) + writer.part([], 3) + b"\0").records == _pages(
        [0], b"pc.bios"
    )


@pytest.mark.parametrize("n_bytes", [5000, 1 << 20])
def test_what_can_be_held_is_limited(n_bytes: int) -> None:
    blocks = [Block(b"a", 100), Block(b"b", 100)]
    writer = StreamWriter(blocks)
    records = _pages(range(100), b"a") + _pages(range(100), b"b")
    data = writer.header() + writer.setup() + writer.part(records, 3) + TAIL
    outcome = read(new_reader(1 << 16), every(data, n_bytes), leave)
    assert outcome.due == ["a", "b"]
    assert len(outcome.samples) < 100
    assert outcome.passed_on == data


def test_decisions_are_checked() -> None:
    reader = new_reader()
    with pytest.raises(ValueError, match="no undecided"):
        reader.carry("ram")
    reader.feed(_stream())
    drain(reader, leave, Outcome())
    for ranges in (
        [PageRange(0, 65, 0)],
        [PageRange(0, 10, 0), PageRange(9, 10, 100)],
        [PageRange(-1, 2, 0)],
        [PageRange(0, 1, -1)],
        [PageRange(0, 2, 2**32 - 1)],
    ):
        with pytest.raises(ValueError, match="overlap or reach"):
            reader.take("ram", ranges)
    reader.take("ram", [PageRange(10, 10, 0), PageRange(0, 10, 50)])
    for name in ("ram", "nothing"):
        with pytest.raises(ValueError, match="no undecided"):
            reader.carry(name)


def test_bytes_are_fed_one_after_the_other() -> None:
    reader = new_reader()
    reader.feed(b"")
    assert reader.next_event() is None
    reader.feed(_stream())
    with pytest.raises(ValueError, match="gone through"):
        reader.feed(b"more")


def test_memory_stays_flat() -> None:
    """However long the stream, whatever the bytes are cut into, and whatever lengths it claims."""
    held = 1 << 20
    blocks = [Block(b"ram", 1 << 31), Block(b"other", 1 << 31)]
    writer = StreamWriter(blocks)
    reader = new_reader(held)
    outcome = Outcome()

    def decide(reader: StreamReader, event: Event) -> None:
        outcome.announced.clear()
        outcome.passed_on.clear()
        outcome.samples.clear()
        if isinstance(event, DecisionDue) and event.block == "ram":
            reader.take("ram", [PageRange(0, 1 << 31, 0)])

    pages = writer.part(_pages(range(200)))
    zeros = writer.part([Record(b"ram", number, None) for number in range(20_000)])
    carried = writer.part(_pages(range(50), b"other"))
    back = writer.part(_pages(range(200)))
    tracemalloc.start()
    try:
        reader.feed(writer.header() + writer.setup())
        drain(reader, decide, outcome)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(60):
            for piece in (pages, zeros, carried, back):
                for chunk in [piece] if number % 2 else [piece[:5001], piece[5001:]]:
                    reader.feed(chunk)
                    drain(reader, decide, outcome)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reader.has_taken
    # What is held, a window that was put together, one batch, and one copy of each.
    assert peak - before < held + 4 * max(len(pages), len(zeros)) + (1 << 20)
