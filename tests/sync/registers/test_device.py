"""Where the structures of a PCI device are found, on configuration spaces built here by hand."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.registers.profile.locate import DeviceView, Window, is_base


def capability(identity: int, body: bytes) -> bytes:
    return bytes([identity, 0]) + body


def virtio(kind: int, bar: int, offset: int, size: int, extra: bytes = b"") -> bytes:
    body = struct.pack("<BBB3xII", 16 + len(extra), kind, bar, offset, size)
    return capability(0x09, body + extra)


def view(*capabilities: bytes, **sizes: int) -> DeviceView:
    config = bytearray(256)
    link, at = 0x34, 0x40
    for each in capabilities:
        config[link] = at
        config[at : at + len(each)] = each
        link, at = at + 1, (at + len(each) + 3) & ~3
    regions = {int(name[1:]): size for name, size in sizes.items()}
    return DeviceView(1, 2, 3, 4, 5, bytes(config), regions)


def test_virtio_structures() -> None:
    device = view(
        capability(0x05, bytes(12)),
        virtio(1, 2, 0x100, 0x38),
        virtio(1, 2, 0x900, 0x38),
        virtio(2, 2, 0x400, 0x40, struct.pack("<I", 8)),
        virtio(5, 0, 0, 0, bytes(4)),
        r2=0x1000,
        r7=256,
    )
    assert device.locate("virtio:common") == Window(2, 0x100, 0x38)
    assert device.locate("virtio:notify") == Window(2, 0x400, 0x40, 8)
    assert device.locate("virtio:isr") is None
    assert device.locate("virtio:window") == Window(7, 0x94, 4)
    assert device.locate("pci:cap:0x05") == Window(7, 0x40, 0xC0)
    assert device.locate("pci:cap:0x11") is None
    assert device.locate("pci:config") == Window(7, 0, 256)
    assert device.locate("bar2") == Window(2, 0, 0x1000)
    assert device.locate("bar0") is None


def test_a_structure_outside_its_bar_is_passed_over() -> None:
    device = view(virtio(1, 0, 0xFE0, 0x38), virtio(1, 6, 0, 4), virtio(1, 1, 0, 0x38), r0=4096)
    assert device.locate("virtio:common") is None


def test_msix_structures() -> None:
    body = struct.pack("<HII", 0x8000 | 64, 0x1000 | 1, 0x2000 | 3)
    device = view(capability(0x11, body), r1=0x4000, r3=0x2010)
    assert device.locate("msix:table") == Window(1, 0x1000, 65 * 16)
    assert device.locate("msix:pending") == Window(3, 0x2000, 16)


def test_a_list_of_capabilities_that_goes_round_ends() -> None:
    config = bytearray(256)
    config[0x34] = 0x40
    config[0x40:0x42] = bytes([0x05, 0x50])
    config[0x50:0x52] = bytes([0x09, 0x40])
    device = DeviceView(1, 2, 3, 4, 5, bytes(config), {})
    assert list(device.capabilities()) == [(0x05, 0x40), (0x09, 0x50)]


def extended(*capabilities: tuple[int, int, int]) -> bytes:
    """A configuration space with these at (offset, ID, next)."""
    config = bytearray(4096)
    for at, identity, following in capabilities:
        config[at : at + 4] = struct.pack("<I", following << 20 | 2 << 16 | identity)
    return bytes(config)


def test_extended_capabilities() -> None:
    config = extended((0x100, 0x0001, 0x148), (0x148, 0x0018, 0x100))
    device = DeviceView(1, 2, 3, 4, 5, config, {7: 4096})
    assert list(device.extended_capabilities()) == [(0x0001, 0x100), (0x0018, 0x148)]
    assert device.locate("pci:ecap:0x0018") == Window(7, 0x148, 4096 - 0x148)
    assert device.locate("pci:ecap:0x0003") is None
    assert device.locate("pci:cap:0x01") is None


@pytest.mark.parametrize("config", [bytes(256), bytes(4096), bytes(256) + bytes([0xFF] * 3840)])
def test_a_device_without_extended_capabilities(config: bytes) -> None:
    assert not list(DeviceView(1, 2, 3, 4, 5, config, {7: len(config)}).extended_capabilities())


@given(st.binary(max_size=300), st.dictionaries(st.integers(0, 8), st.integers(0, 1 << 63)))
def test_i9_any_configuration_space_is_read_within_its_bounds(
    config: bytes, sizes: dict[int, int]
) -> None:
    device = DeviceView(1, 2, 3, 4, 5, config, sizes)
    assert len(list(device.extended_capabilities())) <= len(config) // 4
    names = ["virtio:common", "virtio:notify", "msix:table", "msix:pending"]
    for base in names:
        window = device.locate(base)
        if window is not None:
            assert window.offset + window.size <= sizes[window.region]


@pytest.mark.parametrize(
    "base", ["pci:config", "pci:cap:0x1f", "pci:ecap:0x001e", "bar5", "virtio:window", "msix:table"]
)
def test_bases_that_exist(base: str) -> None:
    assert is_base(base)


@pytest.mark.parametrize(
    "base", ["", "pci", "pci:cap:", "pci:cap:0x", "pci:cap:17", "pci:cap:0x123", "pci:cap:0xg",
             "pci:ecap:0x12345", "pci:ecap:1",
             "bar6", "bar", "virtio:", "virtio:gpu", "msix:", "ram"]
)  # fmt: skip
def test_bases_that_do_not(base: str) -> None:
    assert not is_base(base)
