"""The transmitter of an 8254x: descriptors of the transmit ring become frames on the link.

Owns the walk over the ring. A packet is taken as a whole, with the context descriptors right in
front of it, or it is not taken at all: between two packets the head (TDH) says everything there is
to say, unless the driver goes on to use a context from before, which no register holds.

Nothing that stands in memory is trusted: a packet that cannot be read or makes no sense is given
back to the driver unsent.

Source: Software Developer's Manual, 3.3 (descriptors), 3.4 (ring).
"""

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntFlag

from lab.devices.e1000.cable import MAX_FRAME_BYTES
from lab.devices.e1000.offload import Context, OffloadError, finish, insert_vlan, segments
from lab.devices.e1000.offload import insert_checksum as insert_legacy_checksum
from lab.devices.e1000.registers import (
    DESCRIPTOR_BYTES,
    Cause,
    Control,
    Reg,
    RegisterFile,
    Ring,
    TransmitControl,
)
from lab.devices.e1000.statistics import CRC_BYTES, Statistics
from lab.devices.memory import GuestMemory, MemoryFault

logger = logging.getLogger(__name__)

MAX_PACKET_BYTES = 1 << 18
"""Linux hands over 64 KiB at most; the length of a packet has 20 bits."""
MIN_FRAME_BYTES = 60
_BATCH = 16
_READ_AHEAD = 32

_FIELDS = struct.Struct("<QIBBH")
_CONTEXT = struct.Struct("<BBHBBHIBBH")
_STATUS_AT = 12
_DONE = 1
_LENGTH_MASK = 0x000F_FFFF
_IP_CHECKSUM, _TRANSPORT_CHECKSUM = 1, 2


class _Command(IntFlag):
    """The command byte. What IC is in a legacy descriptor is TSE in the others."""

    END = 1 << 0
    INSERT_CRC = 1 << 1
    CHECKSUM_OR_SEGMENT = 1 << 2
    REPORT = 1 << 3
    EXTENDED = 1 << 5
    VLAN = 1 << 6


class _ContextCommand(IntFlag):
    TCP = 1 << 0
    IPV4 = 1 << 1


@dataclass(frozen=True, slots=True)
class _Descriptor:
    index: int
    address: int
    lower: int
    status: int
    options: int
    special: int
    raw: bytes

    @property
    def command(self) -> int:
        return self.lower >> 24

    @property
    def is_extended(self) -> bool:
        return bool(self.command & _Command.EXTENDED)

    @property
    def is_context(self) -> bool:
        return self.is_extended and not self.lower >> 20 & 0xF

    @property
    def length(self) -> int:
        return self.lower & (_LENGTH_MASK if self.is_extended else 0xFFFF)


@dataclass(slots=True)
class _Packet:
    """Descriptors that are done together."""

    context: Context
    descriptors: list[_Descriptor] = field(default_factory=list)
    data: list[_Descriptor] = field(default_factory=list)


class Transmitter:
    """`send` puts a frame on the link; `raise_cause` sets interrupt causes.

    For one thread at a time; `reset` when none is in `step`.
    """

    def __init__(
        self,
        registers: RegisterFile,
        memory: GuestMemory,
        statistics: Statistics,
        send: Callable[[bytes], None],
        raise_cause: Callable[[Cause], None],
    ) -> None:
        self._registers = registers
        self._memory = memory
        self._statistics = statistics
        self._send = send
        self._raise = raise_cause
        self._ring = Ring(registers, Reg.TDBAL)
        self._context = Context()

    def reset(self) -> None:
        self._context = Context()

    def step(self) -> bool:
        """Send some packets; whether there are more. Raises `MemoryAbsent`, and `MemoryFault` if
        the ring itself cannot be used."""
        causes = Cause(0)
        try:
            for _ in range(_BATCH):
                if not self._registers[Reg.TCTL] & TransmitControl.ENABLE:
                    return False
                packet = self._take()
                if packet is None:
                    return False
                self._transmit(packet)
                if self._give_back(packet):
                    causes |= Cause.TX_WRITTEN_BACK
                if not self._ring.available:
                    causes |= Cause.TX_QUEUE_EMPTY
                    return False
            return True
        finally:
            if causes:
                self._raise(causes)

    def _take(self) -> _Packet | None:
        """The next packet; None if it is not complete yet."""
        available, size, head = self._ring.available, self._ring.size, self._ring.head
        packet = _Packet(self._context)
        done = 0
        while done < available:
            at = (head + done) % size
            count = min(available - done, size - at, _READ_AHEAD)
            raw = self._memory.read(
                self._ring.base + DESCRIPTOR_BYTES * at, DESCRIPTOR_BYTES * count
            )
            for number in range(count):
                descriptor = _parse(raw, number, at + number)
                packet.descriptors.append(descriptor)
                if descriptor.is_context:
                    packet.context = _parse_context(descriptor.raw)
                    continue
                packet.data.append(descriptor)
                if descriptor.command & _Command.END:
                    return packet
            done += count
        if available and available == size - 1:
            # The driver cannot add to it any more: it will never be complete.
            return packet
        if not packet.data and any(each.command & _Command.REPORT for each in packet.descriptors):
            return packet
        return None

    def _transmit(self, packet: _Packet) -> None:
        if not packet.data or not packet.data[-1].command & _Command.END:
            return
        try:
            if sum(each.length for each in packet.data) > MAX_PACKET_BYTES:
                raise OffloadError("a packet that is too long")
            content = b"".join(self._memory.read(each.address, each.length) for each in packet.data)
            frames = self._frames(content, packet)
        except (OffloadError, MemoryFault) as error:
            logger.debug("a packet is not sent: %s", error)
            return
        for frame in frames:
            if len(frame) < 14 or len(frame) > MAX_FRAME_BYTES:
                logger.debug("a frame of %d bytes is not sent", len(frame))
                continue
            if self._registers[Reg.TCTL] & TransmitControl.PAD:
                frame = frame.ljust(MIN_FRAME_BYTES, b"\0")
            self._statistics.transmitted(frame)
            self._send(frame)

    def _frames(self, content: bytes, packet: _Packet) -> list[bytes]:
        first, last = packet.data[0], packet.data[-1]
        if not last.command & _Command.INSERT_CRC:
            content = content[:-CRC_BYTES]
        if first.is_extended:
            frames = self._offload(content, packet.context, first)
        else:
            frame = bytearray(content)
            if last.command & _Command.CHECKSUM_OR_SEGMENT:
                # In a legacy descriptor, these fields are CSS and CSO.
                insert_legacy_checksum(frame, last.options, last.lower >> 16 & 0xFF, 0)
            frames = [frame]
        if last.command & _Command.VLAN and self._registers[Reg.CTRL] & Control.VLAN_MODE:
            ethertype = self._registers[Reg.VET]
            return [insert_vlan(frame, ethertype, last.special) for frame in frames]
        return [bytes(frame) for frame in frames]

    def _offload(self, content: bytes, context: Context, first: _Descriptor) -> list[bytearray]:
        if first.command & _Command.CHECKSUM_OR_SEGMENT:
            frames = segments(content, context)
            self._statistics.segmented()
        else:
            frames = [bytearray(content)]
        for frame in frames:
            finish(
                frame,
                context,
                ip_checksum=bool(first.options & _IP_CHECKSUM),
                transport_checksum=bool(first.options & _TRANSPORT_CHECKSUM),
            )
        return frames

    def _give_back(self, packet: _Packet) -> bool:
        """Whether the driver wanted to be told."""
        told = False
        for descriptor in packet.descriptors:
            if descriptor.command & _Command.REPORT:
                told = True
                at = self._ring.base + DESCRIPTOR_BYTES * descriptor.index + _STATUS_AT
                self._memory.write(at, bytes([descriptor.status | _DONE]))
        self._context = packet.context
        self._ring.advance((packet.descriptors[-1].index + 1) % self._ring.size)
        return told


def _parse(raw: bytes, number: int, index: int) -> _Descriptor:
    at = DESCRIPTOR_BYTES * number
    address, lower, status, options, special = _FIELDS.unpack_from(raw, at)
    own = raw[at : at + DESCRIPTOR_BYTES]
    return _Descriptor(index, address, lower, status, options, special, own)


def _parse_context(raw: bytes) -> Context:
    (ip_start, ip_at, ip_end, start, at, end, lower, _, header_bytes, segment_bytes) = (
        _CONTEXT.unpack(raw)
    )
    command = lower >> 24
    return Context(
        ip_start,
        ip_at,
        ip_end,
        start,
        at,
        end,
        header_bytes,
        segment_bytes,
        ipv4=bool(command & _ContextCommand.IPV4),
        tcp=bool(command & _ContextCommand.TCP),
    )
