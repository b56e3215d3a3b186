"""The EEPROM of an 82540EM: 64 words, read through EERD or bit by bit through EECD (Microwire).

Owns the words, their checksum, and both ways to read them. It cannot be written: there is nothing
that a driver could want to keep there.

How far a Microwire command has come is not in any register: who takes the registers over in the
middle of one sees the rest of it fail. The next one, begun by raising CS, is sound again.

Source: Software Developer's Manual, 5.3 and 5.4 (Microwire access, EEPROM map), 13.4.3 (EECD),
13.4.4 (EERD).
"""

from enum import IntFlag

WORDS = 64
_CHECKSUM = 0xBABA
_CHECKSUM_WORD = 0x3F
_ADDRESS_BITS = 6
_COMMAND_BITS = 2 + _ADDRESS_BITS
_READ = 0b10

_EERD_START = 1 << 0
_EERD_DONE = 1 << 4


class Eecd(IntFlag):
    """Bits of EECD, by which a driver moves the EEPROM's lines itself."""

    CLOCK = 1 << 0
    SELECT = 1 << 1
    TO_EEPROM = 1 << 2
    FROM_EEPROM = 1 << 3
    FLASH_WRITE = 0b11 << 4
    REQUEST = 1 << 6
    GRANT = 1 << 7
    PRESENT = 1 << 8


_WRITABLE = Eecd.CLOCK | Eecd.SELECT | Eecd.TO_EEPROM | Eecd.FLASH_WRITE | Eecd.REQUEST


def eeprom_words(mac: bytes, *, vendor: int, device: int) -> list[int]:
    """What the EEPROM of a NIC with this address holds; the sum of all words is 0xBABA."""
    words = [0] * WORDS
    words[0:3] = [int.from_bytes(mac[at : at + 2], "little") for at in (0, 2, 4)]
    words[0x04] = 0xFFFF
    words[0x08:0x0A] = [0x3000, 0x1000]
    words[0x0A] = 0x4400
    words[0x0B:0x0D] = [device, vendor]
    words[0x0D:0x0F] = [device, vendor]
    words[0x0F] = 0x3040
    words[_CHECKSUM_WORD] = (_CHECKSUM - sum(words)) & 0xFFFF
    return words


class Eeprom:
    """For one thread."""

    def __init__(self, words: list[int]) -> None:
        self._words = words
        self.reset()

    def reset(self) -> None:
        self._eecd = Eecd(0)
        self._eerd = 0
        self._begin()

    def read_eerd(self) -> int:
        return self._eerd

    def write_eerd(self, value: int) -> None:
        address = value >> 8 & 0xFF
        self._eerd = address << 8
        if value & _EERD_START:
            self._eerd |= self._words[address % WORDS] << 16 | _EERD_DONE

    def read_eecd(self) -> int:
        value = self._eecd | Eecd.PRESENT
        if self._eecd & Eecd.REQUEST:
            value |= Eecd.GRANT
        if self._output():
            value |= Eecd.FROM_EEPROM
        return int(value)

    def write_eecd(self, value: int) -> None:
        before, self._eecd = self._eecd, Eecd(value) & _WRITABLE
        if not self._eecd & Eecd.SELECT:
            self._begin()
        elif self._eecd & ~before & Eecd.CLOCK:
            self._clock(bool(self._eecd & Eecd.TO_EEPROM))

    def _begin(self) -> None:
        self._started = False
        self._command = 0
        self._bits = 0
        """Bits of the command that came in, or, behind it, that went out."""
        self._reading = False

    def _clock(self, bit: bool) -> None:
        if self._reading:
            self._bits += 1
        elif not self._started:
            self._started = bit
        elif self._bits < _COMMAND_BITS:
            self._command = self._command << 1 | bit
            self._bits += 1
            if self._bits == _COMMAND_BITS and self._command >> _ADDRESS_BITS == _READ:
                self._reading, self._bits = True, 0

    def _output(self) -> bool:
        if not self._reading:
            return True
        if not self._bits:
            return False
        word, bit = divmod(self._bits - 1, 16)
        address = (self._command + word) % WORDS
        return bool(self._words[address] >> (15 - bit) & 1)
