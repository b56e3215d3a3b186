"""A PCI function as an operating system sees it: sizing and assigning BARs, capabilities.

Sources: PCI Local Bus Specification 3.0, sections 6.1 (header), 6.2.5.1 (sizing), 6.7
(capabilities), 6.8.2 (MSI-X). Knows the device by its configuration space alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lab.guest.errors import GuestPanic
from lab.guest.fields import U64, Fields
from sync.pci import (
    BAR0,
    BAR_COUNT,
    CAPABILITIES_POINTER,
    MAX_CAPABILITIES,
    STATUS,
    STATUS_CAPABILITIES,
)

MMIO_BASE = 0xE000_0000
"""BARs are placed from here on, in the hole between RAM and firmware."""
MMIO_END = 0xFE00_0000


class ConfigAccess(Protocol):
    """Who reaches the configuration space of a function."""

    def config_read(self, offset: int, size: int) -> int: ...

    def config_write(self, offset: int, size: int, value: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability of a function, and where it stands in its configuration space."""

    id: int
    offset: int


@dataclass(frozen=True, slots=True)
class AssignedBar:
    """A memory BAR. `address` and `size` in bytes; `wide`: it takes two registers."""

    index: int
    address: int
    size: int
    wide: bool


def identity(access: ConfigAccess) -> tuple[int, int]:
    """(vendor id, device id)."""
    word = access.config_read(0, 4)
    return word & 0xFFFF, word >> 16


def capabilities(access: ConfigAccess) -> Iterator[Capability]:
    """Every capability in the order of the list. Raises `GuestPanic` if it has no end."""
    if not access.config_read(STATUS, 2) & STATUS_CAPABILITIES:
        return
    at = access.config_read(CAPABILITIES_POINTER, 1) & ~3
    for _ in range(MAX_CAPABILITIES):
        if not at:
            return
        word = access.config_read(at, 2)
        yield Capability(word & 0xFF, at)
        at = (word >> 8) & ~3
    raise GuestPanic("the device's list of capabilities has no end")


def assign_bars(access: ConfigAccess) -> list[AssignedBar]:
    """Sizes each memory BAR with all ones and gives it an address. I/O BARs are left alone."""
    bars: list[AssignedBar] = []
    next_address = MMIO_BASE
    index = 0
    while index < BAR_COUNT:
        offset = BAR0 + 4 * index
        access.config_write(offset, 4, 0xFFFF_FFFF)
        low = access.config_read(offset, 4)
        wide = low & 0b111 == 0b100
        if low & 1 or not low:
            access.config_write(offset, 4, 0)
            index += 1
            continue
        mask = low & ~0xF
        if wide:
            if index + 1 == BAR_COUNT:
                raise GuestPanic("the device's last BAR claims to have 64 bits")
            access.config_write(offset + 4, 4, 0xFFFF_FFFF)
            mask |= access.config_read(offset + 4, 4) << 32
        size = (~mask & (1 << (64 if wide else 32)) - 1) + 1
        address = -(-next_address // size) * size
        if address + size > MMIO_END:
            raise GuestPanic(f"no room for the device's BAR {index} of {size:#x} bytes")
        next_address = address + size
        bar = AssignedBar(index, address, size, wide)
        place_bar(access, bar)
        bars.append(bar)
        index += 2 if wide else 1
    return bars


def place_bar(access: ConfigAccess, bar: AssignedBar) -> None:
    """Writes the address of `bar` to its registers."""
    offset = BAR0 + 4 * bar.index
    access.config_write(offset, 4, bar.address & 0xFFFF_FFFF)
    if bar.wide:
        access.config_write(offset + 4, 4, bar.address >> 32)


def load_bars(fields: Fields) -> list[AssignedBar]:
    """The member `bars`, as another guest has assigned them. Raises `StreamError`."""
    return [
        AssignedBar(
            bar.number("index", BAR_COUNT - 1),
            bar.number("address", U64),
            bar.number("size", U64),
            bar.flag("wide"),
        )
        for bar in fields.objects("bars", BAR_COUNT)
    ]
