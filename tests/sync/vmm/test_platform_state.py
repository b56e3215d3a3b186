"""The state of PCI functions as bytes, and how a configuration space is read for it."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.pci import CONFIG_BYTES
from sync.vmm.platform_state import (
    Function,
    Platform,
    PlatformError,
    find_capabilities,
    function_of,
    msi_body_bytes,
)

WORD = st.integers(0, 0xFFFF)
DWORD = st.integers(0, 0xFFFFFFFF)


@st.composite
def functions(draw: st.DrawFn) -> Function:
    function = Function(
        bus=draw(st.integers(0, 255)),
        devfn=draw(st.integers(0, 255)),
        ids=draw(DWORD),
        command=draw(WORD),
        cache_line=draw(WORD),
        bars=tuple(draw(DWORD) for _ in range(6)),
        rom=draw(DWORD),
        interrupt_line=draw(st.integers(0, 255)),
    )
    if draw(st.booleans()):
        vectors = draw(st.integers(1, 4))
        table = draw(st.sampled_from([b"", draw(st.binary(min_size=64, max_size=64))]))
        function = replace(
            function,
            msix_at=0x40,
            msix_control=draw(st.sampled_from([0, 0x8000, 0xC000])) | vectors - 1,
            msix_table=table[: 16 * vectors],
        )
    if draw(st.booleans()):
        control = draw(WORD)
        size = msi_body_bytes(control)
        body = draw(st.binary(min_size=size, max_size=size))
        function = replace(function, msi_at=0x60, msi_control=control, msi=body)
    return function


PLATFORMS = st.builds(Platform, DWORD, WORD, st.lists(functions(), max_size=3).map(tuple))


@given(PLATFORMS)
def test_it_arrives_as_it_was_sent(platform: Platform) -> None:
    assert Platform.unpack(platform.pack()) == platform


@given(PLATFORMS, st.data())
def test_i9_what_is_cut_off_or_too_long_is_refused(platform: Platform, data: st.DataObject) -> None:
    blob = platform.pack()
    cut = data.draw(st.integers(0, len(blob) - 1))
    for wrong in (blob[:cut], blob + b"\0"):
        with pytest.raises(PlatformError):
            Platform.unpack(wrong)


@given(st.binary(max_size=300), st.booleans())
def test_i9_any_bytes_are_a_platform_or_refused(data: bytes, headed: bool) -> None:
    blob = struct.pack("<4sHHHI", b"VFpl", 1, 1, 1, 0) + data if headed else data
    try:
        platform = Platform.unpack(blob)
    except PlatformError:
        return
    assert platform.pack() == blob


def config(capabilities: list[tuple[int, int, bytes]]) -> bytes:
    """A configuration space with (offset, id, body) linked in that order."""
    space = bytearray(CONFIG_BYTES)
    link = 0x34
    for at, kind, body in capabilities:
        space[0x06] = 0x10
        space[link] = at
        space[at] = kind
        space[at + 2 : at + 2 + len(body)] = body
        link = at + 1
    return bytes(space)


def test_capabilities_are_found_in_the_order_of_the_list() -> None:
    space = config([(0x80, 0x09, b""), (0x40, 0x11, b""), (0x60, 0x09, b"")])
    assert find_capabilities(bytes(space)) == {0x09: 0x80, 0x11: 0x40}


def test_i9_a_list_of_capabilities_that_never_ends_is_refused() -> None:
    space = bytearray(config([(0x40, 0x09, b""), (0x50, 0x09, b"")]))
    space[0x51] = 0x40
    with pytest.raises(PlatformError, match="no end"):
        find_capabilities(bytes(space))


@pytest.mark.parametrize("capability", [(0xFC, 0x11, b""), (0xF8, 0x05, b"\x80\x00")])
def test_i9_a_capability_that_is_cut_off_is_refused(capability: tuple[int, int, bytes]) -> None:
    with pytest.raises(PlatformError, match="cut off"):
        function_of(0, 0, config([capability]))


@pytest.mark.parametrize(
    ("control", "size"), [(0x000, 6), (0x080, 10), (0x100, 16), (0x180, 20)], ids=hex
)
def test_msi_has_four_sizes(control: int, size: int) -> None:
    """PCI 3.0, figure 6-9: 10, 14, 20 and 24 bytes with the 4 in front."""
    assert msi_body_bytes(control) == size


def test_bars_of_64_bits_take_two_places() -> None:
    space = bytearray(config([]))
    struct.pack_into("<6I", space, 0x10, 0xFE80_0004, 0x12, 0xC041, 0xFEB0_0000, 0, 8)
    function = function_of(0, 0x20, bytes(space))
    assert function.bar_address(0) == 0x12_FE80_0000
    assert list(function.memory_bars()) == [0, 3]
    assert function.name == "00:04.0"
