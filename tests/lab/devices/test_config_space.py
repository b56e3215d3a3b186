"""The configuration space as a bus driver sees it."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.devices.config_space import (
    Bar,
    BarKind,
    Capability,
    ConfigSpace,
    PciIdentity,
    PciStateError,
    error_reporting,
    express_capability,
    msix_capability,
)
from sync.pci import CONFIG_BYTES, EXPRESS_CONFIG_BYTES, Command

IDENTITY = PciIdentity(0x1AF4, 0x1042, 0x010000, 1, 0x1AF4, 0x1100)


def new_space(**changes: Any) -> ConfigSpace:
    parts: dict[str, Any] = {
        "identity": IDENTITY,
        "bars": [
            Bar(0, 0x4000),
            Bar(1, 0x100, BarKind.IO),
            Bar(2, 1 << 33, BarKind.MEMORY_64),
        ],
        "capabilities": [
            msix_capability(3, 0, 0x2000, 0, 0x2800),
            Capability(9, b"abcde", b"\xff"),
        ],
        "interrupt_pin": 1,
    } | changes
    identity, bars, capabilities = (parts.pop(k) for k in ("identity", "bars", "capabilities"))
    return ConfigSpace(identity, bars, capabilities, **parts)


def number(space: ConfigSpace, offset: int, count: int) -> int:
    return int.from_bytes(space.read(offset, count), "little")


def test_identity_is_where_the_header_has_it() -> None:
    space = new_space()
    assert number(space, 0x00, 4) == 0x1042_1AF4
    assert number(space, 0x08, 4) == 0x0100_0001
    assert number(space, 0x2C, 4) == 0x1100_1AF4
    assert number(space, 0x0E, 1) == 0
    assert number(space, 0x3D, 1) == 1


@pytest.mark.parametrize(
    ("offset", "width", "size", "kind"),
    [(0x10, 4, 0x4000, 0b0000), (0x14, 4, 0x100, 0b0001), (0x18, 8, 1 << 33, 0b0100)],
    ids=["memory32", "io", "memory64"],
)
def test_sizing_a_bar_by_writing_all_ones(offset: int, width: int, size: int, kind: int) -> None:
    space = new_space()
    space.write(offset, b"\xff" * width)
    value = number(space, offset, width)
    low_bits = 0x3 if kind == 1 else 0xF
    assert value & low_bits == kind
    assert -(value & ~low_bits) & ((1 << 8 * width) - 1) == size
    address = 5 * size % (1 << 8 * width)
    space.write(offset, (address | 0xF).to_bytes(width, "little"))
    assert number(space, offset, width) == address | kind


def test_a_bar_that_is_not_there_is_zero() -> None:
    space = new_space()
    space.write(0x20, b"\xff" * 8)
    space.write(0x30, b"\xff" * 4)
    assert space.read(0x20, 8) == bytes(8)
    assert space.read(0x30, 4) == bytes(4)


def test_command_bits() -> None:
    space = new_space()
    assert space.command == 0
    space.write(4, b"\xff\xff")
    everything = Command.IO | Command.MEMORY | Command.BUS_MASTER | Command.PARITY | Command.SERR
    assert space.command == everything | Command.INTX_DISABLE
    space.write(4, b"\x04")
    assert space.command == Command.BUS_MASTER | Command.SERR | Command.INTX_DISABLE


def test_capabilities_form_a_list() -> None:
    space = new_space()
    assert number(space, 6, 2) & 0x10
    at = number(space, 0x34, 1)
    found = []
    while at:
        found.append((at, number(space, at, 1)))
        at = number(space, at + 1, 1)
    assert found == [(0x40, 0x11), (0x4C, 9)]
    assert space.capability_offsets == [0x40, 0x4C]
    assert space.read(0x4E, 5) == b"abcde"
    space.write(0x4E, b"XYZ")
    assert space.read(0x4E, 5) == b"Xbcde"


def test_without_capabilities_there_is_no_list() -> None:
    space = new_space(capabilities=[])
    assert not number(space, 6, 2) & 0x10
    assert number(space, 0x34, 1) == 0
    assert not space.msix_enabled


def test_msix_control() -> None:
    space = new_space()
    assert struct.unpack("<HII", space.read(0x42, 10)) == (2, 0x2000, 0x2800)
    assert not space.msix_enabled
    space.write(0x42, b"\xff\xff")
    assert number(space, 0x42, 2) == 0xC002
    assert space.msix_enabled


def test_interrupt_status_is_read_only_and_comes_from_the_device() -> None:
    space = new_space()
    space.interrupt_status = True
    assert number(space, 6, 1) == 0x18
    assert number(space, 4, 4) >> 16 == 0x18
    space.write(6, b"\x00")
    assert number(space, 6, 1) == 0x18
    space.reset()
    assert number(space, 6, 1) == 0x10


def test_a_pci_express_device_has_its_registers_in_both_spaces() -> None:
    space = new_space(capabilities=[express_capability()], extended=[error_reporting()] * 2)
    assert space.size == EXPRESS_CONFIG_BYTES
    assert number(space, 0x40, 2) == 0x10
    assert number(space, 0x4C, 4) == number(space, 0x52, 2) == 0x11
    assert [number(space, 0x100, 4), number(space, 0x140, 4)] == [0x140_2_0001, 0x2_0001]
    space.write(0x48, b"\xff\xff")
    assert number(space, 0x48, 2) == 0x7FFF
    space.write(0x100, b"\xff" * 0x40)
    assert number(space, 0x108, 4) == number(space, 0x10C, 4) == 0x01FF_F030
    assert number(space, 0x104, 4) == number(space, 0x110, 4) == 0
    assert number(space, 0x114, 4) == 0xF1C1
    other = new_space(capabilities=[express_capability()], extended=[error_reporting()] * 2)
    other.load(space.save())
    assert other.read(0, EXPRESS_CONFIG_BYTES) == space.read(0, EXPRESS_CONFIG_BYTES)
    space.reset()
    assert number(space, 0x108, 4) == 0
    assert number(space, 0x114, 4) == 0x2000
    with pytest.raises(ValueError, match="does not fit"):
        new_space(extended=[error_reporting()] * 61)


@given(st.integers(-4, CONFIG_BYTES + 4), st.integers(0, CONFIG_BYTES + 4))
def test_accesses_outside_are_refused(offset: int, count: int) -> None:
    space = new_space()
    if offset >= 0 and offset + count <= CONFIG_BYTES:
        assert len(space.read(offset, count)) == count
    else:
        with pytest.raises(ValueError, match="configuration space"):
            space.read(offset, count)
        with pytest.raises(ValueError, match="configuration space"):
            space.write(offset, bytes(max(count, 1)))


@given(st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=6)), max_size=30))
def test_whatever_is_written_can_be_saved_loaded_and_reset(writes: list[tuple[int, bytes]]) -> None:
    space, other = new_space(), new_space()
    fresh = space.read(0, CONFIG_BYTES)
    for offset, data in writes:
        space.write(offset, data)
    other.load(space.save())
    assert other.read(0, CONFIG_BYTES) == space.read(0, CONFIG_BYTES)
    space.reset()
    assert space.read(0, CONFIG_BYTES) == fresh


def test_a_state_of_another_kind_of_device_is_refused() -> None:
    space = new_space()
    saved = space.save()
    with pytest.raises(PciStateError, match="0x02"):
        new_space(identity=PciIdentity(0x1AF4, 0x1041, 0x010000)).load(saved)
    with pytest.raises(PciStateError, match="0x11"):
        space.check(saved[:0x11] + b"\x02" + saved[0x12:])
    with pytest.raises(PciStateError, match="0x14"):
        new_space(bars=[Bar(0, 0x4000)]).check(saved)
    with pytest.raises(PciStateError, match="255"):
        space.load(saved[:-1])


@pytest.mark.parametrize(
    "build",
    [
        lambda: Bar(6, 0x100),
        lambda: Bar(5, 0x100, BarKind.MEMORY_64),
        lambda: Bar(0, 0x180),
        lambda: Bar(0, 8),
        lambda: msix_capability(0, 0, 0, 0, 0x800),
        lambda: msix_capability(1, 0, 4, 0, 0x800),
        lambda: new_space(bars=[Bar(2, 0x100, BarKind.MEMORY_64), Bar(3, 0x100)]),
        lambda: new_space(capabilities=[Capability(9, bytes(200))]),
        lambda: new_space(capabilities=[Capability(9, b"", b"\xff")]),
    ],
)
def test_what_cannot_be_built(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError):
        build()
