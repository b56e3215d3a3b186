"""What a VMM itself knows of its vfio-user devices and does not migrate: the shapes and the bytes.

Sans-IO. Owned here: what is kept of each function, its encoding, and how a configuration space is
read for it. Not owned: the accesses (`pci`). Sources: PCI Local Bus Specification 3.0, sections
6.1 (header), 6.8.1 (MSI), 6.8.2 (MSI-X).

    header    magic 4s | version H | functions H | devices of the machine H | CF8 I
    function  bus B | devfn B | interrupt line B | MSI-X offset B | MSI offset B | ids I |
              command H | cache line and latency H | BARs 6I | ROM I | MSI-X control H |
              MSI control H | MSI-X table bytes I | MSI bytes H | table |
              MSI behind its control word
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from sync.pci import (
    BAR0,
    BAR_COUNT,
    CACHE_LINE,
    CAPABILITIES_POINTER,
    COMMAND,
    CONFIG_BYTES,
    FIRST_CAPABILITY,
    INTERRUPT_LINE,
    MAX_CAPABILITIES,
    MSI_CAPABILITY,
    MSIX_CAPABILITY,
    MSIX_ENABLE,
    MSIX_ENTRY_BYTES,
    MSIX_SIZE_MASK,
    ROM,
    STATUS,
    STATUS_CAPABILITIES,
    Command,
    dword,
    word,
)
from sync.vmm.errors import VmmError

_BARS = range(BAR0, BAR0 + 4 * BAR_COUNT, 4)
STATE_OFFSETS = (0x00, COMMAND, CACHE_LINE, *_BARS, ROM, INTERRUPT_LINE)
"""Of the doublewords that hold what software may have changed, capabilities apart."""
MAX_VECTORS = 2048
MAX_FUNCTIONS = 64
MAX_BLOB_BYTES = 1 << 20
"""What one control message of the link carries."""

_MSI_ENABLED, _MSI_64, _MSI_MASKABLE = 1 << 0, 1 << 7, 1 << 8
_ADDRESS = ~0xF
_MAGIC, _VERSION = b"VFpl", 1
_HEADER = struct.Struct("<4sHHHI")
_FUNCTION = struct.Struct("<BBBBBIHH6IIHHIH")


class PlatformError(VmmError):
    """The state of a device inside its VMM is malformed, or belongs to another machine."""


@dataclass(frozen=True, slots=True)
class Msix:
    """The MSI-X capability of a function as it was read."""

    at: int
    control: int
    table_bar: int
    table_offset: int

    @property
    def table_bytes(self) -> int:
        return ((self.control & MSIX_SIZE_MASK) + 1) * MSIX_ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a device. Offsets of capabilities it does not have are 0."""

    bus: int
    devfn: int
    ids: int
    command: int
    cache_line: int
    bars: tuple[int, ...]
    rom: int
    interrupt_line: int
    msix_at: int = 0
    msix_control: int = 0
    msix_table: bytes = b""
    msi_at: int = 0
    msi_control: int = 0
    msi: bytes = b""
    """Address, data and mask bits, behind the control word."""

    @property
    def decodes_memory(self) -> bool:
        return bool(self.command & Command.MEMORY)

    @property
    def name(self) -> str:
        return f"{self.bus:02x}:{self.devfn >> 3:02x}.{self.devfn & 7}"

    def bar_address(self, index: int) -> int:
        """Where a memory BAR was placed; 0 if it is none or was not."""
        if not 0 <= index < BAR_COUNT or self.bars[index] & 1:
            return 0
        low = self.bars[index] & _ADDRESS & 0xFFFFFFFF
        if self.bars[index] & 0b110 == 0b100:
            return low | (self.bars[index + 1] << 32 if index + 1 < BAR_COUNT else 0)
        return low

    def memory_bars(self) -> Iterator[int]:
        """The indices of memory BARs that have an address."""
        index = 0
        while index < BAR_COUNT:
            if self.bar_address(index):
                yield index
            index += 2 if self.bars[index] & 0b111 == 0b100 else 1

    def uses_intx(self, pin: int) -> bool:
        return bool(
            pin
            and not self.command & Command.INTX_DISABLE
            and not self.msix_control & MSIX_ENABLE
            and not self.msi_control & _MSI_ENABLED
        )


@dataclass(frozen=True, slots=True)
class Platform:
    """Functions of a machine, in bus order, how many it has, and its CF8 register."""

    cf8: int
    n_devices: int
    functions: tuple[Function, ...]

    def pack(self) -> bytes:
        count = len(self.functions)
        blob = _HEADER.pack(_MAGIC, _VERSION, count, self.n_devices, self.cf8)
        for f in self.functions:
            blob += _FUNCTION.pack(
                *(f.bus, f.devfn, f.interrupt_line, f.msix_at, f.msi_at, f.ids, f.command),
                *(f.cache_line, *f.bars, f.rom, f.msix_control, f.msi_control),
                *(len(f.msix_table), len(f.msi)),
            )
            blob += f.msix_table + f.msi
        if len(blob) > MAX_BLOB_BYTES:
            raise PlatformError(f"{len(blob)} bytes of MSI-X tables are too many to carry over")
        return blob

    @classmethod
    def unpack(cls, blob: bytes) -> "Platform":
        """Raises `PlatformError`: the peer is not trusted."""
        if len(blob) > MAX_BLOB_BYTES or len(blob) < _HEADER.size:
            raise PlatformError(f"{len(blob)} bytes are no state of PCI functions")
        magic, version, count, n_devices, cf8 = _HEADER.unpack_from(blob)
        if (magic, version) != (_MAGIC, _VERSION) or count > MAX_FUNCTIONS:
            raise PlatformError("the state of the PCI functions is of another version")
        at, functions = _HEADER.size, []
        for _ in range(count):
            function, at = _function(blob, at)
            functions.append(function)
        if at != len(blob):
            raise PlatformError("bytes follow the state of the last PCI function")
        return cls(cf8, n_devices, tuple(functions))


def _function(blob: bytes, at: int) -> tuple[Function, int]:
    if len(blob) - at < _FUNCTION.size:
        raise PlatformError("the state of a PCI function is cut off")
    fields = _FUNCTION.unpack_from(blob, at)
    bus, devfn, line, msix_at, msi_at, ids, command, cache_line = fields[:8]
    bars, (rom, msix_control, msi_control, table_bytes, msi_bytes) = fields[8:14], fields[14:]
    at += _FUNCTION.size
    end = at + table_bytes + msi_bytes
    table, msi = blob[at : at + table_bytes], blob[at + table_bytes : end]
    right_table = ((msix_control & MSIX_SIZE_MASK) + 1) * MSIX_ENTRY_BYTES if msix_at else 0
    right_msi = msi_body_bytes(msi_control) if msi_at else 0
    if end > len(blob) or table_bytes not in (0, right_table) or msi_bytes != right_msi:
        raise PlatformError("the state of a PCI function has the wrong length")
    if any(offset % 4 or 0 < offset < FIRST_CAPABILITY for offset in (msix_at, msi_at)):
        raise PlatformError("a capability of a PCI function lies where none can be")
    if msi_at + 4 + msi_bytes > CONFIG_BYTES or msix_at + 12 > CONFIG_BYTES:
        raise PlatformError("a capability of a PCI function is cut off")
    return Function(
        *(bus, devfn, ids, command, cache_line, bars, rom, line),
        *(msix_at, msix_control, table, msi_at, msi_control, msi),
    ), end


def msi_body_bytes(control: int) -> int:
    """Bytes of an MSI capability behind its control word."""
    size = 10 if control & _MSI_64 else 6
    return size + 10 if control & _MSI_MASKABLE else size


def find_capabilities(config: bytes) -> dict[int, int]:
    """Offset of the first capability of each kind. Raises `PlatformError` for an endless list."""
    found: dict[int, int] = {}
    if not word(config, STATUS) & STATUS_CAPABILITIES:
        return found
    at = config[CAPABILITIES_POINTER] & ~3
    for _ in range(MAX_CAPABILITIES):
        if not at:
            return found
        if at < FIRST_CAPABILITY:
            break
        found.setdefault(config[at], at)
        at = config[at + 1] & ~3
    raise PlatformError("a device's list of capabilities has no end")


def msix_at(at: int, config: bytes | bytearray) -> Msix:
    """The MSI-X capability at `at` of a configuration space."""
    if at + 12 > CONFIG_BYTES:
        raise PlatformError("a device's MSI-X capability is cut off")
    table = dword(config, at + 4)
    return Msix(at, word(config, at + 2), table & 7, table & ~7)


def function_of(bus: int, devfn: int, config: bytes) -> Function:
    """What is kept of a configuration space of 256 bytes, but for the MSI-X table."""
    capabilities = find_capabilities(config)
    msi_at = capabilities.get(MSI_CAPABILITY, 0)
    msix_found = capabilities.get(MSIX_CAPABILITY, 0)
    msix = msix_at(msix_found, config) if msix_found else None
    msi_control = word(config, msi_at + 2) if msi_at else 0
    if msi_at + 4 + msi_body_bytes(msi_control) > CONFIG_BYTES:
        raise PlatformError("a device's MSI capability is cut off")
    return Function(
        bus=bus,
        devfn=devfn,
        ids=dword(config, 0),
        command=word(config, COMMAND),
        cache_line=word(config, CACHE_LINE),
        bars=tuple(dword(config, at) for at in _BARS),
        rom=dword(config, ROM),
        interrupt_line=config[INTERRUPT_LINE],
        msix_at=msix.at if msix else 0,
        msix_control=msix.control if msix else 0,
        msi_at=msi_at,
        msi_control=msi_control,
        msi=config[msi_at + 4 : msi_at + 4 + msi_body_bytes(msi_control)] if msi_at else b"",
    )
