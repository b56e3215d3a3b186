"""The form of a saved state: whatever is not exactly it is refused."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.devices.errors import StateStreamError
from lab.devices.state_stream import Section, pack_section, unpack_stream


def stream(identity: bytes = b"who", state: bytes = b"what") -> bytes:
    return pack_section(Section.IDENTITY, identity) + pack_section(Section.STATE, state)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_what_was_packed_is_unpacked(identity: bytes, state: bytes) -> None:
    assert unpack_stream(stream(identity, state)) == (identity, state)


@given(st.data())
def test_i9_every_flipped_bit_and_every_cut_is_found(data: st.DataObject) -> None:
    good = stream()
    at = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[at // 8] ^= 1 << at % 8
    for candidate in (bytes(bad), good[: at // 8], good + bytes(at + 1)):
        with pytest.raises(StateStreamError):
            unpack_stream(candidate)


def test_sections_in_the_wrong_order() -> None:
    state = pack_section(Section.STATE, b"")
    with pytest.raises(StateStreamError, match="IDENTITY"):
        unpack_stream(state + pack_section(Section.IDENTITY, b""))
    with pytest.raises(StateStreamError, match="STATE"):
        unpack_stream(pack_section(Section.IDENTITY, b""))


def test_another_version_says_so() -> None:
    fixed = struct.pack("<4sHHI", b"VFST", 2, 1, 0)
    with pytest.raises(StateStreamError, match="version 2"):
        unpack_stream(fixed + struct.pack("<I", zlib.crc32(fixed[4:])))
