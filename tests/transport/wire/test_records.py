"""The messages of a session: what goes in comes out, and nonsense ends in a RecordError."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.wire import records
from transport.wire.errors import RecordError, VersionMismatch
from transport.wire.records import (
    Ack,
    Attached,
    Bye,
    Compare,
    CompareReply,
    Digest,
    DigestReply,
    HelloReply,
    Hold,
    MessageType,
    Ping,
    Pong,
    Position,
    RecordCredit,
    RecordMessage,
    Resumption,
    SessionHello,
    TunnelCredit,
    TunnelEof,
    TunnelHead,
    Verdict,
)

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
PAYLOAD = st.binary(max_size=300)


def compare_messages() -> st.SearchStrategy[Compare]:
    """Runs from gaps and lengths, so that they ascend and stay apart or touch."""

    @st.composite
    def draw_compare(draw: Any) -> Compare:
        pieces = draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 700)), min_size=1))
        runs, at = [], 0
        for gap, length in pieces[:20]:
            runs.append((at + gap, length))
            at += gap + length
        block = draw(st.sampled_from([1, 256]))
        return Compare(draw(U32), block, np.array(runs, np.uint32))

    return draw_compare()


def acks() -> st.SearchStrategy[Ack]:
    return st.builds(
        Ack, U64, st.lists(U32, max_size=50).map(lambda values: np.array(values, np.uint32))
    )


MESSAGES = st.one_of(
    st.builds(
        SessionHello,
        st.binary(min_size=16, max_size=16),
        st.binary(min_size=16, max_size=16),
        st.integers(1, 16),
        st.integers(16 << 10, 2 << 20),
        PAYLOAD,
    ),
    st.builds(
        HelloReply,
        st.sampled_from(Verdict),
        st.integers(1, 64),
        st.integers(500, 1 << 31),
        st.integers(0, 3_600_000),
        PAYLOAD,
    ),
    st.builds(RecordMessage, U64, U16, PAYLOAD),
    st.builds(RecordCredit, U64, U64),
    st.builds(Ping, U64),
    st.builds(Pong, U64),
    st.builds(Attached, U64),
    st.builds(Hold, U64),
    st.builds(Bye, st.text(st.characters(categories=["L", "N"]), max_size=100)),
    st.builds(TunnelHead, U64),
    st.builds(TunnelEof, U64),
    st.builds(TunnelCredit, U64, U64),
    acks(),
    compare_messages(),
    st.builds(
        CompareReply,
        U32,
        st.lists(U64, min_size=1, max_size=70).map(lambda values: np.array(values, np.uint64)),
    ),
    st.builds(Digest, U32, U32, st.integers(1, 16384)),
    st.builds(DigestReply, U32, st.binary(min_size=32, max_size=32)),
)

UNPACKERS = [
    SessionHello.unpack,
    HelloReply.unpack,
    records.unpack_control,
    records.unpack_tunnel,
    records.unpack_request,
    records.unpack_answer,
]


def field_values(message: Any) -> list[Any]:
    values = [getattr(message, name) for name in message.__dataclass_fields__]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in values]


@given(MESSAGES)
def test_a_message_comes_out_as_it_went_in(message: Any) -> None:
    assert field_values(type(message).unpack(message.pack())) == field_values(message)


@given(MESSAGES)
def test_a_message_is_found_by_its_type_on_its_lane_alone(message: Any) -> None:
    found = []
    for unpack in UNPACKERS[2:]:
        try:
            found.append(type(unpack(message.pack())))
        except RecordError:
            continue
    greeting = isinstance(message, SessionHello | HelloReply)
    assert found == ([] if greeting else [type(message)])


@given(MESSAGES, st.data())
def test_i9_a_message_that_is_cut_or_longer_is_refused(message: Any, data: Any) -> None:
    packed = message.pack()
    cut = data.draw(st.integers(0, len(packed) - 1))
    for broken in (packed[:cut], packed + b"\0"):
        with pytest.raises(RecordError):
            type(message).unpack(broken)


@given(MESSAGES, st.data())
def test_i9_changed_bytes_end_in_a_record_error_or_a_message(message: Any, data: Any) -> None:
    packed = bytearray(message.pack())
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    for unpack in [type(message).unpack, *UNPACKERS]:
        try:
            unpack(bytes(packed))
        except (RecordError, VersionMismatch):
            continue


@given(st.binary(max_size=200))
def test_i9_garbage_ends_in_a_record_error_or_a_message(garbage: bytes) -> None:
    for unpack in UNPACKERS:
        try:
            unpack(garbage)
        except (RecordError, VersionMismatch):
            continue


def test_the_greeting_stands_on_the_wire_as_documented() -> None:
    hello = SessionHello(b"S" * 16, b"N" * 16, 3, 1 << 20, b"payload")
    by_hand = (
        b"\x01vfioferr\x06\x00" + b"S" * 16 + b"N" * 16 + b"\x03\x00\x00\x10\x00"
        b"\x07\x00\x00\x00payload"
    )
    assert hello.pack() == by_hand


@pytest.mark.parametrize("greeting", [SessionHello, HelloReply])
def test_another_version_is_told_from_nonsense(
    greeting: type[SessionHello] | type[HelloReply],
) -> None:
    kind = 1 if greeting is SessionHello else 2
    with pytest.raises(VersionMismatch, match="version 7"):
        greeting.unpack(struct.pack("<B8sH", kind, b"vfioferr", 7) + b"whatever comes then")
    with pytest.raises(RecordError):
        greeting.unpack(struct.pack("<B8sH", kind, b"somebody", 7) + b"whatever comes then")


@pytest.mark.parametrize(
    "message",
    [
        SessionHello(bytes(16), bytes(16), 0, 1 << 20, b"").pack(),
        SessionHello(bytes(16), bytes(16), 17, 1 << 20, b"").pack(),
        SessionHello(bytes(16), bytes(16), 1, 4095, b"").pack(),
        SessionHello(bytes(16), bytes(16), 1, (4 << 20) + 1, b"").pack(),
        SessionHello(bytes(16), bytes(16), 1, 1 << 20, bytes((1 << 20) + 1)).pack(),
    ],
)
def test_i9_a_greeting_beyond_the_limits_is_refused(message: bytes) -> None:
    with pytest.raises(RecordError):
        SessionHello.unpack(message)


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [(0, 0)],
        [(5, 3), (7, 3)],
        [(9, 1), (3, 1)],
        [(0xFFFFFFFF, 2)],
        [(0, 16385)],
        [(0, 16000), (20000, 385)],
        [(0, 0xFFFFFFFF)],
    ],
)
def test_i9_a_comparison_of_impossible_pages_is_refused(runs: list[tuple[int, int]]) -> None:
    message = Compare(1, 1, np.array(runs, np.uint32).reshape(-1, 2))
    with pytest.raises(RecordError):
        Compare.unpack(message.pack())


def test_i9_a_declared_length_allocates_nothing() -> None:
    for head in (
        struct.pack("<BQI", 32, 1, 0xFFFFFFFF),
        struct.pack("<BIHI", 33, 1, 1, 0xFFFFFFFF),
        struct.pack("<BII", 34, 1, 0xFFFFFFFF),
    ):
        for unpack in (records.unpack_request, records.unpack_answer):
            with pytest.raises(RecordError):
                unpack(head)


def test_a_farewell_cannot_command_a_terminal() -> None:
    assert Bye.unpack(Bye("a\x1b[2Jb\nc").pack()).reason == "a?[2Jb?c"


def test_a_farewell_is_cut_to_its_limit() -> None:
    assert len(Bye("é" * 1000).pack()) == 3 + records.MAX_REASON_BYTES
    Bye.unpack(Bye("é" * 1000).pack())


def test_routing_ids_do_not_start_with_zero() -> None:
    session = bytes(16)
    for lane in (records.CONTROL_LANE, records.TUNNEL_LANE, records.FIRST_DATA_LANE):
        assert records.routing_id(lane, session)[0] != 0
        assert records.routing_id(lane, session)[1:17] == session
        assert records.split_routing_id(records.routing_id(lane, session, 9)) == (lane, session, 9)


@given(st.builds(Position, U64, U64, st.booleans()), U32, st.data())
def test_who_resumes_proves_to_know_the_session(position: Position, link: int, data: Any) -> None:
    key = records.resume_key(bytes(16), b"N" * 16)
    for kind in (MessageType.RESUME, MessageType.RESUMED):
        packed = Resumption(kind, link, position).pack(key)
        assert Resumption.unpack(packed, kind, key) == Resumption(kind, link, position)
        others = [
            records.resume_key(bytes(16), b"M" * 16),
            records.resume_key(b"1" * 16, b"N" * 16),
        ]
        for other in others:
            with pytest.raises(RecordError, match="does not know"):
                Resumption.unpack(packed, kind, other)
        changed = bytearray(packed)
        changed[data.draw(st.integers(11, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
        for broken in (bytes(changed), packed[:-1], packed + b"x"):
            with pytest.raises(RecordError):
                Resumption.unpack(broken, kind, key)
    with pytest.raises(RecordError):
        Resumption.unpack(packed, MessageType.RESUME, key)  # one side's is not the other's


def test_the_seed_depends_on_session_and_nonce() -> None:
    seeds = {
        records.session_seed(session, nonce)
        for session in (bytes(16), bytes(15) + b"1")
        for nonce in (bytes(16), bytes(15) + b"1")
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 64 for seed in seeds)
