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
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from sync.gateway.control.info import GatewayInfo

CONFIG_REGION = 7
"""VFIO_PCI_CONFIG_REGION_INDEX."""
CONFIG_BYTES = 256
"""What capabilities lie in; extended ones lie behind it."""
_CONFIG_LIMIT = 4096
_BARS = 6
_CAPABILITY_POINTER = 0x34
_FIRST_CAPABILITY = 0x40
_MSIX_CAPABILITY = "0x11"
_MSIX_STRUCTURES = {"table": 4, "pending": 8}
"""Where the capability says in which BAR and at which offset the structure is."""
_VENDOR_CAPABILITY = 0x09
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

    @property
    def ids(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x}"

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """ID and offset of each capability, in the order of the list."""
        config = self.config_space[:CONFIG_BYTES]
        if len(config) <= _CAPABILITY_POINTER:
            return
        seen: set[int] = set()
        offset = config[_CAPABILITY_POINTER] & ~3
        while _FIRST_CAPABILITY <= offset < len(config) - 1 and offset not in seen:
            seen.add(offset)
            yield config[offset], offset
            offset = config[offset + 1] & ~3

    def extended_capabilities(self) -> Iterator[tuple[int, int]]:
        """The same of the extended ones."""
        config = self.config_space[:_CONFIG_LIMIT]
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
            return Window(CONFIG_REGION, 0, self._size(CONFIG_REGION) or CONFIG_BYTES)
        if name.startswith("ecap:"):
            at = _first(self.extended_capabilities(), name.removeprefix("ecap:"))
            end = self._size(CONFIG_REGION)
            return None if at is None else Window(CONFIG_REGION, at, end - at)
        if kind == "pci":
            at = _first(self.capabilities(), name.removeprefix("cap:"))
            return None if at is None else Window(CONFIG_REGION, at, CONFIG_BYTES - at)
        if kind == "msix":
            return self._locate_msix(name)
        if kind == "virtio":
            return self._locate_virtio(_VIRTIO_TYPES[name])
        region = int(base.removeprefix("bar"))
        size = self._size(region)
        return Window(region, 0, size) if size else None

    def _locate_msix(self, structure: str) -> Window | None:
        at = _first(self.capabilities(), _MSIX_CAPABILITY)
        if at is None:
            return None
        vectors = (self._number(at + 2, 2) & 0x7FF) + 1
        size = 16 * vectors if structure == "table" else 8 * -(-vectors // 64)
        location = self._number(at + _MSIX_STRUCTURES[structure], 4)
        return self._in_bar(location & 7, location & ~7, size)

    def _locate_virtio(self, wanted: int) -> Window | None:
        for capability, at in self.capabilities():
            if capability != _VENDOR_CAPABILITY or self._number(at + 3, 1) != wanted:
                continue
            if wanted == _VIRTIO_WINDOW:
                data = at + _VIRTIO_CAPABILITY_BYTES
                return Window(CONFIG_REGION, data, _VIRTIO_WINDOW_BYTES)
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
        if bar >= _BARS or offset + size > self._size(bar):
            return None
        return Window(bar, offset, size, multiplier)

    def _number(self, offset: int, size: int) -> int:
        """From the configuration space; what lies behind its end reads as zero."""
        return int.from_bytes(self.config_space[:CONFIG_BYTES][offset : offset + size], "little")

    def _size(self, region: int) -> int:
        return self.region_sizes.get(region, 0)

    @classmethod
    def from_info(cls, info: "GatewayInfo") -> Self:
        """From a gateway's status."""
        identity = info.identity
        return cls(
            vendor=identity.vendor,
            device=identity.device,
            subsystem_vendor=identity.subsystem_vendor,
            subsystem=identity.subsystem,
            class_code=identity.class_code,
            config_space=info.config_space,
            region_sizes={index: region.size for index, region in info.regions.items()},
            v2=info.supports.v2,
            precopy=info.supports.precopy,
        )


def _first(capabilities: Iterable[tuple[int, int]], wanted: str) -> int | None:
    """The offset of the first capability with the ID `wanted`, in hexadecimal digits."""
    return next((at for found, at in capabilities if found == int(wanted, 16)), None)


def is_base(base: str) -> bool:
    """Whether `base` is a locator that `DeviceView.locate` understands."""
    kind, _, name = base.partition(":")
    if kind == "virtio":
        return name in _VIRTIO_TYPES
    if kind == "msix":
        return name in _MSIX_STRUCTURES
    if kind == "pci" and (match := _CAPABILITY_NAME.fullmatch(name)):
        return len(match["digits"]) <= (4 if match["extended"] else 2)
    return base == "pci:config" or base in {f"bar{index}" for index in range(_BARS)}
