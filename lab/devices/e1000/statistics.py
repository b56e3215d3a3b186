"""The statistics registers of an 8254x: counters that are cleared when they are read.

Owns what is counted where. Octet counters have 64 bits in two registers; reading the upper one
clears both. Every other counter stays at its highest value.

Source: Software Developer's Manual, 13.7.
"""

import threading

FIRST, LAST = 0x4000, 0x40FC
CRC_BYTES = 4

_MPC, _ROC, _RNBC = 0x4010, 0x40AC, 0x40A0
_RX_SIZES, _RX_GOOD, _RX_BROADCAST, _RX_MULTICAST = 0x405C, 0x4074, 0x4078, 0x407C
_TX_GOOD, _RX_OCTETS, _TX_OCTETS = 0x4080, 0x4088, 0x4090
_RX_ALL_OCTETS, _TX_ALL_OCTETS, _RX_ALL, _TX_ALL = 0x40C0, 0x40C8, 0x40D0, 0x40D4
_TX_SIZES, _TX_MULTICAST, _TX_BROADCAST, _TX_SEGMENTED = 0x40D8, 0x40F0, 0x40F4, 0x40F8

_OCTETS = (_RX_OCTETS, _TX_OCTETS, _RX_ALL_OCTETS, _TX_ALL_OCTETS)
_SIZE_LIMITS = (64, 127, 255, 511, 1023)
_MOST = 0xFFFF_FFFF
_BROADCAST = b"\xff" * 6


class Statistics:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}

    def reset(self) -> None:
        with self._lock:
            self._counts.clear()

    def read(self, offset: int) -> int:
        """What a register holds, which is 0 afterwards."""
        with self._lock:
            if offset in _OCTETS:
                return self._counts.get(offset, 0) & _MOST
            if offset - 4 in _OCTETS:
                return self._counts.pop(offset - 4, 0) >> 32 & _MOST
            return self._counts.pop(offset, 0)

    def received(self, frame: bytes) -> None:
        """A frame (without its CRC) was given to the driver."""
        self._count(frame, _RX_SIZES, _RX_BROADCAST, _RX_MULTICAST)
        self._add(_RX_GOOD, _RX_ALL)
        self._add(_RX_OCTETS, _RX_ALL_OCTETS, amount=len(frame) + CRC_BYTES)

    def transmitted(self, frame: bytes) -> None:
        """A frame (without its CRC) was sent."""
        self._count(frame, _TX_SIZES, _TX_BROADCAST, _TX_MULTICAST)
        self._add(_TX_GOOD, _TX_ALL)
        self._add(_TX_OCTETS, _TX_ALL_OCTETS, amount=len(frame) + CRC_BYTES)

    def segmented(self) -> None:
        """A packet was cut into segments."""
        self._add(_TX_SEGMENTED)

    def oversized(self) -> None:
        """A frame was dropped that is longer than the driver wants."""
        self._add(_ROC)

    def missed(self) -> None:
        """A frame was dropped since it found no buffers."""
        self._add(_MPC)

    def waited(self) -> None:
        """A frame found no buffers, and waits."""
        self._add(_RNBC)

    def _count(self, frame: bytes, sizes: int, broadcast: int, multicast: int) -> None:
        length = len(frame) + CRC_BYTES
        self._add(sizes + 4 * sum(length > limit for limit in _SIZE_LIMITS))
        if frame[:6] == _BROADCAST:
            self._add(broadcast)
        elif frame[0] & 1:
            self._add(multicast)

    def _add(self, *offsets: int, amount: int = 1) -> None:
        with self._lock:
            for offset in offsets:
                most = (1 << 64) - 1 if offset in _OCTETS else _MOST
                self._counts[offset] = min(self._counts.get(offset, 0) + amount, most)
