"""What is known about a PCI device before it is touched, and where its structures lie.

Owns the identity that both sides compare, and the locators by which a profile says where a
register is: a *base* that is found in the configuration space of the device at hand, so that a
profile fits every device of its class, whatever its BARs look like.

    pci:config            the configuration space
    pci:cap:0x11          the capability of this ID in it (the first one)
    pci:ecap:0x0001       the extended capability of this ID in it (the first one)
    bar0 ... bar5         a whole BAR
    msix:table, msix:pending
                          the MSI-X structures
    virtio:common, virtio:notify, virtio:isr, virtio:device
                          the structure that a virtio capability points to (the first of its type)
    virtio:window         the data of the window that the configuration space has into the BARs

Sources: PCI Local Bus Specification 3.0, sections 6.1, 6.7 and 6.8.2; PCI Express Base
Specification 3.0, section 7.9; virtio 1.2, section 4.1.4.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sync.pci import (
    BAR_COUNT,
    CAPABILITIES_POINTER,
    CONFIG_BYTES,
    EXPRESS_CONFIG_BYTES,
    FIRST_CAPABILITY,
    MSIX_CAPABILITY,
    MSIX_ENTRY_BYTES,
    MSIX_SIZE_MASK,
    VENDOR_CAPABILITY,
)
from sync.vfio_user.protocol import PciRegion

_MSIX_STRUCTURES = {"table": 4, "pending": 8}
"""Where the capability says in which BAR and at which offset the structure is."""
_VIRTIO_TYPES = {"common": 1, "notify": 2, "isr": 3, "device": 4, "window": 5}
_VIRTIO_NOTIFY = 2
_VIRTIO_WINDOW = 5
_VIRTIO_CAPABILITY_BYTES = 16
_VIRTIO_WINDOW_BYTES = 4
_CAPABILITY_NAME = re.compile(r"(?P<extended>e)?cap:0x(?P<digits>[0-9a-f]+)")


class Window(NamedTuple):
    """A range of a region in which registers lie."""

    region: int
    offset: int
    size: int
    multiplier: int = 0
    """`virtio:notify` only: bytes from one doorbell to the next (`notify_off_multiplier`)."""

    def describe(self) -> str:
        """For people, and for comparing both sides."""
        steps = f" in steps of {self.multiplier}" if self.multiplier else ""
        return f"{self.size:#x} bytes at {self.offset:#x} of region {self.region}{steps}"


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device as its gateway reports it."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    """24 bits: class, subclass, interface."""
    config_space: bytes
    """All of it, as read when the device was connected: 256 bytes, or 4096 of PCI Express."""
    region_sizes: Mapping[int, int]
    """VFIO region index to size in bytes."""
    v2: bool = False
    """It offers VFIO migration v2."""
    precopy: bool = False
    """It offers the state PRE_COPY of v2."""
    holds: Mapping[str, str] = field(default_factory=dict)
    """What it told of what it is and holds, by name: the same on both sides."""

    @property
    def ids(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x}"

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """ID and offset of each capability, in the order of the list."""
        config = self.config_space[:CONFIG_BYTES]
        if len(config) <= CAPABILITIES_POINTER:
            return
        seen: set[int] = set()
        offset = config[CAPABILITIES_POINTER] & ~3
        while FIRST_CAPABILITY <= offset < len(config) - 1 and offset not in seen:
            seen.add(offset)
            yield config[offset], offset
            offset = config[offset + 1] & ~3

    def extended_capabilities(self) -> Iterator[tuple[int, int]]:
        """The same of the extended ones."""
        config = self.config_space[:EXPRESS_CONFIG_BYTES]
        seen: set[int] = set()
        offset = CONFIG_BYTES
        while CONFIG_BYTES <= offset <= len(config) - 4 and offset not in seen:
            seen.add(offset)
            header = int.from_bytes(config[offset : offset + 4], "little")
            if header in (0, 0xFFFF_FFFF):
                return
            yield header & 0xFFFF, offset
            offset = header >> 20 & ~3

    def locate(self, base: str) -> Window | None:
        """Where `base` is on this device; None if the device does not have it."""
        kind, _, name = base.partition(":")
        if base == "pci:config":
            return Window(PciRegion.CONFIG, 0, self._size(PciRegion.CONFIG) or CONFIG_BYTES)
        if name.startswith("ecap:"):
            at = _first(self.extended_capabilities(), int(name.removeprefix("ecap:"), 16))
            end = self._size(PciRegion.CONFIG)
            return None if at is None else Window(PciRegion.CONFIG, at, end - at)
        if kind == "pci":
            at = _first(self.capabilities(), int(name.removeprefix("cap:"), 16))
            return None if at is None else Window(PciRegion.CONFIG, at, CONFIG_BYTES - at)
        if kind == "msix":
            return self._locate_msix(name)
        if kind == "virtio":
            return self._locate_virtio(_VIRTIO_TYPES[name])
        region = int(base.removeprefix("bar"))
        size = self._size(region)
        return Window(region, 0, size) if size else None

    def _locate_msix(self, structure: str) -> Window | None:
        at = _first(self.capabilities(), MSIX_CAPABILITY)
        if at is None:
            return None
        vectors = (self._number(at + 2, 2) & MSIX_SIZE_MASK) + 1
        size = MSIX_ENTRY_BYTES * vectors if structure == "table" else 8 * -(-vectors // 64)
        location = self._number(at + _MSIX_STRUCTURES[structure], 4)
        return self._in_bar(location & 7, location & ~7, size)

    def _locate_virtio(self, wanted: int) -> Window | None:
        for capability, at in self.capabilities():
            if capability != VENDOR_CAPABILITY or self._number(at + 3, 1) != wanted:
                continue
            if wanted == _VIRTIO_WINDOW:
                data = at + _VIRTIO_CAPABILITY_BYTES
                return Window(PciRegion.CONFIG, data, _VIRTIO_WINDOW_BYTES)
            multiplier = 0
            if wanted == _VIRTIO_NOTIFY:
                multiplier = self._number(at + _VIRTIO_CAPABILITY_BYTES, 4)
            window = self._in_bar(
                self._number(at + 4, 1),
                self._number(at + 8, 4),
                self._number(at + 12, 4),
                multiplier,
            )
            if window is not None:
                return window
        return None

    def _in_bar(self, bar: int, offset: int, size: int, multiplier: int = 0) -> Window | None:
        if bar >= BAR_COUNT or offset + size > self._size(bar):
            return None
        return Window(bar, offset, size, multiplier)

    def _number(self, offset: int, size: int) -> int:
        """From the configuration space; what lies behind its end reads as zero."""
        return int.from_bytes(self.config_space[:CONFIG_BYTES][offset : offset + size], "little")

    def _size(self, region: int) -> int:
        return self.region_sizes.get(region, 0)


def _first(capabilities: Iterable[tuple[int, int]], wanted: int) -> int | None:
    """The offset of the first capability with the ID `wanted`."""
    return next((at for found, at in capabilities if found == wanted), None)


def is_base(base: str) -> bool:
    """Whether `base` is a locator that `DeviceView.locate` understands."""
    kind, _, name = base.partition(":")
    if kind == "virtio":
        return name in _VIRTIO_TYPES
    if kind == "msix":
        return name in _MSIX_STRUCTURES
    if kind == "pci" and (match := _CAPABILITY_NAME.fullmatch(name)):
        return len(match["digits"]) <= (4 if match["extended"] else 2)
    return base == "pci:config" or base in {f"bar{index}" for index in range(BAR_COUNT)}
