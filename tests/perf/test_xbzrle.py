"""XBZRLE against the example in QEMU's description, and against itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf.xbzrle import decode, encode, encoded_bytes, wire_bytes


def page_of(data: bytes, at: int = 0) -> np.ndarray:
    return np.frombuffer((bytes(at) + data).ljust(4096, b"\0"), np.uint8)


def test_the_example_of_the_description() -> None:
    before = page_of(bytes.fromhex("05060708090a0b0c0d0e0f101112136800006b006d"), 1001)
    after = page_of(bytes.fromhex("0102030405060708090a0b0c0d0e0f680000670069"), 1001)
    coded = bytes.fromhex("e9070f0102030405060708090a0b0c0d0e0f030167010169")
    assert encode(after, before) == coded
    assert np.array_equal(decode(coded, before), after)
    assert wire_bytes(after[None], before[None]) == 8 + 3 + 24


edits = st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=300)), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=4096), edits)
def test_what_is_encoded_is_decoded(base: bytes, changes: list[tuple[int, bytes]]) -> None:
    before = page_of(base)
    content = bytearray(before.tobytes())
    for at, data in changes:
        content[at : at + len(data)] = data
    after = np.frombuffer(bytes(content[:4096]), np.uint8)
    coded = encode(after, before)
    assert (coded is None) == (encoded_bytes(after, before) > 4096)
    if coded is not None:
        assert len(coded) == encoded_bytes(after, before)
        assert np.array_equal(decode(coded, before), after)


def test_a_page_that_its_code_would_outgrow_is_sent_as_it_is() -> None:
    before = np.zeros(4096, np.uint8)
    every_other = np.tile(np.array([0, 1], np.uint8), 2048)
    assert encode(every_other, before) is None
    assert wire_bytes(every_other[None], before[None]) == 8 + 4096
    most = np.ones(4096, np.uint8)
    assert encode(most, before) is None  # three bytes more than the page


def test_zero_and_unchanged_pages_cost_next_to_nothing() -> None:
    before = np.ones(4096, np.uint8)
    assert wire_bytes(np.zeros((1, 4096), np.uint8), before[None]) == 9
    assert encode(before, before) == b""
    assert wire_bytes(before[None], before[None]) == 0


@pytest.mark.parametrize(
    "data", [b"\x80", b"\x00", b"\x00\x00", b"\x00\x02x", b"\x80\x20\x01x", b"\x80\x80\x01\x01x"]
)
def test_malformed_code_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"run|number"):
        decode(data, np.zeros(4096, np.uint8))
