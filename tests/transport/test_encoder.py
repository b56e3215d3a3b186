"""Encoder and decoder together: any pages, any cache, any lanes, against plain memory.

What a frame says is read by `read_frame`, which knows the format from the documentation alone and
decodes with the Python packages.
"""

import ctypes
import struct
import threading
import time
from collections.abc import Iterator

import lz4.block
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.codec import DELTA, LZ4, NONE, Codec, Method
from transport.decoder import Applied, Decoder
from transport.encoder import MAX_COMPRESSED_FRAME_BYTES, EncodedFrame, Encoder
from transport.errors import FrameError
from transport.frames import DEFAULT_FRAME_BYTES, MAX_FRAME_BYTES, lane_of, split_by_lane
from transport.kernels.digests import digest_all
from transport.replica import Replica

SEED = 0x0123456789ABCDEF
N_PAGES = 200  # several stripes
KINDS = ("zero", "raw", "lz4", "delta", "lz4_base", "copy")


class LanePair:
    """One lane's encoder and decoder, with nothing between them."""

    def __init__(
        self,
        source: np.ndarray,
        target: np.ndarray,
        replica: Replica,
        lane: int = 0,
        frame_bytes: int = DEFAULT_FRAME_BYTES,
    ) -> None:
        self.encoder = Encoder(source, replica, SEED, lane=lane, frame_bytes=frame_bytes)
        self.decoder = Decoder(target, replica.n_pages, SEED, lane=lane, lanes=replica.lanes)
        self.target = target
        self.out = np.empty(frame_bytes, np.uint8)
        self.sequence = 0

    def frames(
        self, indices: np.ndarray, round_no: int = 0, *, full: bool = False
    ) -> Iterator[tuple[EncodedFrame, bytes]]:
        start = 0
        while start < indices.size:
            done = self.encoder.encode(
                indices, start, self.out, round_no=round_no, sequence=self.sequence, full=full
            )
            assert done.consumed > 0
            assert done.consumed == done.same + done.n_pages
            assert done.n_pages == sum(getattr(done, kind) for kind in KINDS)
            assert bool(done.n_bytes) == bool(done.n_pages)
            start += done.consumed
            if done.n_bytes:
                self.sequence += 1
                yield done, self.out[: done.n_bytes].tobytes()

    def send(self, indices: np.ndarray, round_no: int = 0) -> list[Applied]:
        return [self.decoder.apply(frame) for _, frame in self.frames(indices, round_no)]

    def holds_what_the_sender_believes(self) -> bool:
        known = self.encoder.replica.knowledge_of_lane(0).digests
        return np.array_equal(known, digest_all(self.target, SEED))

    def send_one(self, page: int, *, full: bool = False) -> tuple[str | None, Applied | None]:
        """The kind in which the page went (None: the receiver has it), and what came of it."""
        sent = list(self.frames(np.array([page], np.uint32), full=full))
        if not sent:
            return None, None
        ((done, frame),) = sent
        (kind,) = [kind for kind in KINDS if getattr(done, kind)]
        return kind, self.decoder.apply(frame)


def pair(
    n_pages: int = N_PAGES, cache_pages: int = N_PAGES
) -> tuple[LanePair, np.ndarray, np.ndarray]:
    source, target = np.zeros((2, n_pages * 4096), np.uint8)
    lane = LanePair(source, target, Replica(n_pages, cache_pages * 4096))
    return lane, source.reshape(-1, 4096), target.reshape(-1, 4096)


def rewrite(page: np.ndarray, how: str, number: int) -> None:
    """Give a page (uint8, 4096) new content of some sort."""
    rng = np.random.default_rng(number)
    if how == "zero":
        page[:] = 0
    elif how == "random":
        page[:] = rng.integers(0, 256, 4096, np.uint8)
    elif how == "shared":  # of few contents, so that others have it, too
        page[:] = np.random.default_rng(number % 3).integers(0, 256, 4096, np.uint8)
    elif how == "text":
        page[:] = np.frombuffer((b"%d pages were sent. " % number * 400)[:4096], np.uint8)
    elif how == "byte":
        page[rng.integers(4096)] += 1
    elif how == "scattered":
        page[rng.integers(0, 4096, rng.integers(1, 600))] += 1
    elif how == "stretch":
        first, last = sorted(rng.integers(0, 4097, 2))
        page[first:last] = rng.integers(0, 256, last - first, np.uint8)
    elif how == "moved":
        page[:] = np.roll(page, rng.integers(4096))


REWRITES = [
    *("zero", "random", "shared", "text", "byte", "scattered", "stretch", "moved", "not at all")
]


def read_frame(frame: bytes, memory: np.ndarray) -> list[int]:
    """Apply a frame to `memory` (uint8, pages x 4096) by the book; returns its pages."""
    magic, version, checksum = struct.unpack_from("<4sIQ", frame)
    _, _, body_bytes, n, _, coding, unpacked = struct.unpack_from("<QIIHBBI", frame, 16)
    assert (magic, version) == (b"vfpg", 3)
    body = frame[40:]
    assert len(body) == body_bytes
    covered = frame[16:]
    if coding == 1:
        body = zstandard.decompress(body)
    elif coding == 2:
        raw, tables = body[: -7 * n], body[-7 * n :]
        pages = (raw[at : at + 4096] for at in range(0, len(raw), 4096))
        digests = (xxhash.xxh3_64_intdigest(page, SEED) for page in pages)
        covered = frame[16:40] + b"".join(map(struct.Struct("<Q").pack, digests)) + tables
    assert checksum == xxhash.xxh3_64_intdigest(covered, SEED)
    assert (coding, unpacked) in ((0, 0), (1, len(body)), (2, 0))
    kinds = body[len(body) - n :]
    lengths = struct.unpack_from(f"<{n}H", body, len(body) - n * 3)
    indices = struct.unpack_from(f"<{n}I", body, len(body) - n * 7)
    n_bases = sum(kind in (3, 4, 5) for kind in kinds)
    bases = list(struct.unpack_from(f"<{n_bases}Q", body, len(body) - n * 7 - n_bases * 8))
    at = 0
    for index, kind, length in zip(indices, kinds, lengths, strict=True):
        data, at = body[at : at + length], at + length
        base = struct.unpack("<I", data)[0] if kind == 5 else index
        held = memory[base].tobytes()
        if kind in (3, 4, 5):
            assert bases.pop(0) == xxhash.xxh3_64_intdigest(held, SEED)
        if kind == 0:
            assert length == 0
            page = bytes(4096)
        elif kind == 1:
            page = data
        elif kind == 2:
            page = lz4.block.decompress(data, uncompressed_size=4096)
        elif kind == 3:
            page = read_delta(data, held)
        elif kind == 4:
            page = lz4.block.decompress(data, uncompressed_size=4096, dict=held)
        else:
            page = held
        assert len(page) == 4096
        memory[index] = np.frombuffer(page, np.uint8)
    assert at == len(body) - n * 7 - n_bases * 8
    return list(indices)


def read_delta(data: bytes, held: bytes) -> bytes:
    page = bytearray(held)
    numbers, at, byte = iter(data), 0, 0

    def number() -> int:
        first = next(numbers)
        return first if first < 128 else first - 128 + 128 * next(numbers)

    while at < len(data):
        numbers = iter(data[at:])
        keep, replace = number(), number()
        at = len(data) - len(list(numbers))
        byte += keep
        page[byte : byte + replace] = data[at : at + replace]
        at, byte = at + replace, byte + replace
    return bytes(page)


writes = st.tuples(
    # Mostly few pages, so that what became of one write meets the next.
    st.sampled_from([3, 3, 4, 70, 70, 130, 199]) | st.integers(0, N_PAGES - 1),
    st.sampled_from(REWRITES),
    st.integers(0, 1 << 30),
)


@settings(max_examples=100, deadline=None)
@given(
    rounds=st.lists(st.lists(writes, min_size=1, max_size=40), min_size=1, max_size=5),
    cache_pages=st.sampled_from([0, 1, 2, 3, 7, 64, N_PAGES]),
    lanes=st.integers(1, 4),
    frame_bytes=st.sampled_from([8192, 20000, DEFAULT_FRAME_BYTES]),
    codecs=st.lists(
        st.sampled_from(["none", "delta", "lz4", "zstd:1", "zstd:6"]), min_size=1, max_size=3
    ),
    order=st.randoms(use_true_random=False),
)
def test_i3_the_target_becomes_equal_whatever_is_written(  # type: ignore[no-untyped-def]
    rounds, cache_pages, lanes, frame_bytes, codecs, order
) -> None:
    """In every round, whatever the order in which the lanes' frames arrive."""
    source, target, by_the_book = np.zeros((3, N_PAGES, 4096), np.uint8)
    replica = Replica(N_PAGES, cache_pages * 4096, lanes)
    pairs = [
        LanePair(source.reshape(-1), target.reshape(-1), replica, lane, frame_bytes)
        for lane in range(lanes)
    ]
    for round_no, batch in enumerate(rounds):
        for page, how, number in batch:
            rewrite(source[page], how, number)
        for lane, each in enumerate(pairs):
            each.encoder.codec = Codec.parse(codecs[round_no % len(codecs)])
            replica.touch_ahead(lane)
        # A page that was written twice is sent twice.
        pages = np.array([page for page, _, _ in batch], np.uint32)
        arriving = [
            [(each, frame) for _, frame in each.frames(part, round_no)]
            for each, part in zip(pairs, split_by_lane(pages, lanes), strict=True)
        ]
        while any(arriving):
            each, frame = order.choice([queue for queue in arriving if queue]).pop(0)
            applied = each.decoder.apply(frame)
            assert applied.rejected.size == 0
            assert applied.round_no == round_no
            assert applied.n_pages == len(read_frame(frame, by_the_book))
        touched = np.unique(pages)
        assert np.array_equal(target[touched], source[touched])
    assert np.array_equal(target, source)
    assert np.array_equal(by_the_book, source)
    check_cache(replica)


def check_cache(replica: Replica) -> None:
    """Slots and pages name each other, and a slot holds what the digest says."""
    for lane in range(replica.lanes):
        known = replica.knowledge_of_lane(lane)
        held = {int(page): slot for slot, page in enumerate(known.owners) if page != 0xFFFFFFFF}
        assert all(lane_of(page, replica.lanes) == lane for page in held)
        assert all(known.slots[page] == slot + 1 for page, slot in held.items())
        for page, slot in held.items():
            content = known.cache[slot * 512 : (slot + 1) * 512].tobytes()
            if known.digests[page]:
                assert known.digests[page] == xxhash.xxh3_64_intdigest(content, SEED)
        of_lane = [p for p in range(replica.n_pages) if lane_of(p, replica.lanes) == lane]
        if known.slots.size:
            assert sum(known.slots[of_lane] != 0) == len(held)


@pytest.mark.parametrize(
    ("before", "change", "kind"),
    [
        ("random", "zero", "zero"),
        ("random", "random", "raw"),
        ("random", "text", "lz4"),
        ("random", "byte", "delta"),
        ("random", "not at all", None),
        ("text", "zero", "zero"),
    ],
)
def test_a_page_goes_in_its_cheapest_form(before: str, change: str, kind: str | None) -> None:
    lane, source, target = pair()
    rewrite(source[5], before, 1)
    lane.send_one(5)
    rewrite(source[5], change, 2)
    assert lane.send_one(5)[0] == kind
    assert np.array_equal(source, target)


def test_content_that_moved_is_found_in_the_base() -> None:
    lane, source, target = pair()
    rewrite(source[5], "random", 1)
    lane.send_one(5)
    source[5, 1000:2000] = source[5, 900:1900].copy()
    ((done, frame),) = lane.frames(np.array([5], np.uint32))
    assert done.lz4_base == 1
    assert done.n_bytes < 200
    lane.decoder.apply(frame)
    assert np.array_equal(source, target)


def test_a_delta_that_outgrows_its_room_is_given_up() -> None:
    lane, source, target = pair()
    rewrite(source[5], "random", 1)
    lane.send_one(5)
    source[5].view(np.uint64)[: 4 * 127 : 4] ^= np.uint64(0xFFFFFFFFFFFFFFFF)
    assert lane.send_one(5)[0] == "lz4_base"
    assert np.array_equal(source, target)


def test_a_page_that_was_zero_in_between_has_no_base() -> None:
    lane, source, target = pair()
    for how, kind in (("random", "raw"), ("zero", "zero"), ("zero", None), ("random", "raw")):
        rewrite(source[5], how, 1)
        assert lane.send_one(5)[0] == kind
        assert np.array_equal(source, target)
        check_cache(lane.encoder.replica)


def test_without_a_cache_there_are_no_deltas_but_equal_pages_are_left_out() -> None:
    lane, source, target = pair(cache_pages=0)
    rewrite(source[5], "random", 1)
    assert lane.send_one(5)[0] == "raw"
    assert lane.send_one(5)[0] is None
    rewrite(source[5], "byte", 2)
    assert lane.send_one(5)[0] == "raw"
    assert np.array_equal(source, target)


def test_a_page_in_use_keeps_its_place_in_the_cache() -> None:
    lane, source, _target = pair(cache_pages=4)
    everything = np.arange(N_PAGES, dtype=np.uint32)
    for page in everything:
        rewrite(source[page], "random", int(page))
    lane.send_one(0)
    for page in range(1, 40):
        rewrite(source[0], "byte", page)
        assert lane.send_one(0)[0] == "delta"
        lane.send_one(page)
    lane.send(everything)
    rewrite(source[100], "byte", 1)
    assert lane.send_one(100)[0] == "raw", "long since evicted"


def test_i5_a_delta_is_applied_to_its_own_base_only() -> None:
    lane, source, target = pair()
    for change in ("byte", "stretch"):
        rewrite(source[9], "random", 1)
        lane.send_one(9)
        target[9, 4095] ^= 1
        before = target.copy()
        if change == "byte":
            rewrite(source[9], "byte", 2)
        else:
            source[9, 100:1500] = 3
        kind, applied = lane.send_one(9)
        assert kind == {"byte": "delta", "stretch": "lz4_base"}[change]
        assert applied is not None
        assert applied.rejected.tolist() == [9]
        assert np.array_equal(target, before), "a delta was applied to another base"

        lane.encoder.forget(applied.rejected)
        kind, applied = lane.send_one(9)
        assert kind in ("raw", "lz4")
        assert applied is not None
        assert applied.rejected.size == 0
        assert np.array_equal(source, target)


def test_i5_the_rest_of_a_frame_with_a_rejected_page_is_applied() -> None:
    lane, source, target = pair()
    pages = np.arange(6, dtype=np.uint32)
    for page in pages:
        rewrite(source[page], "random", int(page))
    lane.send(pages)
    target[[1, 4], 0] ^= 1
    for page in pages:
        rewrite(source[page], "byte", int(page))
    (applied,) = lane.send(pages)
    assert applied.rejected.tolist() == [1, 4]
    assert np.flatnonzero((source != target).any(axis=1)).tolist() == [1, 4]


def copying_pair(**arguments: int) -> tuple[LanePair, np.ndarray, np.ndarray]:
    """As `pair`; page 1 is sent, and page 5 has the same bytes."""
    lane, source, target = pair(**arguments)
    rewrite(source[1], "random", 1)
    source[5] = source[1]
    assert lane.send_one(1)[0] == "raw"
    return lane, source, target


@pytest.mark.parametrize("codec", [LZ4, Codec(Method.ZSTD, 1)])
def test_a_page_that_another_has_been_sent_as_is_its_number(codec: Codec) -> None:
    lane, source, target = copying_pair()
    lane.encoder.codec = codec
    ((done, frame),) = lane.frames(np.array([5], np.uint32))
    assert (done.copy, done.n_bytes) == (1, 40 + 4 + 8 + 7)
    assert lane.decoder.apply(frame).rejected.size == 0
    assert np.array_equal(source, target)
    check_cache(lane.encoder.replica)
    rewrite(source[5], "byte", 1)
    assert lane.send_one(5)[0] == "delta", "what was sent as a copy is a base as well"


@pytest.mark.parametrize("codec", [NONE, DELTA])
def test_what_is_not_compressed_is_not_looked_up_either(codec: Codec) -> None:
    lane, source, target = copying_pair()
    lane.encoder.codec = codec
    assert lane.send_one(5)[0] == "raw"
    assert np.array_equal(source, target)
    rewrite(source[6], "random", 2)
    source[7] = source[6]
    lane.send_one(6)
    lane.encoder.codec = LZ4
    assert lane.send_one(7)[0] == "raw"


@pytest.mark.parametrize("codec", [LZ4, Codec(Method.ZSTD, 1)])
def test_a_page_with_a_very_short_delta_is_neither_a_copy_nor_an_original(codec: Codec) -> None:
    lane, source, target = copying_pair()
    lane.encoder.codec = codec
    assert lane.send_one(5)[0] == "copy"
    source[1, 7] += 1
    source[9] = source[1]
    assert lane.send_one(1)[0] == "delta"
    assert lane.send_one(9)[0] == "raw"
    source[5] = source[9]
    assert lane.send_one(5)[0] == "delta"
    assert np.array_equal(source, target)


def test_a_copy_is_the_next_ones_original() -> None:
    lane, source, _ = copying_pair()
    source[9] = source[5]
    assert lane.send_one(5)[0] == "copy"
    rewrite(source[1], "random", 2)
    lane.send_one(1)
    assert lane.send_one(9)[0] == "copy"


@pytest.mark.parametrize("what", ["sent", "sent, and back", "written", "zero", "forgotten"])
def test_an_original_that_has_changed_is_none(what: str) -> None:
    """`sent, and back`: the page's memory is the same again, but the receiver does not know."""
    lane, source, target = copying_pair()
    if what == "forgotten":
        lane.encoder.forget(np.array([1], np.uint32))
    else:
        rewrite(source[1], "zero" if what == "zero" else "random", 2)
    if what.startswith("sent") or what == "zero":
        lane.send_one(1)
    if what == "sent, and back":
        source[1] = source[5]
    kind, applied = lane.send_one(5)
    assert kind == "raw"
    assert applied is not None
    assert applied.rejected.size == 0
    assert np.array_equal(source[5], target[5])


def test_pages_of_equal_digests_are_copies_only_if_their_bytes_are_equal() -> None:
    """XXH3 has 64 bits: what a guest of terabytes may meet is made up here."""
    lane, source, target = copying_pair()
    known = lane.encoder.replica.knowledge_of_lane(0)
    for last_byte in (0, 4095):
        source[5] = source[1]
        source[5, last_byte] ^= 1
        digest = digest_all(source[5], SEED)[0]
        known.digests[1] = digest
        known.originals[digest & np.uint64(known.originals.size - 1)] = 1 + 1
        known.digests[5] = 0
        assert lane.send_one(5)[0] == "raw"
        assert np.array_equal(source, target)


def test_i3_the_original_is_a_page_of_the_same_lane() -> None:
    source, target = np.ones((2, N_PAGES * 4096), np.uint8)
    rewrite(source[:4096], "random", 1)
    source.reshape(-1, 4096)[1:] = source[:4096]
    replica = Replica(N_PAGES, 0, lanes=2)
    lanes = [LanePair(source, target, replica, lane) for lane in (0, 1)]
    for lane, pages in zip(lanes, ([0, 1, 128], [64, 65, 192]), strict=True):
        assert [lane.send_one(page)[0] for page in pages] == ["raw", "copy", "copy"]


def test_the_table_of_originals_takes_at_most_four_bytes_a_page() -> None:
    for n_pages in (0, 1, 63, 64, 65, 127, 128, 1000, 4096):
        for lanes in (1, 2, 3, 200):
            entries = Replica(n_pages, 0, lanes).knowledge_of_lane(lanes - 1).originals.size
            assert entries.bit_count() == 1
            assert entries * lanes <= max(n_pages, lanes) < 2 * (entries + 1) * lanes


def test_i5_a_copy_that_was_rejected_is_sent_in_full() -> None:
    """Although there is a page with these bytes, of which it is not known yet that it was rejected,
    too."""
    lane, source, target = copying_pair()
    source[6] = source[5]
    target[1, 4095] ^= 1
    before = target.copy()
    for page in (5, 6):
        kind, applied = lane.send_one(page)
        assert kind == "copy"
        assert applied is not None
        assert applied.rejected.tolist() == [page]
    assert np.array_equal(target, before)
    for page in (5, 6):
        lane.encoder.forget(np.array([page], np.uint32))
        assert lane.send_one(page, full=True)[0] == "raw"
        assert np.array_equal(source[page], target[page])
    source[9] = source[5]
    assert lane.send_one(9)[0] == "copy", "what was sent in full is an original"
    assert np.array_equal(source[9], target[9])


few_pages = st.sampled_from([0, 1, 2, 63, 64, 65, 66, 130, 192, 193])
events = st.tuples(st.just("write"), few_pages, st.integers(0, 3)) | st.tuples(
    st.sampled_from(["touch", "send", "forget", "spoil"]), few_pages, st.integers(0, 4095)
)


@settings(max_examples=150, deadline=None)
@given(
    rounds=st.lists(st.lists(events, max_size=30), min_size=1, max_size=5),
    cache_pages=st.sampled_from([0, 2, N_PAGES]),
    lanes=st.integers(1, 3),
    codecs=st.lists(st.sampled_from(["delta", "lz4", "zstd:1"]), min_size=1, max_size=3),
)
def test_i5_pages_of_few_contents_arrive_whatever_happens_to_their_originals(  # type: ignore[no-untyped-def]
    rounds, cache_pages, lanes, codecs
) -> None:
    """They are written while nobody sends them, forgotten, and spoiled at the receiver. What it
    rejects arrives at the second attempt, for good."""
    source, target = np.zeros((2, N_PAGES, 4096), np.uint8)
    contents = np.random.default_rng(1).integers(0, 256, (4, 4096), np.uint8)
    contents[0] = 0
    replica = Replica(N_PAGES, cache_pages * 4096, lanes)
    pairs = [
        LanePair(source.reshape(-1), target.reshape(-1), replica, lane) for lane in range(lanes)
    ]
    everything = np.arange(N_PAGES, dtype=np.uint32)
    spoiled = set()  # which the sender may take for equal
    for round_no, batch in enumerate(rounds):
        to_send = []
        for what, page, number in batch:
            if what == "write":
                source[page] = contents[number]
                to_send.append(page)
            elif what == "touch":
                source[page] = contents[number % 4]
            elif what == "spoil":
                target[page, number] ^= 1
                spoiled.add(page)
            elif what == "forget":
                replica.forget(np.array([page], np.uint32))
            else:
                to_send.append(page)
        parts = split_by_lane(np.array(to_send, np.uint32), lanes)
        for each, part in zip(pairs, parts, strict=True):
            each.encoder.codec = Codec.parse(codecs[round_no % len(codecs)])
            rejected = np.concatenate([part[:0], *(done.rejected for done in each.send(part))])
            # Some are sent again before it is known that others were rejected.
            for answered in np.array_split(rejected, 2):
                each.encoder.forget(answered)
                for _, frame in each.frames(answered, full=True):
                    assert each.decoder.apply(frame).rejected.size == 0
        for page in set(to_send) - spoiled:
            assert np.array_equal(source[page], target[page])
    replica.forget(everything)
    for each, part in zip(pairs, split_by_lane(everything, lanes), strict=True):
        for applied in each.send(part):
            assert applied.rejected.size == 0
    assert np.array_equal(source, target)
    check_cache(replica)


@pytest.mark.parametrize(
    ("content", "cache_pages", "codec", "expected"),
    [
        ("random", 0, LZ4, "raw"),
        ("random", 4, LZ4, "delta"),
        ("text", 0, LZ4, "lz4"),
        ("text", 0, NONE, "raw"),
        ("shared", 0, LZ4, "copy"),
    ],
)
def test_i2_a_frame_agrees_with_itself_while_the_page_is_written(
    content: str, cache_pages: int, codec: Codec, expected: str
) -> None:
    """Were the digest, the delta or the LZ4 block made from live memory, the receiver would not
    hold what the sender takes it to hold: a delta or a copy would be rejected, or a page left out
    wrongly.
    """
    lane, source, target = pair(4, cache_pages)
    lane.encoder.codec = codec
    # States of all four pages, of which neighbours differ in a few bytes; equal ones if shared.
    states = [source.copy()]
    for page in range(4):
        rewrite(states[0][page], content, 1 if content == "shared" else page + 1)
    for number in range(1, 8):
        states.append(states[-1].copy())
        for page in range(4):
            change = 100 * number + (0 if content == "shared" else page)
            rewrite(states[-1][page], "byte", change)
            rewrite(states[-1][page], "byte", change + 50)
    stop = threading.Event()

    def hammer() -> None:
        # By ctypes, which writes without the GIL, back and forth without a pause.
        addresses = [state.ctypes.data for state in states + states[::-1]]
        while not stop.is_set():
            for address in addresses:
                ctypes.memmove(source.ctypes.data, address, source.nbytes)

    writer = threading.Thread(target=hammer, daemon=True)
    writer.start()
    pages = np.tile(np.arange(4, dtype=np.uint32), 5000)
    forms = dict.fromkeys(KINDS, 0)
    deadline = time.monotonic() + 30
    try:
        while forms[expected] < 2000:
            assert time.monotonic() < deadline, forms
            for done, frame in lane.frames(pages):
                for kind in KINDS:
                    forms[kind] += getattr(done, kind)
                assert lane.decoder.apply(frame).rejected.size == 0
            # What is left out from now on must be what the receiver holds.
            assert lane.holds_what_the_sender_believes()
    finally:
        stop.set()
        writer.join(10)
    lane.send(pages)
    assert np.array_equal(source, target)


def test_i3_a_frame_is_applied_once_and_in_its_turn() -> None:
    lane, source, target = pair()
    frames = []
    for number in range(3):
        rewrite(source[0], "random", number)
        frames += [frame for _, frame in lane.frames(np.array([0], np.uint32))]
    first, second, third = frames
    with pytest.raises(FrameError, match="frame 1 where 0 was due"):
        lane.decoder.apply(second)
    assert lane.decoder.apply(first).sequence == 0
    with pytest.raises(FrameError, match="frame 0 where 1 was due"):
        lane.decoder.apply(first)
    with pytest.raises(FrameError, match="frame 2 where 1 was due"):
        lane.decoder.apply(third)
    assert lane.decoder.next_sequence == 1
    lane.decoder.apply(second)
    lane.decoder.apply(third)
    assert np.array_equal(source, target)


def test_i3_a_page_belongs_to_one_lane() -> None:
    source, target = np.ones((2, N_PAGES * 4096), np.uint8)
    replica = Replica(N_PAGES, 0, lanes=2)
    lanes = [LanePair(source, target, replica, lane) for lane in (0, 1)]
    with pytest.raises(IndexError, match="page 64 is not one of lane 0"):
        lanes[0].send(np.array([63, 64], np.uint32))
    assert replica.known_pages == 0, "page 63 was never sent"
    ((_, frame),) = lanes[1].frames(np.array([64], np.uint32))
    with pytest.raises(FrameError, match="lane"):
        lanes[0].decoder.apply(frame)


@given(st.lists(st.integers(0, 2**32 - 1)), st.integers(1, 255))
def test_i3_pages_are_dealt_to_lanes_for_good(pages: list[int], lanes: int) -> None:
    parts = split_by_lane(np.array(pages, np.uint32), lanes)
    assert len(parts) == lanes
    for lane, part in enumerate(parts):
        assert part.tolist() == [page for page in pages if lane_of(page, lanes) == lane]
    # The 64 pages of a word of a bitmap keep together.
    assert all(lane_of(page, lanes) == lane_of(page // 64 * 64, lanes) for page in pages)


def test_memory_that_may_only_be_read_can_be_sent() -> None:
    source = np.ones(4096, np.uint8)
    source.flags.writeable = False
    target = np.zeros(4096, np.uint8)
    LanePair(source, target, Replica(1, 4096)).send(np.array([0], np.uint32))
    assert np.array_equal(source, target)


def test_a_frame_holds_no_more_pages_than_its_counter_can_tell() -> None:
    n_pages = 65536 + 10
    source, target = np.zeros((2, n_pages * 4096), np.uint8)
    target[-1] = 1
    lane = LanePair(source, target, Replica(n_pages, 0))
    applied = lane.send(np.arange(n_pages, dtype=np.uint32))
    assert [each.n_pages for each in applied] == [65535, 11]
    assert not target[-1]


def test_unfit_arguments_are_refused() -> None:
    memory, replica = np.zeros(2 * 4096, np.uint8), Replica(2, 0)
    encoder = Encoder(memory, replica, SEED)
    indices, out = np.zeros(1, np.uint32), np.empty(DEFAULT_FRAME_BYTES, np.uint8)
    with pytest.raises(ValueError, match="start 2 in a list of 1"):
        encoder.encode(indices, 2, out, round_no=0, sequence=0)
    with pytest.raises(ValueError, match="room"):
        encoder.encode(indices, 0, out[1:], round_no=0, sequence=0)
    with pytest.raises(ValueError, match="multiple of 8"):
        encoder.encode(indices, 0, np.empty(out.size + 1, np.uint8)[1:], round_no=0, sequence=0)
    with pytest.raises(IndexError, match="page 2"):
        encoder.encode(indices + np.uint32(2), 0, out, round_no=0, sequence=0)
    with pytest.raises(ValueError, match="pages"):
        Encoder(memory[:4096], replica, SEED)
    with pytest.raises(ValueError, match="lane 1 of 1"):
        Encoder(memory, replica, SEED, lane=1)
    for frame_bytes in (8191, MAX_FRAME_BYTES + 1):
        with pytest.raises(ValueError, match="frames of"):
            Encoder(memory, replica, SEED, frame_bytes=frame_bytes)
    with pytest.raises(ValueError, match="writable"):
        Decoder(memory, 1, SEED)
    with pytest.raises(ValueError, match="lane 1 of 1"):
        Decoder(memory, 2, SEED, lane=1)
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        Decoder(memory, 2, SEED)
    for unfit in ((-1, 0, 1), (1 << 32, 0, 1), (1, -1, 1), (1, 0, 0), (1, 0, 256)):
        with pytest.raises(ValueError, match=r"pages|cache|lanes"):
            Replica(*unfit)


@pytest.mark.parametrize("codec", [NONE, LZ4, Codec(Method.ZSTD, 1)])
def test_frames_are_as_long_as_their_codec_wants_them(codec: Codec) -> None:
    n_pages = 3 * MAX_COMPRESSED_FRAME_BYTES // 4096
    memory = np.frombuffer(np.random.default_rng(1).bytes(n_pages * 4096), np.uint8)
    frame_bytes = 2 * MAX_COMPRESSED_FRAME_BYTES
    lane = LanePair(memory, np.zeros_like(memory), Replica(n_pages, 0), frame_bytes=frame_bytes)
    lane.encoder.codec = codec
    lengths = [done.n_bytes for done, _ in lane.frames(np.arange(n_pages, dtype=np.uint32))]
    limit = MAX_COMPRESSED_FRAME_BYTES * (2 if codec == NONE else 1)
    assert limit - 2 * 4096 < max(lengths) <= limit
