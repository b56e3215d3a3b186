"""The receiver of an 8254x: frames from the link go into the buffers of the receive ring.

Owns the filter, the queue of frames that wait for buffers (the NIC's packet memory), and how a
frame is laid out in the ring. A frame is delivered as a whole, or not at all: between two frames
the head (RDH) says everything there is to say.

Source: Software Developer's Manual, 3.2 (reception), 13.4.22 (RCTL), 13.5 (filters).
"""

import logging
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable

from lab.devices.e1000.cable import MAX_FRAME_BYTES
from lab.devices.e1000.offload import ones_sum
from lab.devices.e1000.registers import (
    ADDRESS_VALID,
    DESCRIPTOR_BYTES,
    MTA_WORDS,
    RA_ENTRIES,
    VFTA_WORDS,
    Cause,
    Control,
    ReceiveControl,
    Reg,
    RegisterFile,
    Ring,
)
from lab.devices.e1000.statistics import Statistics
from lab.devices.memory import GuestMemory, MemoryFault

logger = logging.getLogger(__name__)

QUEUE_FRAMES = 64
"""Frames that wait for buffers; a link that brings more is not read until there is room."""
MIN_FRAME_BYTES = 60
STANDARD_FRAME_BYTES = 1518
"""The longest frame, without its CRC, unless the driver asks for long ones: one with a tag."""
_BATCH = 16

_ADDRESS = struct.Struct("<Q")
_STATUS_AT = 12
_REST = struct.Struct("<HHBBH")
_DONE, _END, _NO_CHECKSUM, _VLAN = 1, 2, 4, 8
_BROADCAST = b"\xff" * 6
_HASH_SHIFTS = (4, 3, 2, 0)


class Receiver:
    """`offer` is for the link's thread, `step` for one other thread at a time; the rest for when
    none is in `step`."""

    def __init__(
        self,
        registers: RegisterFile,
        memory: GuestMemory,
        statistics: Statistics,
        raise_cause: Callable[[Cause], None],
    ) -> None:
        self._registers = registers
        self._memory = memory
        self._statistics = statistics
        self._raise = raise_cause
        self._ring = Ring(registers, Reg.RDBAL)
        self._room = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._closed = False

    def offer(self, frame: bytes) -> None:
        """Take a frame; wait while there is no room for it."""
        with self._room:
            if len(self._queue) >= QUEUE_FRAMES:
                self._statistics.waited()
            self._room.wait_for(lambda: self._closed or len(self._queue) < QUEUE_FRAMES)
            if not self._closed:
                self._queue.append(frame)

    def reset(self) -> None:
        """Forget the frames that wait."""
        with self._room:
            self._queue.clear()
            self._room.notify_all()

    def close(self) -> None:
        """Take no frame any more; nobody waits."""
        with self._room:
            self._closed = True
            self._room.notify_all()

    def step(self) -> bool:
        """Deliver some frames; whether there are more that have buffers.

        Raises `MemoryAbsent`; the frame waits then. A frame whose buffers do not exist is dropped.
        """
        delivered = False
        try:
            for _ in range(_BATCH):
                if not self._queue:
                    return False
                if not self._accept(self._queue[0]):
                    return False
                with self._room:
                    self._queue.popleft()
                    self._room.notify_all()
                delivered = True
            return True
        finally:
            if delivered:
                self._raise(Cause.RX | (Cause.RX_LOW if self._is_low() else Cause(0)))

    def _accept(self, frame: bytes) -> bool:
        """Deliver or drop a frame; False if it has to wait."""
        control = self._registers[Reg.RCTL]
        if not control & ReceiveControl.ENABLE or not 14 <= len(frame) <= MAX_FRAME_BYTES:
            return True
        if len(frame) > STANDARD_FRAME_BYTES and not control & ReceiveControl.LONG:
            self._statistics.oversized()
            return True
        if not self._is_wanted(frame, control):
            return True
        try:
            return self._deliver(frame.ljust(MIN_FRAME_BYTES, b"\0"), control)
        except MemoryFault as fault:
            logger.debug("a frame is dropped: %s", fault)
            self._statistics.missed()
            return True

    def _deliver(self, frame: bytes, control: int) -> bool:
        whole = frame
        frame, status, tag = self._take_tag(frame)
        checksum = ones_sum(memoryview(frame)[self._registers[Reg.RXCSUM] & 0xFF :])
        if not control & ReceiveControl.STRIP_CRC:
            frame += struct.pack("<I", zlib.crc32(whole))
        room = _buffer_bytes(control)
        count = -(-len(frame) // room)
        size, head = self._ring.size, self._ring.head
        if count > self._ring.available:
            if size and count > size - 1:
                raise MemoryFault(f"a frame for {count} buffers in a ring of {size}")
            return False
        for number in range(count):
            at = self._descriptor(head + number)
            (address,) = _ADDRESS.unpack(self._memory.read(at, _ADDRESS.size))
            self._memory.write(address, frame[number * room : (number + 1) * room])
        for number in range(count):
            last = number == count - 1
            length = len(frame) - number * room if last else room
            at = self._descriptor(head + number) + _ADDRESS.size
            self._memory.write(at, _REST.pack(length, checksum, 0, 0, tag))
            # A driver that polls must not see the status before the rest.
            self._memory.write(at + 4, bytes([status | _DONE | (_END if last else 0)]))
        self._ring.advance((head + count) % size)
        self._statistics.received(whole)
        return True

    def _descriptor(self, index: int) -> int:
        return self._ring.base + DESCRIPTOR_BYTES * (index % self._ring.size)

    def _take_tag(self, frame: bytes) -> tuple[bytes, int, int]:
        """The frame without its VLAN tag, the descriptor's status, and the tag."""
        if not (self._registers[Reg.CTRL] & Control.VLAN_MODE and self._is_tagged(frame)):
            return frame, _NO_CHECKSUM, 0
        tag = int.from_bytes(frame[14:16], "big")
        return frame[:12] + frame[16:], _NO_CHECKSUM | _VLAN, tag

    def _is_tagged(self, frame: bytes) -> bool:
        return int.from_bytes(frame[12:14], "big") == self._registers[Reg.VET] and len(frame) >= 18

    def _is_wanted(self, frame: bytes, control: int) -> bool:
        if control & ReceiveControl.VLAN_FILTER and self._is_tagged(frame):
            vlan = int.from_bytes(frame[14:16], "big") & 0xFFF
            word = self._registers[Reg.VFTA + 4 * (vlan >> 5) % (4 * VFTA_WORDS)]
            if not word >> (vlan & 31) & 1:
                return False
        destination = frame[:6]
        if destination == _BROADCAST:
            return bool(control & ReceiveControl.BROADCAST) or self._is_ours(destination)
        if not destination[0] & 1:
            return bool(control & ReceiveControl.ALL_UNICAST) or self._is_ours(destination)
        if control & ReceiveControl.ALL_MULTICAST or self._is_ours(destination):
            return True
        shift = _HASH_SHIFTS[control >> 12 & 3]
        place = int.from_bytes(destination[4:], "little") >> shift & 0xFFF
        word = self._registers[Reg.MTA + 4 * (place >> 5) % (4 * MTA_WORDS)]
        return bool(word >> (place & 31) & 1)

    def _is_ours(self, destination: bytes) -> bool:
        low = int.from_bytes(destination[:4], "little")
        high = int.from_bytes(destination[4:], "little") | ADDRESS_VALID
        return any(
            self._registers[Reg.RA + 8 * entry] == low
            and self._registers[Reg.RA + 8 * entry + 4] & (ADDRESS_VALID | 0xFFFF) == high
            for entry in range(RA_ENTRIES)
        )

    def _is_low(self) -> bool:
        fraction = self._registers[Reg.RCTL] >> 8 & 3
        return self._ring.available <= self._ring.size >> (fraction + 1)


def _buffer_bytes(control: int) -> int:
    code = control >> 16 & 3
    if control & ReceiveControl.SIZE_16 and code:
        return 32768 >> code
    return 2048 >> code
