"""The registers of an Intel 8254x NIC: where they are, what they hold, and the two rings in them.

Owns addresses, defaults and which bits can be written, for every register that is plain storage.
Does not own what follows from a write: that is `e1000`.

Source: Intel PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual, chapter
13 (register descriptions).
"""

from enum import IntEnum, IntFlag

DESCRIPTOR_BYTES = 16
ALL = 0xFFFF_FFFF


class Reg(IntEnum):
    """Offsets in BAR 0, in bytes. Each register has 4 bytes."""

    CTRL = 0x0000
    CTRL_COPY = 0x0004
    STATUS = 0x0008
    EECD = 0x0010
    EERD = 0x0014
    CTRL_EXT = 0x0018
    MDIC = 0x0020
    FCAL = 0x0028
    FCAH = 0x002C
    FCT = 0x0030
    VET = 0x0038
    ICR = 0x00C0
    ITR = 0x00C4
    ICS = 0x00C8
    IMS = 0x00D0
    IMC = 0x00D8
    RCTL = 0x0100
    FCTTV = 0x0170
    TXCW = 0x0178
    TCTL = 0x0400
    TIPG = 0x0410
    AIT = 0x0458
    LEDCTL = 0x0E00
    PBA = 0x1000
    FCRTL = 0x2160
    FCRTH = 0x2168
    RDBAL = 0x2800
    RDBAH = 0x2804
    RDLEN = 0x2808
    RDH = 0x2810
    RDT = 0x2818
    RDTR = 0x2820
    RXDCTL = 0x2828
    RADV = 0x282C
    RSRPD = 0x2C00
    TXDMAC = 0x3000
    TDBAL = 0x3800
    TDBAH = 0x3804
    TDLEN = 0x3808
    TDH = 0x3810
    TDT = 0x3818
    TIDV = 0x3820
    TXDCTL = 0x3828
    TADV = 0x382C
    TSPMT = 0x3830
    RXCSUM = 0x5000
    MTA = 0x5200
    RA = 0x5400
    VFTA = 0x5600
    WUC = 0x5800
    WUFC = 0x5808
    MANC = 0x5820


class Control(IntFlag):
    """CTRL."""

    FULL_DUPLEX = 1 << 0
    SET_LINK_UP = 1 << 6
    SPEED_1000 = 1 << 9
    RESET = 1 << 26
    VLAN_MODE = 1 << 30
    PHY_RESET = 1 << 31


class Status(IntFlag):
    """STATUS."""

    FULL_DUPLEX = 1 << 0
    LINK_UP = 1 << 1
    SPEED_1000 = 1 << 7


class Cause(IntFlag):
    """ICR, ICS, IMS and IMC."""

    TX_WRITTEN_BACK = 1 << 0
    TX_QUEUE_EMPTY = 1 << 1
    LINK = 1 << 2
    RX_LOW = 1 << 4
    RX_OVERRUN = 1 << 6
    RX = 1 << 7
    MDIO = 1 << 9


CAUSES = 0x0001_FFFF


class ReceiveControl(IntFlag):
    """RCTL."""

    ENABLE = 1 << 1
    ALL_UNICAST = 1 << 3
    ALL_MULTICAST = 1 << 4
    LONG = 1 << 5
    BROADCAST = 1 << 15
    VLAN_FILTER = 1 << 18
    SIZE_16 = 1 << 25
    STRIP_CRC = 1 << 26


class TransmitControl(IntFlag):
    """TCTL."""

    ENABLE = 1 << 1
    PAD = 1 << 3


MTA_WORDS = VFTA_WORDS = 128
RA_ENTRIES = 16
ADDRESS_VALID = 1 << 31

_STATUS = Status.FULL_DUPLEX | Status.LINK_UP | Status.SPEED_1000
_CONTROL = Control.FULL_DUPLEX | Control.SET_LINK_UP | Control.SPEED_1000
_SELF_CLEARING = Control.RESET | Control.PHY_RESET
_RING_BYTES_MASK = 0x000F_FF80

_STORAGE: dict[int, tuple[int, int]] = {
    Reg.CTRL: (_CONTROL, ALL & ~_SELF_CLEARING),
    Reg.STATUS: (_STATUS, 0),
    Reg.CTRL_EXT: (0, ALL),
    Reg.FCAL: (0, ALL),
    Reg.FCAH: (0, 0xFFFF),
    Reg.FCT: (0, 0xFFFF),
    Reg.VET: (0x8100, 0xFFFF),
    Reg.ITR: (0, 0xFFFF),
    Reg.RCTL: (0, 0x07FF_FFFE),
    Reg.FCTTV: (0, 0xFFFF),
    Reg.TXCW: (0, ALL),
    Reg.TCTL: (0, 0x03FF_FFFA),
    Reg.TIPG: (0x0060_2008, 0x3FFF_FFFF),
    Reg.AIT: (0, 0xFFFF),
    Reg.LEDCTL: (0x0706_8302, ALL),
    Reg.PBA: (0x0010_0030, 0x0000_FFFF),
    Reg.FCRTL: (0, 0x8000_FFF8),
    Reg.FCRTH: (0, 0x0000_FFF8),
    Reg.RDTR: (0, 0xFFFF),
    Reg.RXDCTL: (0x0001_0000, 0x013F_3F3F),
    Reg.RADV: (0, 0xFFFF),
    Reg.RSRPD: (0, 0xFFF),
    Reg.TXDMAC: (0, 1),
    Reg.TIDV: (0, 0xFFFF),
    Reg.TXDCTL: (0, 0xFF3F_3F3F),
    Reg.TADV: (0, 0xFFFF),
    Reg.TSPMT: (0x0100_0400, ALL),
    Reg.RXCSUM: (0, 0x7FF),
    Reg.WUC: (0, 0xF),
    Reg.WUFC: (0, 0x000F_80FF),
    Reg.MANC: (0, ALL),
}
for _first in (Reg.RDBAL, Reg.TDBAL):
    _STORAGE |= {
        _first: (0, ALL & -DESCRIPTOR_BYTES),
        _first + 0x04: (0, ALL),
        _first + 0x08: (0, _RING_BYTES_MASK),
        _first + 0x10: (0, 0xFFFF),
        _first + 0x18: (0, 0xFFFF),
    }
for _first, _count in ((Reg.MTA, MTA_WORDS), (Reg.VFTA, VFTA_WORDS), (Reg.RA, 2 * RA_ENTRIES)):
    _STORAGE |= {_first + 4 * _index: (0, ALL) for _index in range(_count)}
_STORAGE |= {Reg.RA + 8 * _index + 4: (0, ADDRESS_VALID | 0x3_FFFF) for _index in range(RA_ENTRIES)}

_MASKS = {offset: mask for offset, (_, mask) in _STORAGE.items()}
_DEFAULTS = {offset: default for offset, (default, _) in _STORAGE.items()}


class RegisterFile:
    """The plain registers. `mac`: 6 bytes, which a reset loads into the first receive address.

    Each is read and written as a whole: safe from any thread.
    """

    def __init__(self, mac: bytes) -> None:
        self._mac = mac
        self._values: dict[int, int] = {}
        self.reset()

    def reset(self) -> None:
        """Every register as after power-on."""
        first = {
            int(Reg.RA): int.from_bytes(self._mac[:4], "little"),
            int(Reg.RA + 4): int.from_bytes(self._mac[4:], "little") | ADDRESS_VALID,
        }
        self._values = _DEFAULTS | first

    def __getitem__(self, offset: int) -> int:
        return self._values[offset]

    def read(self, offset: int) -> int:
        """What a driver reads; 0 where there is no register."""
        return self._values.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        """What a driver writes: bits that are read-only, or not there, stay as they are."""
        mask = _MASKS.get(offset)
        if mask is not None:
            self._values[offset] = (self._values[offset] & ~mask) | (value & mask)

    def put(self, offset: int, value: int) -> None:
        """What the device itself stores."""
        self._values[offset] = value


class Ring:
    """A ring of descriptors, as its registers from `first` (RDBAL or TDBAL) on describe it."""

    def __init__(self, registers: RegisterFile, first: int) -> None:
        self._registers = registers
        self._first = first

    @property
    def base(self) -> int:
        """IOVA of descriptor 0."""
        return self._registers[self._first] | self._registers[self._first + 4] << 32

    @property
    def size(self) -> int:
        """How many descriptors."""
        return self._registers[self._first + 8] // DESCRIPTOR_BYTES

    @property
    def head(self) -> int:
        return self._registers[self._first + 0x10]

    def advance(self, head: int) -> None:
        """The device is done with everything before `head`."""
        self._registers.put(self._first + 0x10, head)

    @property
    def available(self) -> int:
        """Descriptors that belong to the device; 0 if the registers make no sense."""
        size, head = self.size, self.head
        tail = self._registers[self._first + 0x18]
        return (tail - head) % size if head < size and tail < size else 0
