"""Encoder and decoder together: any pages, any cache, any lanes, against plain memory.

What a frame says is read by `read_frame`, which knows the format from the documentation alone and
decodes with the Python packages.
"""

import ctypes
import struct
import threading
import time

import lz4.block
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies._internal.random import ArtificialRandom

from tests.transport.lane_pair import (
    KINDS,
    N_PAGES,
    REWRITES,
    SEED,
    LanePair,
    check_cache,
    lane_of,
    pair,
    rewrite,
)
from transport.receiving.decoder import Decoder
from transport.sending.encoder import MAX_COMPRESSED_FRAME_BYTES, Encoder
from transport.sending.replica import Replica
from transport.wire.codec import LZ4, NONE, Codec, Method
from transport.wire.errors import FrameError
from transport.wire.frames import DEFAULT_FRAME_BYTES, MAX_FRAME_BYTES, split_by_lane


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
def test_i3_the_target_becomes_equal_whatever_is_written(
    rounds: list[list[tuple[int, str, int]]],
    cache_pages: int,
    lanes: int,
    frame_bytes: int,
    codecs: list[str],
    order: ArtificialRandom,
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
    for number in map(int, everything):
        rewrite(source[number], "random", number)
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
    assert not replica.knowledge_of_lane(0).digests.any(), "page 63 was never sent"
    ((_, frame),) = lanes[1].frames(np.array([64], np.uint32))
    with pytest.raises(FrameError, match="lane"):
        lanes[0].decoder.apply(frame)


@given(st.lists(st.integers(0, 2**32 - 1)), st.integers(1, 255))
def test_i3_pages_are_dealt_to_lanes_for_good(pages: list[int], lanes: int) -> None:
    parts = split_by_lane(np.array(pages, np.uint32), lanes)
    assert len(parts) == lanes
    for lane, part in enumerate(parts):
        assert part.tolist() == [page for page in pages if lane_of(page, lanes) == lane]


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
