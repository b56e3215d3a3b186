"""Frames that are malformed, corrupted or hostile: refused, and nothing written where it must not.

Frames are built here from the documentation of the format, not by the code under test.
"""

import struct
from collections.abc import Callable

import lz4.block
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.receiving.decoder import Decoder
from transport.receiving.parse import parse_frame
from transport.wire.errors import FrameError
from transport.wire.frames import MAX_FRAME_BYTES

SEED = 0xA5A5A5A5A5A5A5A5
N_PAGES = 8
GUARD_PAGES = 32

ZERO, RAW, LZ4, DELTA, LZ4_BASE, COPY = range(6)
HELD = np.random.default_rng(5).bytes(4096)  # what every page holds at first
HELD_DIGEST = xxhash.xxh3_64_intdigest(HELD, SEED)
BLOCK = lz4.block.compress(b"page " * 819 + b"!", store_size=False)
BASE_BLOCK = lz4.block.compress(HELD[:4000] + b"x" * 96, store_size=False, dict=HELD)
OTHER = bytes(range(256)) * 16
OTHER_DIGEST = xxhash.xxh3_64_intdigest(OTHER, SEED)

Page = tuple[int, int, bytes, int]  # index, kind, data, base digest


def make_frame(pages: list[Page], **header: int) -> bytes:
    """A frame with these pages; fields of the header can be given wrong values."""
    body = b"".join(data for _, _, data, _ in pages)
    body += b"".join(struct.pack("<Q", base) for _, kind, _, base in pages if kind in (3, 4, 5))
    body += b"".join(struct.pack("<I", index) for index, _, _, _ in pages)
    body += b"".join(struct.pack("<H", len(data)) for _, _, data, _ in pages)
    body += bytes(kind for _, kind, _, _ in pages)
    fields = {
        "sequence": 0,
        "round_no": 1,
        "body_bytes": len(body),
        "n_pages": len(pages),
        "lane": 0,
        "coding": 0,
        "unpacked": 0,
    } | {name: value for name, value in header.items() if name not in ("magic", "version")}
    start = struct.pack("<II", header.get("magic", 0x67706676), header.get("version", 3))
    return with_checksum(start + bytes(8) + struct.pack("<QIIHBBI", *fields.values()) + body)


def pack(frame: bytes, unpacked: int | None = None, packed: bytes | None = None) -> bytes:
    """The frame with its body packed, or with `packed` for it."""
    body = frame[40:]
    packed = zstandard.compress(body) if packed is None else packed
    unpacked = len(body) if unpacked is None else unpacked
    header = frame[:28] + struct.pack("<I", len(packed)) + frame[32:35]
    return with_checksum(header + struct.pack("<BI", 1, unpacked) + packed)


def with_checksum(frame: bytes) -> bytes:
    """The frame with a checksum that fits, so that the checks behind it are reached."""
    covered = frame[16:]
    n_pages, _lane, coding = struct.unpack_from("<HBB", frame, 32) if len(frame) >= 40 else (0,) * 3
    payload, tables = frame[40 : len(frame) - 7 * n_pages], frame[len(frame) - 7 * n_pages :]
    if coding == 2:
        pages = (payload[at : at + 4096] for at in range(0, len(payload), 4096))
        digests = (xxhash.xxh3_64_intdigest(page, SEED) for page in pages)
        covered = frame[16:40] + b"".join(struct.pack("<Q", each) for each in digests) + tables
    return frame[:8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(covered, SEED)) + frame[16:]


GOOD: list[Page] = [
    (0, ZERO, b"", 0),
    (1, RAW, OTHER, 0),
    (2, LZ4, BLOCK, 0),
    (3, DELTA, b"\x05\x02ab\x83\x01\x01c", HELD_DIGEST),
    (4, LZ4_BASE, BASE_BLOCK, HELD_DIGEST),
    (5, COPY, b"\1\0\0\0", OTHER_DIGEST),
    (7, ZERO, b"", 0),
]


GOOD_RAW: list[Page] = [
    (0, ZERO, b"", 0),
    (1, RAW, OTHER, 0),
    (2, RAW, HELD[::-1], 0),
    (5, ZERO, b"", 0),
]


class GuardedMemory:
    """Pages to decode into, in the middle of memory that must stay as it is."""

    def __init__(self) -> None:
        self.before = np.frombuffer(HELD * (GUARD_PAGES + N_PAGES + GUARD_PAGES), np.uint8)
        self.whole = self.before.copy()
        self.pages = self.whole[GUARD_PAGES * 4096 : (GUARD_PAGES + N_PAGES) * 4096]
        self.decoder = Decoder(self.pages, N_PAGES, SEED)

    def check_guards(self) -> None:
        for guard in (slice(0, GUARD_PAGES * 4096), slice(-GUARD_PAGES * 4096, None)):
            assert np.array_equal(self.whole[guard], self.before[guard])

    def is_untouched(self) -> bool:
        return np.array_equal(self.whole, self.before)


def refuse(frame: bytes, message: str | None = None) -> None:
    memory = GuardedMemory()
    with pytest.raises(FrameError, match=message):
        memory.decoder.apply(frame)
    assert memory.is_untouched()
    assert memory.decoder.next_sequence == 0


@pytest.mark.parametrize("coding", [bytes, pack])
@pytest.mark.parametrize("container", [bytes, bytearray, memoryview])
def test_a_frame_made_by_the_book_is_applied(
    container: type, coding: Callable[[bytes], bytes]
) -> None:
    memory = GuardedMemory()
    applied = memory.decoder.apply(container(coding(make_frame(GOOD, sequence=0, round_no=9))))
    assert (applied.round_no, applied.sequence, applied.n_pages) == (9, 0, 7)
    assert applied.rejected.tolist() == []
    pages = [page.tobytes() for page in memory.pages.reshape(-1, 4096)]
    assert pages[0] == pages[7] == bytes(4096)
    assert pages[1] == pages[5] == OTHER
    assert pages[2] == b"page " * 819 + b"!"
    assert pages[3] == HELD[:5] + b"ab" + HELD[7:138] + b"c" + HELD[139:]
    assert pages[4] == HELD[:4000] + b"x" * 96
    assert pages[6] == HELD
    memory.check_guards()


def test_a_frame_of_raw_pages_made_by_the_book_is_applied() -> None:
    memory = GuardedMemory()
    assert memory.decoder.apply(make_frame(GOOD_RAW, coding=2)).n_pages == len(GOOD_RAW)
    expected = {index: data or bytes(4096) for index, _, data, _ in GOOD_RAW}
    for index, page in enumerate(memory.pages.reshape(-1, 4096)):
        assert page.tobytes() == expected.get(index, HELD)
    memory.check_guards()


@pytest.mark.parametrize(
    ("pages", "header", "message"),
    [
        ([*GOOD_RAW, (6, LZ4, BLOCK, 0)], {}, "zero or as they are"),
        ([*GOOD_RAW, (6, LZ4, bytes(4095), 0), (7, LZ4, b"x", 0)], {}, "kind 2 in a frame of raw"),
        (
            [*GOOD_RAW, (6, LZ4, bytes(4084), 0), (7, COPY, b"\1\0\0\0", OTHER_DIGEST)],
            {},
            "kind 5 in a frame of raw",
        ),
        ([*GOOD_RAW, (8, RAW, HELD, 0)], {}, "page 8 of 8"),
        ([*GOOD_RAW, (7, RAW, HELD[1:], 0)], {}, "zero or as they are"),
        (GOOD_RAW, {"n_pages": 5}, "zero or as they are"),
        (GOOD_RAW, {"n_pages": 65535}, "zero or as they are"),
        (GOOD_RAW, {"unpacked": 1}, "claims to be packed"),
        (GOOD_RAW, {"lane": 1}, "lane 1 on lane 0"),
        ([], {}, "a frame of 40 bytes"),
    ],
)
def test_i9_a_frame_of_raw_pages_that_is_none_is_refused(
    pages: list[Page], header: dict[str, int], message: str
) -> None:
    refuse(make_frame(pages, coding=2, **header), message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"magic": 0x67706600}, "not a page frame"),
        ({"version": 2}, "version 2; this side speaks 3"),
        ({"version": 0}, "version 0"),
        ({"body_bytes": 7}, "body of 7 bytes"),
        ({"body_bytes": 0xFFFFFFFF}, "body of 4294967295 bytes"),
        ({"n_pages": 0}, "0 pages"),
        ({"n_pages": 65535}, "65535 pages"),
        ({"lane": 1}, "lane 1 on lane 0"),
        ({"coding": 3}, "unknown coding 3"),
        ({"coding": 255, "unpacked": 4096}, "unknown coding 255"),
        ({"unpacked": 1}, "as it is that claims to be packed from 1 bytes"),
        ({"sequence": 1}, "frame 1 where 0 was due"),
        ({"sequence": 2**64 - 1}, "frame 18446744073709551615"),
    ],
)
def test_a_wrong_header_is_refused(header: dict[str, int], message: str) -> None:
    refuse(make_frame(GOOD, **header), message)


def test_i9_a_packed_body_of_another_length_than_announced_is_refused() -> None:
    frame = make_frame(GOOD)
    length = len(frame) - 40
    for unpacked in (length - 1, length + 1):
        refuse(pack(frame, unpacked), f"of {length} bytes where {unpacked} are announced")
    refuse(pack(frame, 0), "body of 0 bytes when unpacked")
    refuse(pack(frame, 7 * (4096 + 7 + 8) + 1), "7 pages in a body")
    refuse(pack(frame, 0xFFFFFFFF), "7 pages in a body")
    many = make_frame([(0, ZERO, b"", 0)] * 65535)
    refuse(pack(many, MAX_FRAME_BYTES), f"65535 pages in a body of {MAX_FRAME_BYTES} bytes")


def zstandard_frame(content_bytes: int, window: int, block: bytes) -> bytes:
    """One with a header of our own (RFC 8878, 3.1.1): `window` is the descriptor's byte."""
    return b"\x28\xb5\x2f\xfd\xc0" + struct.pack("<BQ", window, content_bytes) + block


BODY = make_frame(GOOD)[40:]
RAW_BLOCK = (len(BODY) << 3 | 1).to_bytes(3, "little") + BODY  # the last one
BOMB_BLOCK = (len(BODY) << 3 | 2).to_bytes(3, "little") + b"x"  # one byte, many times


def test_a_packed_body_made_by_the_book_is_applied() -> None:
    packed = zstandard_frame(len(BODY), 0x50, RAW_BLOCK)
    assert GuardedMemory().decoder.apply(pack(make_frame(GOOD), packed=packed)).n_pages == len(GOOD)


@pytest.mark.parametrize(
    "packed",
    [
        b"\x28\xb5\x2f\xfd",
        zstandard.compress(BODY)[:-1],
        zstandard.compress(BODY) + b"x",
        zstandard.compress(BODY) * 2,
        BODY,
        zstandard.ZstdCompressor(write_content_size=False).compress(BODY),
        zstandard_frame(len(BODY), 0x50, BOMB_BLOCK * 1000),
        zstandard_frame(2**62, 0x50, BOMB_BLOCK),
        zstandard_frame(len(BODY), 0xFF, RAW_BLOCK),  # a window of terabytes
        zstandard_frame(len(BODY) + 1, 0x50, RAW_BLOCK),
        zstandard_frame(len(BODY) - 1, 0x50, RAW_BLOCK),
        b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstandard.compress(BODY),
    ],
)
def test_i9_a_packed_body_that_is_not_one_whole_frame_is_refused(packed: bytes) -> None:
    refuse(pack(make_frame(GOOD), packed=packed), "pack")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6))
def test_i9_a_packed_body_with_changed_bytes_stays_within_bounds(
    changes: list[tuple[int, int]],
) -> None:
    packed = bytearray(zstandard.compress(BODY))
    for at, byte in changes:
        packed[at % len(packed)] = byte
    expect_within_bounds(pack(make_frame(GOOD), packed=bytes(packed)))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ((N_PAGES, ZERO, b"", 0), "page 8 of 8"),
        ((0xFFFFFFFF, RAW, bytes(4096), 0), "page 4294967295 of 8"),
        ((0, 6, b"x", 0), "unknown page kind 6"),
        ((0, 255, b"", 0), "unknown page kind 255"),
        ((0, ZERO, b"x", 0), "length"),
        ((0, RAW, bytes(4095), 0), "length"),
        ((0, RAW, bytes(4097), 0), "length"),
        ((0, LZ4, b"", 0), "length"),
        ((0, LZ4, bytes(4096), 0), "length"),
        ((0, DELTA, b"", HELD_DIGEST), "length"),
        ((0, LZ4_BASE, b"", HELD_DIGEST), "length"),
        ((0, DELTA, bytes(65535), HELD_DIGEST), "length"),
        ((0, COPY, b"", HELD_DIGEST), "length"),
        ((0, COPY, b"\6\0\0", HELD_DIGEST), "length"),
        ((0, COPY, b"\6\0\0\0\0", HELD_DIGEST), "length"),
        ((0, COPY, b"\6".ljust(4096, b"\0"), HELD_DIGEST), "length"),
        ((0, COPY, b"\x08\0\0\0", HELD_DIGEST), "copy of a page that is none of lane 0"),
        ((0, COPY, b"\6\0\0\x80", HELD_DIGEST), "copy of a page that is none of lane 0"),
        ((0, COPY, b"\xff\xff\xff\xff", HELD_DIGEST), "copy of a page that is none of lane 0"),
    ],
)
def test_i9_a_wrong_page_is_refused_before_anything_is_written(page: Page, message: str) -> None:
    refuse(make_frame([*GOOD, page]), message)
    refuse(pack(make_frame([*GOOD, page])), f"{message}|8 pages in a body")


def test_tables_that_do_not_fit_into_the_body_are_refused() -> None:
    frame = bytearray(make_frame([(0, DELTA, b"\x00\x01x", HELD_DIGEST)]))
    del frame[40:46]
    frame[28:32] = struct.pack("<I", len(frame) - 40)
    refuse(with_checksum(bytes(frame)), "cannot hold the tables")
    frame = bytearray(make_frame([(0, COPY, b"\1\0\0\0", HELD_DIGEST)]))
    del frame[40:45]
    frame[28:32] = struct.pack("<I", len(frame) - 40)
    refuse(with_checksum(bytes(frame)), "cannot hold the tables")


def test_lengths_that_do_not_add_up_are_refused() -> None:
    frame = make_frame([(0, LZ4, BLOCK, 0)])
    refuse(with_checksum(frame[:-3] + struct.pack("<H", len(BLOCK) - 1) + frame[-1:]), "payload of")
    # A copy of which only a part of the number is there.
    copy = bytearray(make_frame([(0, COPY, b"\1\0\0\0", HELD_DIGEST)]))
    del copy[42]
    copy[28:32] = struct.pack("<I", len(copy) - 40)
    refuse(with_checksum(bytes(copy)), "payload of")
    # 70 pages of 4095 bytes, of which the payload holds one.
    frame = make_frame([(0, LZ4, bytes(4095), 0)] + [(0, ZERO, b"", 0)] * 69)
    frame = frame[: -70 * 3] + struct.pack("<H", 4095) * 70 + bytes([LZ4]) * 70
    refuse(with_checksum(frame), "payload of")


def test_a_frame_cut_short_or_too_long_is_refused() -> None:
    frame = make_frame(GOOD)
    for length in [*range(64), len(frame) - 1]:
        refuse(frame[:length], "bytes")
    refuse(frame + b"x", "bytes")
    refuse(bytes(MAX_FRAME_BYTES + 1), f"frame of {MAX_FRAME_BYTES + 1} bytes")


@pytest.mark.parametrize(
    ("frame", "stride"),
    [
        (make_frame([(0, DELTA, b"\x05\x02ab", HELD_DIGEST)]), 1),
        (make_frame(GOOD_RAW, coding=2), 11),
    ],
)
def test_each_flipped_bit_is_found(frame: bytes, stride: int) -> None:
    for bit in range(0, len(frame) * 8, stride):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            parse_frame(flipped, seed=SEED, n_pages=N_PAGES)


def test_a_frame_of_another_migration_is_refused() -> None:
    with pytest.raises(FrameError, match="checksum"):
        parse_frame(make_frame(GOOD), seed=SEED + 1, n_pages=N_PAGES)


def test_i3_a_page_of_another_lane_is_refused() -> None:
    frame = make_frame([(127, ZERO, b"", 0), (128, ZERO, b"", 0)], lane=1)
    with pytest.raises(FrameError, match="page of another lane"):
        parse_frame(frame, seed=SEED, n_pages=256, lane=1, lanes=2)


@pytest.mark.parametrize(
    ("original", "good"), [(63, False), (64, True), (127, True), (128, False), (192, True)]
)
def test_i3_the_original_of_a_copy_is_of_the_same_lane(original: int, good: bool) -> None:
    memory = np.frombuffer(HELD * 256, np.uint8).copy()
    decoder = Decoder(memory, 256, SEED, lane=1, lanes=2)
    pages: list[Page] = [
        (66, ZERO, b"", 0),
        (65, COPY, struct.pack("<I", original), HELD_DIGEST),
    ]
    frame = make_frame(pages, lane=1)
    if good:
        assert decoder.apply(frame).rejected.size == 0
    else:
        with pytest.raises(FrameError, match="copy of a page that is none of lane 1"):
            decoder.apply(frame)
        assert memory.tobytes() == HELD * 256


@pytest.mark.parametrize("shift", range(1, 9))
def test_a_copy_names_its_original_at_any_alignment(shift: int) -> None:
    memory = np.frombuffer(HELD * 0x12345, np.uint8).copy()
    memory[0x12344 * 4096 :] = np.frombuffer(OTHER, np.uint8)
    pages: list[Page] = [
        (0, DELTA, b"\0" + bytes([shift]) + bytes(shift), HELD_DIGEST),
        (1, COPY, b"\x44\x23\1\0", OTHER_DIGEST),
    ]
    assert Decoder(memory, 0x12345, SEED).apply(make_frame(pages)).rejected.size == 0
    assert memory[4096:8192].tobytes() == OTHER


def test_i5_a_copy_of_what_the_original_does_not_hold_is_rejected_and_the_rest_applied() -> None:
    memory = GuardedMemory()
    pages: list[Page] = [
        (3, COPY, b"\1\0\0\0", HELD_DIGEST),
        (1, RAW, OTHER, 0),
        (0, COPY, b"\1\0\0\0", HELD_DIGEST),
        (2, COPY, b"\1\0\0\0", OTHER_DIGEST),
        (4, COPY, b"\4\0\0\0", HELD_DIGEST),
    ]
    assert memory.decoder.apply(make_frame(pages)).rejected.tolist() == [0]
    assert memory.pages.tobytes() == HELD + OTHER * 2 + HELD * 5
    memory.check_guards()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (LZ4, BLOCK[:-1]),
        (LZ4, b"\x00"),
        (LZ4, lz4.block.compress(bytes(4095), store_size=False)),
        (LZ4, lz4.block.compress(bytes(4097), store_size=False)),
        (LZ4, lz4.block.compress(bytes(900000), store_size=False)),  # a bomb
        (LZ4, BASE_BLOCK),  # reaches for a dictionary that is not there
        (LZ4_BASE, BASE_BLOCK[:-1]),
        (LZ4_BASE, b"\x0f\x01\x10" + b"\xff" * 20 + b"\x00"),  # reaches in front of the base
        (DELTA, b"\x00"),  # no second number
        (DELTA, b"\x80"),  # half a number
        (DELTA, b"\x00\x80"),
        (DELTA, b"\x80\x80\x01\x01x"),  # a number of three bytes
        (DELTA, b"\x05\x00"),  # replaces nothing
        (DELTA, b"\x00\x02x"),  # bytes are missing
        (DELTA, b"\x80\x20\x01x"),  # keeps 4096, replaces one behind the page
        (DELTA, b"\xff\x1f\x02xy"),  # keeps 4095, replaces two
        (DELTA, b"\xff\x7f\xff\x7fx"),
        (DELTA, b"\x00\x01x\xff\x7f\x01y"),
    ],
)
def test_i9_a_page_that_does_not_decode_is_refused(kind: int, data: bytes) -> None:
    memory = GuardedMemory()
    frame = make_frame([(0, ZERO, b"", 0), (1, kind, data, HELD_DIGEST), (2, ZERO, b"", 0)])
    with pytest.raises(FrameError, match="page 1 does not decode"):
        memory.decoder.apply(frame)
    memory.check_guards()
    assert not memory.pages[:4096].any(), "pages in front of it are applied"
    assert memory.pages[4096:].tobytes() == HELD * (N_PAGES - 1)


def test_the_longest_delta_is_applied() -> None:
    memory = GuardedMemory()
    memory.decoder.apply(make_frame([(0, DELTA, b"\xff\x1f\x01x", HELD_DIGEST)]))
    assert memory.pages[:4096].tobytes() == HELD[:4095] + b"x"
    memory.check_guards()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(8, 4000), st.integers(0, 255)), min_size=1, max_size=6),
    st.tuples(st.lists(st.sampled_from(GOOD), min_size=1, max_size=6), st.just(0))
    | st.tuples(st.lists(st.sampled_from(GOOD_RAW), min_size=1, max_size=6), st.just(2)),
    st.integers(0, 12),
)
def test_i9_a_valid_frame_with_changed_bytes_stays_within_bounds(
    changes: list[tuple[int, int]], pages: tuple[list[Page], int], cut: int
) -> None:
    """The checksum is made to fit, so everything behind it meets the changed bytes."""
    frame = bytearray(make_frame(pages[0], coding=pages[1]))
    for place, value in changes:
        # Counted from the end, where the tables are, or from the start, turn by turn.
        at = -1 - place % (len(frame) - 16) if place % 2 else 16 + place % (len(frame) - 16)
        frame[at] = value
    if cut and len(frame) - cut > 40:
        del frame[40 : 40 + cut]
        frame[28:32] = struct.pack("<I", len(frame) - 40)
    expect_within_bounds(with_checksum(bytes(frame)))


arbitrary_pages = st.tuples(
    st.integers(0, N_PAGES),
    st.sampled_from([ZERO, LZ4, DELTA, LZ4_BASE, LZ4, DELTA, LZ4_BASE, COPY]),
    st.binary(min_size=1, max_size=60),
    st.sampled_from([HELD_DIGEST, HELD_DIGEST, HELD_DIGEST, 0]),
).map(lambda page: (*page[:2], _of_kind(*page[1:3]), page[3]))


def _of_kind(kind: int, data: bytes) -> bytes:
    if kind == COPY:
        return bytes([data[0] % (N_PAGES + 1), 0, 0, 0])
    return b"" if kind == ZERO else data


@settings(max_examples=400, deadline=None)
@given(st.lists(arbitrary_pages, min_size=1, max_size=6))
def test_i9_arbitrary_pages_stay_within_bounds(pages: list[Page]) -> None:
    expect_within_bounds(make_frame(pages))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_i9_arbitrary_bytes_are_refused(data: bytes) -> None:
    refuse(data)
    refuse(with_checksum(b"vfpg\x03\0\0\0" + data.ljust(8, b"\0")))


def expect_within_bounds(frame: bytes) -> None:
    memory = GuardedMemory()
    try:
        applied = memory.decoder.apply(frame)
    except FrameError:
        pass
    else:
        assert applied.rejected.size <= applied.n_pages
        assert (applied.rejected < N_PAGES).all()
    memory.check_guards()
