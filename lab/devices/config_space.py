"""Configuration space of a PCI device (type 0 header): 256 bytes, PCI Express 4096.

Owns what software sees in the configuration space: identity, command and status, BAR sizing,
interrupt pin, the lists of capabilities, and which bits can be written. Does not own what an
address in a BAR means, nor interrupts.

Sources: PCI Local Bus Specification 3.0, sections 6.1 (header), 6.2.5 (BAR sizing), 6.7
(capabilities), 6.8.2 (MSI-X); PCI Express Base Specification 3.0, sections 7.8 (its capability),
7.9 (extended capabilities), 7.10 (Advanced Error Reporting).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from sync.errors import SyncError
from sync.pci import (
    BAR0,
    BAR_COUNT,
    CAPABILITIES_POINTER,
    COMMAND,
    CONFIG_BYTES,
    EXPRESS_CAPABILITY,
    EXPRESS_CONFIG_BYTES,
    FIRST_CAPABILITY,
    INTERRUPT_LINE,
    MSIX_CAPABILITY,
    MSIX_ENABLE,
    MSIX_FUNCTION_MASK,
    STATUS,
    STATUS_CAPABILITIES,
    Command,
    word,
)

_STATUS_INTERRUPT = 1 << 3
_EXPRESS_VERSION = 2
_ROLE_BASED_ERRORS = 1 << 15
_DEVICE_CONTROL = 0x7FFF
_LINK_X1_GEN1 = 0x11
_LINK_CONTROL = 0x01FB
_AER_ID = 0x0001
_AER_VERSION = 2
_UNCORRECTABLE_ERRORS = 0x01FF_F030
_UNCORRECTABLE_SEVERITY = 0x0046_2030
_CORRECTABLE_ERRORS = 0xF1C1
_CORRECTABLE_MASK = 0x2000


class PciStateError(SyncError):
    """A saved configuration space belongs to a device that is built differently."""


class BarKind(IntEnum):
    """What a BAR decodes; the value is what its low bits read as."""

    MEMORY_32 = 0b0000
    MEMORY_64 = 0b0100
    IO = 0b0001


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register. `size` is a power of two, in bytes; at least 16 (IO: 4)."""

    index: int
    size: int
    kind: BarKind = BarKind.MEMORY_32

    def __post_init__(self) -> None:
        smallest = 4 if self.kind is BarKind.IO else 16
        last = BAR_COUNT - (2 if self.kind is BarKind.MEMORY_64 else 1)
        if not 0 <= self.index <= last:
            raise ValueError(f"a device has no BAR {self.index} of kind {self.kind.name}")
        if self.size < smallest or self.size & (self.size - 1):
            raise ValueError(f"{self.size} bytes are no size for a BAR")


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """What a driver is chosen by. `class_code` has 24 bits: class, subclass, interface."""

    vendor_id: int
    device_id: int
    class_code: int
    revision_id: int = 0
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability without its two leading bytes (id and next). `writable` masks `body`."""

    id: int
    body: bytes
    writable: bytes = b""


def msix_capability(
    n_vectors: int, table_bar: int, table_offset: int, pba_bar: int, pba_offset: int
) -> Capability:
    """MSI-X for 1 to 2048 vectors. The offsets are multiples of 8 bytes within their BARs."""
    if not 1 <= n_vectors <= 2048 or table_offset % 8 or pba_offset % 8:
        raise ValueError("no such MSI-X capability")
    return Capability(
        MSIX_CAPABILITY,
        struct.pack("<HII", n_vectors - 1, table_offset | table_bar, pba_offset | pba_bar),
        struct.pack("<H", MSIX_ENABLE | MSIX_FUNCTION_MASK),
    )


@dataclass(frozen=True, slots=True)
class ExtendedCapability:
    """An extended capability without its header of four bytes. `writable` masks `body`."""

    id: int
    version: int
    body: bytes
    writable: bytes = b""


def express_capability() -> Capability:
    """A PCI Express endpoint at the end of a link of one lane."""
    link = _LINK_X1_GEN1
    body = struct.pack("<HIHHIHH40x", _EXPRESS_VERSION, _ROLE_BASED_ERRORS, 0, 0, link, 0, link)
    return Capability(
        EXPRESS_CAPABILITY, body, struct.pack("<6xH6xH", _DEVICE_CONTROL, _LINK_CONTROL)
    )


def error_reporting() -> ExtendedCapability:
    """Advanced Error Reporting of a device that has no errors: its masks and severities."""
    body = struct.pack("<4xIIIII36x", 0, _UNCORRECTABLE_SEVERITY, 0, _CORRECTABLE_MASK, 0)
    errors = _UNCORRECTABLE_ERRORS
    writable = struct.pack("<4xII4xI", errors, errors, _CORRECTABLE_ERRORS)
    return ExtendedCapability(_AER_ID, _AER_VERSION, body, writable)


class ConfigSpace:
    """Bytes that behave as the configuration space of a device with one function: 256, or 4096
    if it has `extended` capabilities. These need an `express_capability` to be found.

    `interrupt_pin` is 1 to 4 for INTA to INTD, 0 for none. `interrupt_status` is what bit 3 of
    the status register reads as; the device sets it.

    Not thread-safe: the owner serialises accesses.
    """

    def __init__(
        self,
        identity: PciIdentity,
        bars: Sequence[Bar],
        capabilities: Sequence[Capability] = (),
        *,
        extended: Sequence[ExtendedCapability] = (),
        interrupt_pin: int = 0,
    ) -> None:
        self.bars = tuple(bars)
        self.interrupt_status = False
        self.capability_offsets: list[int] = []
        """Where each of `capabilities` lies, in the order given."""
        self._msix_control: int | None = None
        self.size = EXPRESS_CONFIG_BYTES if extended else CONFIG_BYTES
        self._initial = bytearray(self.size)
        self._writable = bytearray(self.size)
        self._build_header(identity, interrupt_pin)
        for bar in self.bars:
            self._build_bar(bar)
        self._build_capabilities(capabilities)
        self._build_extended(extended)
        self._bytes = bytearray(self._initial)

    @property
    def command(self) -> Command:
        return Command(word(self._bytes, COMMAND))

    @property
    def msix_enabled(self) -> bool:
        if self._msix_control is None:
            return False
        return bool(word(self._bytes, self._msix_control) & MSIX_ENABLE)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes. Raises `ValueError` if they do not all lie in the space."""
        self._check(offset, count)
        data = bytearray(self._bytes[offset : offset + count])
        if self.interrupt_status and offset <= STATUS < offset + count:
            data[STATUS - offset] |= _STATUS_INTERRUPT
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Change the bits that can be written. Raises `ValueError` as `read` does."""
        self._check(offset, len(data))
        for at, value in enumerate(data, offset):
            mask = self._writable[at]
            self._bytes[at] = (self._bytes[at] & ~mask) | (value & mask)

    def reset(self) -> None:
        """The state after power-on: nothing is decoded, no DMA, no MSI-X."""
        self._bytes[:] = self._initial
        self.interrupt_status = False

    def save(self) -> bytes:
        """Everything `load` needs, `size` bytes long."""
        return bytes(self._bytes)

    def check(self, saved: bytes) -> None:
        """Raise `PciStateError` unless `saved` is from a space with the same read-only bits."""
        if len(saved) != self.size:
            raise PciStateError(f"a configuration space has {self.size} bytes, not {len(saved)}")
        for at, (mine, theirs, mask) in enumerate(
            zip(self._initial, saved, self._writable, strict=True)
        ):
            if (mine ^ theirs) & ~mask:
                raise PciStateError(f"read-only configuration byte {at:#04x} is different")

    def load(self, saved: bytes) -> None:
        """Take over what another space `save`d. Raises `PciStateError` as `check` does."""
        self.check(saved)
        self._bytes[:] = saved

    def _check(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ValueError(f"{count} bytes at {offset:#x} are not in the configuration space")

    def _build_header(self, identity: PciIdentity, interrupt_pin: int) -> None:
        struct.pack_into("<HH", self._initial, 0x00, identity.vendor_id, identity.device_id)
        class_and_revision = identity.class_code << 8 | identity.revision_id
        struct.pack_into("<I", self._initial, 0x08, class_and_revision)
        subsystem = (identity.subsystem_vendor_id, identity.subsystem_id)
        struct.pack_into("<HH", self._initial, 0x2C, *subsystem)
        self._initial[INTERRUPT_LINE + 1] = interrupt_pin
        command = Command.BUS_MASTER | Command.PARITY | Command.SERR
        if interrupt_pin:
            command |= Command.INTX_DISABLE
        for bar in self.bars:
            command |= Command.IO if bar.kind is BarKind.IO else Command.MEMORY
        struct.pack_into("<H", self._writable, COMMAND, command)
        struct.pack_into("<BB", self._writable, 0x0C, 0xFF, 0xFF)
        self._writable[INTERRUPT_LINE] = 0xFF

    def _build_bar(self, bar: Bar) -> None:
        # Sizing works by itself: address bits below the size are wired to 0, so that they read
        # back as 0 after all ones were written.
        at = BAR0 + 4 * bar.index
        width = 8 if bar.kind is BarKind.MEMORY_64 else 4
        if any(self._writable[at : at + width]):
            raise ValueError(f"BAR {bar.index} is there twice")
        struct.pack_into("<I", self._initial, at, bar.kind)
        mask = -bar.size & ((1 << 8 * width) - 1)
        self._writable[at : at + width] = mask.to_bytes(width, "little")

    def _build_capabilities(self, capabilities: Sequence[Capability]) -> None:
        link, at = CAPABILITIES_POINTER, FIRST_CAPABILITY
        for capability in capabilities:
            end = at + 2 + len(capability.body)
            if end > CONFIG_BYTES or len(capability.writable) > len(capability.body):
                raise ValueError(f"capability {capability.id:#x} does not fit")
            self._initial[link] = at
            self._initial[at] = capability.id
            self._initial[at + 2 : end] = capability.body
            self._writable[at + 2 : at + 2 + len(capability.writable)] = capability.writable
            if capability.id == MSIX_CAPABILITY:
                self._msix_control = at + 2
            self.capability_offsets.append(at)
            link, at = at + 1, (end + 3) & ~3
        if capabilities:
            self._initial[STATUS] |= STATUS_CAPABILITIES

    def _build_extended(self, capabilities: Sequence[ExtendedCapability]) -> None:
        at = CONFIG_BYTES
        for number, capability in enumerate(capabilities, 1):
            body = at + 4
            end = body + len(capability.body)
            following = (end + 3) & ~3 if number < len(capabilities) else 0
            if end > self.size or following >= self.size:
                raise ValueError(f"extended capability {capability.id:#x} does not fit")
            header = following << 20 | capability.version << 16 | capability.id
            struct.pack_into("<I", self._initial, at, header)
            self._initial[body:end] = capability.body
            self._writable[body : body + len(capability.writable)] = capability.writable
            at = following
