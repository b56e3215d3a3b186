"""Checksums and segmentation of the NIC against straightforward arithmetic."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.devices.e1000.offload import (
    MAX_SEGMENTS,
    Context,
    OffloadError,
    finish,
    insert_checksum,
    insert_vlan,
    ones_sum,
    segments,
)

SMALL = st.integers(0, 255)


def slow_sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = 0
    for (word,) in struct.iter_unpack(">H", data):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=300))
def test_sum(data: bytes) -> None:
    assert ones_sum(data) == slow_sum(data)


@given(st.binary(min_size=20, max_size=200), st.integers(0, 18), st.integers(0, 300))
def test_a_checksum_makes_the_sum_complete(data: bytes, at: int, end: int) -> None:
    at -= at % 2
    frame = bytearray(data)
    frame[at : at + 2] = bytes(2)
    insert_checksum(frame, 0, at, end)
    covered = frame[: end + 1] if end else frame
    # What is not covered, or is nothing but zeros, has no complete sum.
    if at + 2 <= len(covered) and any(covered):
        assert slow_sum(bytes(covered)) == 0xFFFF


@given(
    st.binary(max_size=4000),
    st.builds(
        Context,
        SMALL,
        SMALL,
        st.integers(0, 65535),
        SMALL,
        SMALL,
        st.integers(0, 65535),
        SMALL,
        st.integers(0, 65535),
        st.booleans(),
        st.booleans(),
    ),
    st.booleans(),
    st.booleans(),
)
def test_whatever_a_guest_asks_for_is_done_or_refused(
    packet: bytes, context: Context, ip: bool, transport: bool
) -> None:
    try:
        frames = segments(packet, context)
        for frame in frames:
            before = len(frame)
            finish(frame, context, ip_checksum=ip, transport_checksum=transport)
            assert len(frame) == before
    except OffloadError:
        return
    assert len(frames) <= MAX_SEGMENTS
    header = context.header_bytes
    assert sum(len(frame) - header for frame in frames) == len(packet) - header


def test_too_many_segments_are_refused() -> None:
    context = Context(header_bytes=54, segment_bytes=1, transport_start=34, transport_at=50)
    assert len(segments(bytes(54 + MAX_SEGMENTS), context)) == MAX_SEGMENTS
    with pytest.raises(OffloadError):
        segments(bytes(54 + MAX_SEGMENTS + 1), context)


def test_a_datagram_never_has_a_checksum_of_zero() -> None:
    frame = bytearray(b"\xff\xff" + bytes(6))
    finish(frame, Context(transport_at=6), ip_checksum=False, transport_checksum=True)
    assert frame[6:] == b"\xff\xff"
    frame[6:] = bytes(2)
    finish(frame, Context(transport_at=6, tcp=True), ip_checksum=False, transport_checksum=True)
    assert frame[6:] == b"\0\0"


def test_a_tag_stands_behind_the_addresses() -> None:
    assert insert_vlan(b"a" * 12 + b"rest", 0x8100, 5) == b"a" * 12 + b"\x81\0\0\x05rest"
