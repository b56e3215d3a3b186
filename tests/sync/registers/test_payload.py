"""Payloads: whatever is split comes together again, and anything else is refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.registers.errors import PayloadError
from sync.registers.payload import (
    MAX_BODY_BYTES,
    MAX_WHOLE_BYTES,
    VERSION,
    Assembler,
    PayloadKind,
    decode_json,
    encode_json,
    split,
    take_number,
    with_number,
)

TRANSPORT_LIMIT_BYTES = 1 << 20


@pytest.mark.parametrize(
    "size", [0, 1, MAX_BODY_BYTES - 1, MAX_BODY_BYTES, MAX_BODY_BYTES + 1, MAX_WHOLE_BYTES]
)
def test_bodies_come_together_again(size: int) -> None:
    body = (b"0123456789abcdef!" * (size // 17 + 1))[:size]
    payloads = list(split(PayloadKind.SNAPSHOT, body))
    assert len(payloads) == max(1, -(-size // MAX_BODY_BYTES))
    assert all(len(payload) < TRANSPORT_LIMIT_BYTES for payload in payloads)
    assembler = Assembler()
    for payload in payloads[:-1]:
        assert assembler.add(payload) is None
    assert assembler.add(payloads[-1]) == (PayloadKind.SNAPSHOT, body)
    assert assembler.add(payloads[-1]) is not None


def test_i9_a_body_without_end_is_refused_at_the_limit() -> None:
    endless = next(split(PayloadKind.STATE, bytes(MAX_BODY_BYTES + 1)))
    assembler = Assembler()
    with pytest.raises(PayloadError, match="larger than allowed"):
        for _ in range(MAX_WHOLE_BYTES // MAX_BODY_BYTES + 1):
            assembler.add(endless)


def test_what_is_malformed_is_refused() -> None:
    (sound,) = split(PayloadKind.END, with_number(1))
    for damage, message in (
        (b"", "without a header"),
        (b"X" + sound[1:], "malformed header"),
        (sound[:4] + b"\1" + sound[5:], f"version 1, this program reads {VERSION}"),
        (sound[:5] + b"\x63" + sound[6:], "kind 99 does not exist"),
        (sound[:6] + b"\2" + sound[7:], "malformed header"),
        (sound + b"\0", "malformed header"),
        (sound[:-1], "malformed header"),
    ):
        with pytest.raises(PayloadError, match=message):
            Assembler().add(damage)
    assembler = Assembler()
    assembler.add(next(split(PayloadKind.STATE, bytes(MAX_BODY_BYTES + 1))))
    with pytest.raises(PayloadError, match="in the middle of another"):
        assembler.add(sound)


@given(st.binary(max_size=64))
def test_i9_any_bytes_end_in_an_answer_or_a_payload_error(payload: bytes) -> None:
    with suppress(PayloadError):
        Assembler().add(payload)
    with suppress(PayloadError):
        decode_json(PayloadKind.OFFER, payload)


def test_documents() -> None:
    assert decode_json(PayloadKind.OFFER, encode_json(PayloadKind.OFFER, {"a": [1]})) == {"a": [1]}
    for kind, body in (
        (PayloadKind.END, b"{}"),
        (PayloadKind.OFFER, b"{"),
        (PayloadKind.OFFER, b"[]"),
    ):
        (payload,) = split(kind, body)
        with pytest.raises(PayloadError):
            decode_json(PayloadKind.OFFER, payload)
    (payload,) = split(PayloadKind.OFFER, b"[" * 100_000)
    with pytest.raises(PayloadError, match="not valid JSON"):
        decode_json(PayloadKind.OFFER, payload)


def test_numbers() -> None:
    assert take_number(with_number(1 << 63, b"x")) == (1 << 63, b"x")
    with pytest.raises(PayloadError, match="cut short"):
        take_number(bytes(7))
