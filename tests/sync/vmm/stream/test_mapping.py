"""The mapping's proof: never another file than the block's own, however the guest writes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferry.migration.kernels import STREAM_KERNEL
from sync.vmm.stream.errors import MappingRefuted
from sync.vmm.stream.mapping import MIN_MATCHES, FileRange, MappingProof, candidates
from sync.vmm.stream.opened import OpenedStream
from sync.vmm.stream.reader import Announced, PageRange, PassOn, Sample, TailBegan
from sync.vmm.stream.sections import RamBlock
from tests.sync.vmm.stream.streams import PAGE, Block, Record, StreamWriter, parse

N_PAGES = 96
ZERO = bytes(PAGE)


def announced(*pages: int, zero: bool = False) -> Announced:
    return Announced(np.array(pages, np.uint32), np.full(len(pages), zero))


class TestCandidates:
    def test_a_file_from_its_beginning(self) -> None:
        files = [FileRange(0, 10, "a", 0), FileRange(10, 20, "b", 0)]
        assert candidates(RamBlock("x", 10), files) == [(PageRange(0, 10, 0),)]
        assert candidates(RamBlock("x", 30), files) == [
            (PageRange(0, 10, 0),),
            (PageRange(0, 20, 10),),
        ]

    def test_ram_with_holes(self) -> None:
        """The legacy hole is in the block and in no region; the rest is above 4 GiB."""
        files = [
            FileRange(0, 160, "a", 0),
            FileRange(160, 768, "a", 256 * PAGE),
            FileRange(928, 1024, "a", 1024 * PAGE),
        ]
        whole = (PageRange(0, 160, 0), PageRange(256, 768, 160), PageRange(1024, 1024, 928))
        assert whole in candidates(RamBlock("ram", 2048), files)

    def test_a_file_with_two_blocks(self) -> None:
        files = [FileRange(0, 10, "a", 0), FileRange(10, 10, "a", 10 * PAGE)]
        assert candidates(RamBlock("x", 10), files) == [
            (PageRange(0, 10, 0),),
            (PageRange(0, 10, 10),),
        ]

    def test_no_region_crosses_the_end_of_a_block(self) -> None:
        assert candidates(RamBlock("x", 9), [FileRange(0, 10, "a", 0)]) == []

    def test_no_page_is_there_twice(self) -> None:
        files = [FileRange(0, 10, "a", 0), FileRange(10, 5, "a", 0)]
        assert candidates(RamBlock("x", 10), files) == []


@dataclass
class Guest:
    """Files of equal size, and the pages that the guest still writes."""

    memory: np.ndarray[tuple[int], np.dtype[np.uint8]]
    files: list[FileRange]
    n_distinct: list[int]
    """Of each file: pages whose content is nowhere else."""

    def page(self, flat: int) -> bytes:
        return self.memory[flat * PAGE : (flat + 1) * PAGE].tobytes()

    def write(self, flat: int, content: bytes) -> None:
        self.memory[flat * PAGE : (flat + 1) * PAGE] = np.frombuffer(content, np.uint8)


@st.composite
def guests(draw: st.DrawFn) -> Guest:
    """Two to three files; zeros, uniform pages, duplicates within a file and among files."""
    n_files = draw(st.integers(2, 3))
    rng = random.Random(draw(st.integers(0, 2**32)))
    weights = [draw(st.integers(1, 9)), *(draw(st.integers(0, 2)) for _ in range(3))]
    any_alike = draw(st.booleans())
    n_common = draw(st.integers(1, 40))
    common = [rng.randbytes(PAGE) for _ in range(n_common)]
    everywhere = {at: rng.randbytes(PAGE) for at in rng.sample(range(N_PAGES), n_common)}
    pages, distinct = list[bytes](), list[int]()
    for _ in range(n_files):
        n_distinct = 0
        for at in range(N_PAGES):
            kind = rng.choices(["distinct", "zero", "common", "uniform"], weights=weights)
            if any_alike and at in everywhere:
                pages.append(everywhere[at])
            elif kind == ["distinct"]:
                pages.append(rng.randbytes(PAGE))
                n_distinct += 1
            elif kind == ["zero"]:
                pages.append(ZERO)
            elif kind == ["common"]:
                pages.append(rng.choice(common))
            else:
                pages.append(bytes([rng.randrange(1, 256)]) * PAGE)
        distinct.append(n_distinct)
    memory = np.frombuffer(b"".join(pages), np.uint8).copy()
    files = [FileRange(n * N_PAGES, N_PAGES, f"file{n}", 0) for n in range(n_files)]
    return Guest(memory, files, distinct)


def open_stream(guest: Guest) -> OpenedStream:
    return OpenedStream(
        guest.memory,
        guest.files,
        max_held_bytes=1 << 20,
        max_tail_bytes=1 << 16,
        kernel=STREAM_KERNEL,
    )


def _run(
    guest: Guest, order: Sequence[int], races: dict[int, bytes]
) -> tuple[OpenedStream, set[int], bytes]:
    """A migration of blocks that are the files in `order`: the pages that were announced, and what
    was passed on.

    `races` has flat pages and what the guest writes there when the VMM has read them and its reader
    has not; they are sent once more in the second pass.
    """
    blocks = [Block(b"block%d" % n, N_PAGES) for n in order]
    writer = StreamWriter(blocks)
    stream = open_stream(guest)
    pages, passed = set[int](), bytearray()

    def feed(data: bytes) -> None:
        stream.feed(data)
        while (event := stream.next_event()) is not None:
            if isinstance(event, Announced):
                pages.update(event.pages.tolist())
            elif isinstance(event, PassOn):
                passed.extend(event.data)

    def record(n: int, at: int) -> Record:
        content = guest.page(n * N_PAGES + at)
        return Record(b"block%d" % n, at, None if content == ZERO else content)

    feed(writer.header() + writer.setup())
    for n in order:
        sent = [(n * N_PAGES + at, record(n, at)) for at in range(N_PAGES)]
        for flat, _ in sent:
            if flat in races:
                guest.write(flat, races[flat])
        for at in range(0, N_PAGES, 7):
            feed(writer.part([one for _, one in sent[at : at + 7]]))
    again = sorted(races, key=lambda flat: order.index(flat // N_PAGES) * N_PAGES + flat % N_PAGES)
    feed(writer.part([record(flat // N_PAGES, flat % N_PAGES) for flat in again], 3))
    feed(b"\4tail")
    return stream, pages, bytes(passed)


@settings(max_examples=60)
@given(guests(), st.integers(0, 2**32), st.data())
def test_blocks_are_their_own_files_or_carried(
    guest: Guest, seed: int, data: st.DataObject
) -> None:
    rng = random.Random(seed)
    order = data.draw(st.permutations(range(len(guest.files))))
    n_races = data.draw(st.integers(0, 12))
    flats = rng.sample(range(len(guest.files) * N_PAGES), n_races)
    races = {flat: rng.choice([ZERO, rng.randbytes(PAGE)]) for flat in flats}
    stream, pages, passed = _run(guest, order, races)
    carried = {record.block.decode() for record in parse(passed).records}
    for n in range(len(guest.files)):
        name = f"block{n}"
        here = {flat for flat in pages if flat // N_PAGES == n}
        if name in stream.mapped:
            # Announced as its own pages, all of them, and nothing of it passed on.
            assert here == set(range(n * N_PAGES, (n + 1) * N_PAGES))
            assert name not in carried
        else:
            assert not here
            assert name in carried
        n_raced = sum(flat // N_PAGES == n for flat in flats)
        if guest.n_distinct[n] - n_raced >= max(MIN_MATCHES, 4 * n_raced):
            assert name in stream.mapped


@settings(max_examples=60)
@given(guests(), st.integers(0, 2**32), st.integers(1, 20))
def test_a_stale_copy_is_never_trusted_to_the_end(guest: Guest, seed: int, n_stale: int) -> None:
    """The only candidate is another file, which is like the block but for some pages."""
    rng = random.Random(seed)
    stale = rng.sample(range(N_PAGES), n_stale)
    other = Guest(guest.memory[: N_PAGES * PAGE].copy(), [guest.files[0]], [])
    for at in stale:
        other.write(at, rng.randbytes(PAGE))
    writer = StreamWriter([Block(b"ram", N_PAGES)])
    records = [
        Record(b"ram", at, None if guest.page(at) == ZERO else guest.page(at))
        for at in range(N_PAGES)
    ]
    stream = open_stream(other)
    data = writer.header() + writer.setup() + writer.part(records, 3) + b"\4tail"
    stream.feed(data)
    passed = bytearray()
    try:
        while (event := stream.next_event()) is not None:
            if isinstance(event, PassOn):
                passed += event.data
    except MappingRefuted:
        assert stream.mapped == {"ram"}
        assert not passed.endswith(b"tail")
        with pytest.raises(MappingRefuted):
            stream.next_event()
    else:
        sampled = [at for at in stale if guest.page(at) != ZERO]
        if not stream.mapped:
            assert passed == data
        else:
            # Proven before the first stale page came, which no look into the stream can tell.
            n_before = sum(guest.page(at) != ZERO for at in range(min(sampled, default=N_PAGES)))
            assert n_before >= MIN_MATCHES


def _proof(n_files: int = 1) -> tuple[MappingProof, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    memory = np.frombuffer(random.Random(1).randbytes(n_files * N_PAGES * PAGE), np.uint8).copy()
    files = [FileRange(n * N_PAGES, N_PAGES, n, 0) for n in range(n_files)]
    proof = MappingProof(memory, files)
    assert proof.add(RamBlock("ram", N_PAGES))
    return proof, memory


def _content(memory: np.ndarray[tuple[int], np.dtype[np.uint8]], page: int) -> bytes:
    return memory[page * PAGE : (page + 1) * PAGE].tobytes()


def _prove_with_mismatch(mismatch: int) -> MappingProof:
    proof, memory = _proof()
    proof.sample(Sample("ram", mismatch, b"\1\2" * (PAGE // 2)))
    for page in range(MIN_MATCHES):
        found = proof.sample(Sample("ram", page, _content(memory, page)))
        assert bool(found) == (page == MIN_MATCHES - 1)
    proof.announced(announced(mismatch, *range(MIN_MATCHES)))  # what the samples were taken from
    return proof


class TestMismatches:
    def test_announced_again(self) -> None:
        proof = _prove_with_mismatch(90)
        with pytest.raises(MappingRefuted):
            proof.check()
        proof.announced(announced(89, 91))
        with pytest.raises(MappingRefuted):
            proof.check()
        proof.announced(announced(3, 90, zero=True))
        proof.check()

    def test_written_by_a_device(self) -> None:
        proof = _prove_with_mismatch(90)
        proof.written(np.array([1, 90], np.uint32))
        proof.check()

    def test_a_page_of_zeros_before_it_does_not_count(self) -> None:
        proof, memory = _proof()
        proof.sample(Sample("ram", 90, b"\1\2" * (PAGE // 2)))
        for page in range(MIN_MATCHES):
            proof.sample(Sample("ram", page, _content(memory, page)))
        proof.announced(announced(90, zero=True))
        proof.announced(announced(90, *range(MIN_MATCHES)))
        with pytest.raises(MappingRefuted):
            proof.check()

    def test_the_last_sample_of_a_page_counts(self) -> None:
        proof, memory = _proof()
        proof.sample(Sample("ram", 90, b"\1\2" * (PAGE // 2)))
        for page in [90, *range(MIN_MATCHES - 1)]:
            proof.sample(Sample("ram", page, _content(memory, page)))
        proof.check()

    def test_too_many_of_them(self) -> None:
        proof, memory = _proof()
        for page in range(MIN_MATCHES):
            proof.sample(Sample("ram", 90 - page, b"\1\2" * (PAGE // 2)))
        for page in range(MIN_MATCHES + 20):
            assert not proof.sample(Sample("ram", page, _content(memory, page)))


class TestEvidence:
    def test_the_same_content_in_two_places_is_none(self) -> None:
        proof, memory = _proof()
        for page in range(MIN_MATCHES - 1):
            assert not proof.sample(Sample("ram", page, _content(memory, page)))
        memory[80 * PAGE : 81 * PAGE] = memory[:PAGE]
        assert not proof.sample(Sample("ram", 80, _content(memory, 80)))
        assert not proof.sample(Sample("ram", 40, _content(memory, 40)))
        assert not proof.sample(Sample("ram", 0, _content(memory, 0)))
        assert proof.sample(Sample("ram", 41, _content(memory, 41)))

    def test_a_page_sampled_twice_is_one(self) -> None:
        proof, memory = _proof()
        for _ in range(MIN_MATCHES):
            assert not proof.sample(Sample("ram", 5, _content(memory, 5)))

    def test_what_two_candidates_match_is_none(self) -> None:
        proof, memory = _proof(2)
        memory[N_PAGES * PAGE :] = memory[: N_PAGES * PAGE]
        for page in range(N_PAGES):
            assert not proof.sample(Sample("ram", page, _content(memory, page)))

    def test_uniform_pages_are_none(self) -> None:
        proof, memory = _proof()
        for page in range(N_PAGES):
            memory[page * PAGE : (page + 1) * PAGE] = page
            assert not proof.sample(Sample("ram", page, _content(memory, page)))


def test_a_block_that_no_file_can_be_is_carried_at_once() -> None:
    writer = StreamWriter([Block(b"vga.vram", 5)])
    memory = np.zeros(N_PAGES * PAGE, np.uint8)
    stream = OpenedStream(
        memory,
        [FileRange(0, N_PAGES, 1, 0)],
        max_held_bytes=1 << 20,
        max_tail_bytes=100,
        kernel=STREAM_KERNEL,
    )
    data = writer.header() + writer.setup() + writer.part([Record(b"vga.vram", 1, b"\7" * PAGE)], 3)
    stream.feed(data + b"\0")
    events = list(iter(stream.next_event, None))
    assert b"".join(event.data for event in events if isinstance(event, PassOn)) == data + b"\0"
    assert sum(isinstance(event, TailBegan) for event in events) == 1
    assert not stream.mapped and not stream.carried
