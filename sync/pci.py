"""The configuration space of a PCI device (type 0 header): where things lie in it, whose it is.

Sources: PCI Local Bus Specification 3.0, sections 6.1 (header), 6.2.2 (command), 6.7
(capabilities), 6.8.1 (MSI), 6.8.2 (MSI-X); PCI Express Base Specification 3.0, section 7.2.
"""

from dataclasses import dataclass
from enum import IntFlag
from typing import Self

CONFIG_BYTES = 256
EXPRESS_CONFIG_BYTES = 4096
"""Of PCI Express: extended capabilities lie behind the first 256 bytes."""
BAR_COUNT = 6

COMMAND = 0x04
STATUS = 0x06
CACHE_LINE = 0x0C
BAR0 = 0x10
ROM = 0x30
CAPABILITIES_POINTER = 0x34
INTERRUPT_LINE = 0x3C
_HEADER_BYTES = 64

STATUS_CAPABILITIES = 1 << 4
"""In the status register: there is a list of capabilities."""
FIRST_CAPABILITY = 0x40
MAX_CAPABILITIES = 48
"""As many as fit behind the header: a longer list goes round in circles."""
MSI_CAPABILITY = 0x05
VENDOR_CAPABILITY = 0x09
EXPRESS_CAPABILITY = 0x10
MSIX_CAPABILITY = 0x11

MSIX_ENTRY_BYTES = 16
MSIX_SIZE_MASK = 0x7FF
"""In the control word of MSI-X: the number of vectors less 1."""
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENABLE = 1 << 15


class Command(IntFlag):
    """Bits of the command register."""

    IO = 1 << 0
    MEMORY = 1 << 1
    BUS_MASTER = 1 << 2
    PARITY = 1 << 6
    SERR = 1 << 8
    INTX_DISABLE = 1 << 10


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the device is, from its configuration header."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    revision: int
    class_code: int
    """24 bits: class, subclass, interface."""

    @classmethod
    def from_config_space(cls, config: bytes) -> Self:
        """Reads a header; what a shorter space does not have reads as zeros."""
        header = config[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0")
        return cls(
            vendor=word(header, 0x00),
            device=word(header, 0x02),
            subsystem_vendor=word(header, 0x2C),
            subsystem=word(header, 0x2E),
            revision=header[0x08],
            class_code=dword(header, 0x08) >> 8,
        )


def word(config: bytes | bytearray, at: int) -> int:
    """The 16 bits at `at`; what lies behind the end reads as zero."""
    return int.from_bytes(config[at : at + 2], "little")


def dword(config: bytes | bytearray, at: int) -> int:
    """The 32 bits at `at`; what lies behind the end reads as zero."""
    return int.from_bytes(config[at : at + 4], "little")
