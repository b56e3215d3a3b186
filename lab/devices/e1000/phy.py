"""The PHY of an 82540EM behind MDIC: a link that is always up, at 1000 Mb/s, full duplex.

Owns the PHY's registers and the MDIC command. The link's real fate is the business of whoever is
connected: a frame that nobody takes is lost, as on a cable.

Writing the value of MDIC once more repeats its command, with the same outcome: who takes the
register over by its value has the last command done and its result there to be read.

Sources: Software Developer's Manual, 13.4.5 (MDIC) and 8.6 (PHY registers); IEEE 802.3, 22.2.4.
"""

ADDRESS = 1

_CONTROL = 0
_DATA_MASK = 0xFFFF
_OP_MASK = 0b11 << 26
_OP_WRITE = 1 << 26
_OP_READ = 1 << 27
_READY = 1 << 28
INTERRUPT = 1 << 29
"""Bit of MDIC: the driver wants an interrupt when the command is done."""
_ERROR = 1 << 30

_RESET = 1 << 15
_RESTART_NEGOTIATION = 1 << 9

_DEFAULTS = {
    _CONTROL: 0x1140,  # negotiate, full duplex, 1000 Mb/s
    1: 0x796D,  # everything possible, negotiation complete, link up
    2: 0x0141,
    3: 0x0C20,  # the identifier of the PHY within an 82540EM
    4: 0x0DE1,
    5: 0x45E1,  # the partner: acknowledged, pause, 10 and 100 Mb/s
    6: 0x0001,
    9: 0x0E00,
    10: 0x3C00,  # both receivers fine, partner does 1000 Mb/s
    15: 0x3000,
    16: 0x0360,
    17: 0xAC08,  # 1000 Mb/s, full duplex, resolved, link up
    20: 0x0D60,
}
_WRITABLE = frozenset({_CONTROL, 4, 7, 9, 16, 18, 20, 24, 29, 30})


class Phy:
    """For one thread."""

    def __init__(self) -> None:
        self.mdic = 0
        """What MDIC reads as."""
        self._registers: dict[int, int] = {}
        self.reset()

    def reset(self) -> None:
        """PHY registers as after power-on; MDIC stays."""
        self._registers = dict(_DEFAULTS)

    def command(self, value: int) -> None:
        """MDIC was written: do what it says at once."""
        operation = value & _OP_MASK
        self.mdic = value & ~(_READY | _ERROR)
        if operation not in (_OP_READ, _OP_WRITE):
            return
        self.mdic |= _READY
        register = value >> 16 & 0x1F
        if value >> 21 & 0x1F != ADDRESS:
            self.mdic |= _ERROR
        elif operation == _OP_READ:
            self.mdic = self.mdic & ~_DATA_MASK | self._registers.get(register, 0)
        elif register in _WRITABLE:
            self._write(register, value & _DATA_MASK)

    def _write(self, register: int, value: int) -> None:
        if register == _CONTROL:
            if value & _RESET:
                self.reset()
                return
            value &= ~_RESTART_NEGOTIATION
        self._registers[register] = value
