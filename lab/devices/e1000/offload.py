"""What an 8254x does to a packet on its way out: checksums, segmentation, VLAN tags.

Pure functions over bytes. A packet for which the driver asks something that makes no sense raises
`OffloadError`: it is dropped.

Source: Software Developer's Manual, 3.3.6 (context descriptor), 3.5 (segmentation), 3.6
(checksums).
"""

from dataclasses import dataclass

MAX_SEGMENTS = 4096
"""A packet of 64 KiB has 1366 segments if they are as small as TCP allows."""

_IPV6_HEADER_BYTES = 40
_TCP_FLAGS = 13
_FIN, _PUSH = 0x01, 0x08


class OffloadError(Exception):
    """The driver wants a header changed that is not in the packet."""


@dataclass(frozen=True, slots=True)
class Context:
    """A context descriptor. `*_start`, `*_at` and `*_end` are offsets in the packet, in bytes;
    `*_end` is that of the last byte, 0 for the end of the packet."""

    ip_start: int = 0
    ip_at: int = 0
    ip_end: int = 0
    transport_start: int = 0
    transport_at: int = 0
    transport_end: int = 0
    header_bytes: int = 0
    segment_bytes: int = 0
    ipv4: bool = False
    tcp: bool = False


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The one's complement sum of 16-bit words; a last odd byte is the upper half of one."""
    number = int.from_bytes(data, "big") << 8 * (len(data) % 2)
    # 2**16 is 1 modulo 2**16 - 1, so the sum of the digits is the number itself; but 0xffff, not
    # 0, stands for a multiple.
    return number % 0xFFFF or (0xFFFF if number else 0)


def insert_checksum(frame: bytearray, start: int, at: int, end: int, *, zero: int = 0) -> None:
    """Write the checksum of bytes `start` to `end` at `at`; `zero` is written for 0."""
    stop = min(end + 1, len(frame)) if end else len(frame)
    if start > stop:
        raise OffloadError("a checksum of bytes that are not in the packet")
    _put16(frame, at, 0xFFFF - ones_sum(memoryview(frame)[start:stop]) or zero)


def finish(
    frame: bytearray, context: Context, *, ip_checksum: bool, transport_checksum: bool
) -> None:
    """Insert the checksums that the driver wants."""
    if ip_checksum:
        insert_checksum(frame, context.ip_start, context.ip_at, context.ip_end)
    if transport_checksum:
        insert_checksum(
            frame,
            context.transport_start,
            context.transport_at,
            context.transport_end,
            # In UDP, 0 means that there is none.
            zero=0 if context.tcp else 0xFFFF,
        )


def segments(packet: bytes, context: Context) -> list[bytearray]:
    """The packet cut into frames with headers of their own, still without checksums."""
    header, payload = packet[: context.header_bytes], packet[context.header_bytes :]
    step = context.segment_bytes
    if not step or len(header) < context.header_bytes or len(payload) > step * MAX_SEGMENTS:
        raise OffloadError(f"{len(payload)} bytes in segments of {step}")
    frames = []
    for number, at in enumerate(range(0, max(len(payload), 1), step)):
        frame = bytearray(header + payload[at : at + step])
        _adapt(frame, context, number, last=at + step >= len(payload))
        frames.append(frame)
    return frames


def insert_vlan(frame: bytes | bytearray, ethertype: int, tag: int) -> bytes:
    """The frame with a VLAN tag behind its addresses."""
    return b"".join((frame[:12], ethertype.to_bytes(2, "big"), tag.to_bytes(2, "big"), frame[12:]))


def _adapt(frame: bytearray, context: Context, number: int, *, last: bool) -> None:
    ip, transport = context.ip_start, context.transport_start
    if context.ipv4:
        _put16(frame, ip + 2, len(frame) - ip)
        _put16(frame, ip + 4, _get16(frame, ip + 4) + number)
    else:
        _put16(frame, ip + 4, len(frame) - ip - _IPV6_HEADER_BYTES)
    length = len(frame) - transport
    if context.tcp:
        sequence = _get16(frame, transport + 4) << 16 | _get16(frame, transport + 6)
        sequence += number * context.segment_bytes
        _put16(frame, transport + 4, sequence >> 16)
        _put16(frame, transport + 6, sequence)
        if not last:
            flags = _get16(frame, transport + _TCP_FLAGS - 1)
            _put16(frame, transport + _TCP_FLAGS - 1, flags & ~(_FIN | _PUSH))
    else:
        _put16(frame, transport + 4, length)
    # The driver left the length out of the pseudo-header's sum, for it did not know it.
    pseudo = _get16(frame, context.transport_at) + length
    _put16(frame, context.transport_at, (pseudo & 0xFFFF) + (pseudo >> 16))


def _get16(frame: bytearray, at: int) -> int:
    if at + 2 > len(frame):
        raise OffloadError("a header that is not in the packet")
    return frame[at] << 8 | frame[at + 1]


def _put16(frame: bytearray, at: int, value: int) -> None:
    if at + 2 > len(frame):
        raise OffloadError("a header that is not in the packet")
    frame[at : at + 2] = (value & 0xFFFF).to_bytes(2, "big")
