"""The control protocol's codec: whole, byte by byte, and against nonsense."""

import os
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.gateway import errors
from sync.gateway.control.wire import (
    MAX_BLOB_BYTES,
    MAX_JSON_BYTES,
    ControlDecoder,
    encode,
)
from sync.gateway.errors import BY_CODE, ControlProtocolError, GatewayError, error_for

FIELDS = st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=8))
MESSAGES = st.lists(st.tuples(FIELDS, st.binary(max_size=100)), max_size=6)


@given(MESSAGES, st.integers(1, 50))
@settings(deadline=None)
def test_messages_come_out_as_they_went_in_whatever_the_chunks(
    messages: list[tuple[dict[str, int | str | None], bytes]], step: int
) -> None:
    stream = b"".join(encode(fields, blob) for fields, blob in messages)
    decoder = ControlDecoder(0)
    for start in range(0, len(stream), step):
        decoder.feed(stream[start : start + step], [])
    out = []
    while (message := decoder.next_message()) is not None:
        out.append((message.fields, message.blob))
    assert out == messages


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_i9_any_bytes_are_messages_or_a_protocol_error(data: bytes) -> None:
    decoder = ControlDecoder(0)
    try:
        decoder.feed(data, [])
    except ControlProtocolError:
        return
    while (message := decoder.next_message()) is not None:
        assert isinstance(message.fields, dict)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<II", MAX_JSON_BYTES + 1, 0),
        struct.pack("<II", 0, MAX_BLOB_BYTES + 1),
        struct.pack("<II", 2, 0) + b"[]",
        struct.pack("<II", 0, 0),
        struct.pack("<II", 5000, 0) + b"9" * 5000,
    ],
)
def test_i9_what_is_over_the_limits_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(ControlProtocolError):
        ControlDecoder(0).feed(data, [])


def test_nothing_over_the_limits_is_sent() -> None:
    with pytest.raises(ControlProtocolError):
        encode({"x": "y" * MAX_JSON_BYTES})
    with pytest.raises(ControlProtocolError):
        encode({}, bytes(MAX_BLOB_BYTES + 1))


def test_descriptors_belong_to_the_message_they_came_with(open_fds: Callable[[], int]) -> None:
    before = open_fds()
    decoder = ControlDecoder(2)
    first, second = encode({"n": 1}), encode({"n": 2}, b"blob")
    decoder.feed(first + second[:5], [os.dup(0)])
    message = decoder.next_message()
    assert message.descriptors == []
    decoder.feed(second[5:], [])
    message = decoder.next_message()
    assert len(message.descriptors) == 1
    os.close(message.descriptors[0])
    decoder.feed(first[:4], [os.dup(0)])
    decoder.close()
    with pytest.raises(ControlProtocolError):
        decoder.feed(b"", [os.dup(0) for _ in range(3)])
    decoder.close()
    assert open_fds() == before


def test_every_error_crosses_the_socket_as_itself() -> None:
    classes = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, GatewayError)
    ]
    assert len({cls.code for cls in classes}) == len(classes) == len(BY_CODE)
    for cls in classes:
        back = error_for(cls.code, "why")
        assert type(back) is cls and back.message == "why"
        assert str(cls()), "it says something by itself"
    assert "from the future" in str(error_for("from the future", "?"))
