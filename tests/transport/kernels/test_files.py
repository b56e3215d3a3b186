"""Guest memory that is a mapping of a file: holes stay holes, and content arrives all the same."""

import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.kernels.digests import digest_all, digest_pages
from transport.kernels.files import new_files
from transport.kernels.pages import new_workspace
from transport.kernels.unpack import apply_pages
from transport.receiving.decoder import Decoder
from transport.sending.encoder import Encoder
from transport.sending.replica import Replica
from transport.wire.codec import LZ4, NONE, Codec, Method
from transport.wire.extents import Extent
from transport.wire.frames import DEFAULT_FRAME_BYTES, STRIPE_PAGES, PageKind

PAGE = 4096
SEED = 0xF11E
N_PAGES = 4 * STRIPE_PAGES
HALF = N_PAGES // 2
NO_FILE = range(HALF - 5, HALF)  # of which nobody says that a file is behind them
GAP_PAGES = 3  # of the file, in front of what is mapped
ALL = np.arange(N_PAGES, dtype=np.uint32)
CODECS = (NONE, LZ4, Codec(Method.ZSTD, 1))


class FileMemory:
    """Guest memory that is a file, in two extents; touched only through what is tested."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.ftruncate(descriptor, (GAP_PAGES + N_PAGES) * PAGE)
        self._mapping = mmap.mmap(descriptor, N_PAGES * PAGE, offset=GAP_PAGES * PAGE)
        self.array = np.frombuffer(self._mapping, np.uint8)
        self.extents: list[Extent] = [
            (HALF, HALF, descriptor, (GAP_PAGES + HALF) * PAGE),
            (0, NO_FILE.start, descriptor, GAP_PAGES * PAGE),
        ]

    def write(self, page: int, content: bytes) -> None:
        os.pwrite(self._descriptor, content, (GAP_PAGES + page) * PAGE)

    def forget(self, page: int) -> None:
        """Make the page a hole again, as a balloon does."""
        self._mapping.madvise(mmap.MADV_REMOVE, page * PAGE, PAGE)

    def content(self) -> np.ndarray:
        """uint8 (N_PAGES, PAGE)."""
        data = os.pread(self._descriptor, N_PAGES * PAGE, GAP_PAGES * PAGE)
        return np.frombuffer(data, np.uint8).reshape(-1, PAGE)

    def touched(self) -> int:
        """Pages that there is memory for."""
        return os.fstat(self._descriptor).st_blocks * 512 // PAGE


@contextmanager
def file_memory() -> Iterator[FileMemory]:
    descriptor = os.memfd_create("guest")
    try:
        yield FileMemory(descriptor)
    finally:
        os.close(descriptor)


def page_of(byte: int) -> bytes:
    """A page that does not compress, of which `byte` says which."""
    return np.random.default_rng(byte).bytes(PAGE)


class Pair:
    def __init__(
        self,
        source: FileMemory,
        target: FileMemory,
        codec: Codec,
        filling: AbstractContextManager[object] | None = None,
    ) -> None:
        replica = Replica(N_PAGES, 16 * PAGE)
        self.encoder = Encoder(source.array, replica, SEED, files=source.extents)
        self.encoder.codec = codec
        self.decoder = Decoder(target.array, N_PAGES, SEED, files=target.extents, filling=filling)
        self._out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)

    def send(self, indices: np.ndarray) -> int:
        """Returns how many pages went as zero."""
        start = zero = 0
        while start < indices.size:
            done = self.encoder.encode(
                indices, start, self._out, round_no=0, sequence=self.decoder.next_sequence
            )
            start += done.consumed
            zero += done.zero
            if done.n_bytes:
                self.decoder.apply(self._out[: done.n_bytes].tobytes())
        return zero


pages = st.dictionaries(st.integers(0, N_PAGES - 1), st.integers(0, 3), max_size=20)


@settings(max_examples=60, deadline=None)
@given(before=pages, rounds=st.lists(pages, min_size=1, max_size=4), data=st.data())
def test_the_target_becomes_equal_whatever_either_file_holds(
    before: dict[int, int], rounds: list[dict[int, int]], data: st.DataObject
) -> None:
    """0 is a page of zeros, which is no hole. The codec may change between rounds (I5)."""
    with file_memory() as source, file_memory() as target:
        for page, byte in before.items():
            target.write(page, page_of(byte))
        pair = Pair(source, target, LZ4)
        for number, written in enumerate(rounds):
            for page, byte in written.items():
                source.write(page, page_of(byte) if byte else bytes(PAGE))
            pair.encoder.codec = data.draw(st.sampled_from(CODECS))
            pair.send(ALL if number == 0 else np.array([*written], np.uint32))
            assert np.array_equal(source.content(), target.content())


@pytest.mark.parametrize("codec", CODECS)
def test_what_nobody_has_touched_is_touched_on_neither_side(codec: Codec) -> None:
    with file_memory() as source, file_memory() as target:
        # What follows data may be touched, up to a multiple of 16 pages.
        for page in (15, STRIPE_PAGES - 1, N_PAGES - 1):
            source.write(page, page_of(page))
        assert Pair(source, target, codec).send(ALL) == N_PAGES - 3
        assert np.array_equal(source.content(), target.content())
        assert source.touched() <= 3 + len(NO_FILE)
        assert target.touched() <= 3 + len(NO_FILE)


class Turns:
    """Counts how often it was somebody's turn."""

    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("has_files", [True, False])
def test_lanes_take_turns_only_where_pages_are_added_to_a_file(has_files: bool) -> None:
    with file_memory() as source, file_memory() as target:
        if not has_files:
            target.extents = []
        turns = Turns()
        pair = Pair(source, target, NONE, turns)
        indices = np.arange(4, dtype=np.uint32)
        for byte in (1, 2, 3):
            for page in map(int, indices):
                source.write(page, page_of(byte + 10 * page))
            pair.send(indices)
            assert turns.taken == has_files
        assert (target.array == source.array).all()


@pytest.mark.parametrize(
    ("form", "data"), [(PageKind.RAW, page_of(9)), (PageKind.DELTA, b"\x05\x02xy")]
)
def test_a_page_written_within_a_hole_is_in_it_no_longer(form: PageKind, data: bytes) -> None:
    """A frame may bring a page twice; what is known of holes must follow."""
    with file_memory() as target:
        kind = np.array([PageKind.ZERO, form, PageKind.ZERO], np.uint8)
        done = apply_pages(
            target.array,
            new_files(target.extents, N_PAGES),
            np.array([4, 9, 9], np.uint32),
            kind,
            np.array([0, len(data), 0], np.uint16),
            np.array([0, 0, len(data)], np.uint32),
            np.full(3, digest_all(np.zeros(PAGE, np.uint8), SEED)[0]),
            np.frombuffer(data, np.uint8),
            np.uint64(SEED),
            new_workspace(),
            np.empty(3, np.uint32),
        )
        assert done == 0
        assert target.touched() == 1
        assert not target.content().any()


def apply_copies(
    target: FileMemory, pages: list[tuple[int, PageKind, int]], base: int
) -> tuple[int, np.ndarray]:
    """Applies zero pages and copies: page, kind, original. `base` is the digest of each original.

    Returns how many were rejected, and a list that begins with these.
    """
    index, kind, original = (np.array(column) for column in zip(*pages, strict=True))
    length = np.where(kind == PageKind.COPY, 4, 0)
    rejected = np.empty(index.size, np.uint32)
    done = apply_pages(
        target.array,
        new_files(target.extents, N_PAGES),
        index.astype(np.uint32),
        kind.astype(np.uint8),
        length.astype(np.uint16),
        (np.cumsum(length) - length).astype(np.uint32),
        np.full(index.size, base, np.uint64),
        original[kind == PageKind.COPY].astype("<u4").view(np.uint8),
        np.uint64(SEED),
        new_workspace(),
        rejected,
    )
    return done, rejected


def test_a_hole_is_no_original_and_stays_a_hole() -> None:
    zeros = digest_all(np.zeros(PAGE, np.uint8), SEED)[0]
    with file_memory() as target:
        done, rejected = apply_copies(target, [(9, PageKind.COPY, 40)], zeros)
        assert (done, rejected[0]) == (1, 9)
        assert target.touched() == 0


def test_a_copy_into_a_hole_is_found_there_and_what_lies_behind_it_is_in_none() -> None:
    """To look at the original must not change what is known of the page's own hole."""
    with file_memory() as target:
        for page in (20, 40):
            target.write(page, page_of(1))
        base = digest_all(np.frombuffer(page_of(1), np.uint8), SEED)[0]
        zero, copy = PageKind.ZERO, PageKind.COPY
        pages = [(0, copy, 40), (20, zero, 0), (60, zero, 0), (50, copy, 0), (61, copy, 40)]
        assert apply_copies(target, pages, base)[0] == 0
        filled = np.flatnonzero(target.content().any(axis=1))
        assert filled.tolist() == [0, 40, 50, 61]
        for page in map(int, filled):
            assert target.content()[page].tobytes() == page_of(1)
        assert target.touched() <= 6


def test_digests_of_what_nobody_has_touched_touch_nothing() -> None:
    with file_memory() as memory:
        memory.write(STRIPE_PAGES - 1, page_of(1))
        digests = digest_pages(memory.array, ALL, SEED, new_files(memory.extents, N_PAGES))
        assert memory.touched() <= 1 + len(NO_FILE)
        assert np.array_equal(digests, digest_all(memory.array, SEED))


def test_a_page_that_has_become_a_hole_is_a_page_of_zeros() -> None:
    """What was found out about a page holds for correctness only as long as it cannot be wrong."""
    with file_memory() as memory:
        files = new_files(memory.extents, N_PAGES)
        memory.write(3, page_of(1))
        before = digest_pages(memory.array, ALL, SEED, files)
        memory.forget(3)
        after = digest_pages(memory.array, ALL, SEED, files)
        assert before[3] != before[4]
        assert (after == before[4]).all()


@pytest.mark.parametrize("kind", ["pipe", "read-only", "closed"])
def test_a_descriptor_that_does_not_serve_is_not_needed(kind: str) -> None:
    with file_memory() as source, file_memory() as target:
        read_end, write_end = os.pipe()
        unfit = {
            "pipe": write_end,
            "read-only": os.open(f"/proc/self/fd/{target.extents[0][2]}", os.O_RDONLY),
            "closed": 1 << 20,
        }
        source.write(1, page_of(1))
        target.write(2, page_of(2))
        for each in (source, target):
            each.extents = [(0, N_PAGES, unfit[kind], GAP_PAGES * PAGE)]
        if kind == "read-only":
            source.extents = []
        Pair(source, target, NONE).send(ALL)
        assert np.array_equal(source.content(), target.content())
        for descriptor in (read_end, write_end, unfit["read-only"]):
            os.close(descriptor)


@pytest.mark.parametrize("extent", [(-1, 1, 0, 0), (0, 5, 0, 0), (3, 2, 0, 0), (0, 1, 0, 100)])
def test_an_extent_lies_in_the_memory_and_on_pages(extent: Extent) -> None:
    new_files([(0, 4, 0, 0)], 4)
    with pytest.raises(ValueError, match="pages from"):
        new_files([extent], 4)
