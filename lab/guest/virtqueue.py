"""The driver's side of a split virtqueue in guest RAM.

Source: virtio 1.2, section 2.7. Descriptors are not allocated here: each request slot owns three
of them for good, so that the head of its chain is its number times three. Notifications are
always wanted; the event index is not used.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

from lab.guest.errors import GuestPanic
from lab.guest.options import DESCRIPTORS_PER_REQUEST
from lab.guest.ram import Ram

DESCRIPTOR = struct.Struct("<QIHH")
INDEX = struct.Struct("<H")
USED_ENTRY = struct.Struct("<II")
FLAG_NEXT = 1
FLAG_WRITE = 2
FLAG_INDIRECT = 4
USED_ALIGN = 4096
_INDEX_MASK = 0xFFFF


class Segment(NamedTuple):
    """A piece of a request: `length` bytes at `address`; the device writes it or reads it."""

    address: int
    length: int
    device_writes: bool


@dataclass(frozen=True, slots=True)
class QueueAddresses:
    """Where the three parts of a queue are in guest memory."""

    descriptors: int
    driver: int
    device: int


def queue_bytes(size: int) -> int:
    """How much RAM a queue of `size` descriptors takes."""
    return _device_offset(size) + 6 + USED_ENTRY.size * size


def _device_offset(size: int) -> int:
    end = DESCRIPTOR.size * size + 6 + INDEX.size * size
    return -(-end // USED_ALIGN) * USED_ALIGN


class SplitQueue:
    """A queue of `size` descriptors at `address`. Its indices are the driver's state."""

    def __init__(self, ram: Ram, address: int, size: int) -> None:
        self._ram = ram
        self.size = size
        self.addresses = QueueAddresses(
            address, address + DESCRIPTOR.size * size, address + _device_offset(size)
        )
        self.available_index = 0
        self.used_index = 0

    def clear(self) -> None:
        """The state before the device is told of the queue."""
        start = self.addresses.descriptors
        self._ram.write(start, bytes(queue_bytes(self.size)))
        self.available_index = self.used_index = 0

    def add(self, slot: int, segments: list[Segment], indirect_table: int | None) -> None:
        """Makes a request available. The device may look at it after the next `publish`.

        `indirect_table` is where to write a table for an indirect descriptor; None for a chain.
        """
        head = slot * DESCRIPTORS_PER_REQUEST
        if indirect_table is None:
            self._write_chain(self.addresses.descriptors, head, segments)
        else:
            self._write_chain(indirect_table, 0, segments)
            self._ram.store(
                self.addresses.descriptors + head * DESCRIPTOR.size,
                DESCRIPTOR,
                indirect_table,
                DESCRIPTOR.size * len(segments),
                FLAG_INDIRECT,
                0,
            )
        entry = self.available_index % self.size
        self._ram.store(self.addresses.driver + 4 + INDEX.size * entry, INDEX, head)
        self.available_index = (self.available_index + 1) & _INDEX_MASK

    def publish(self) -> None:
        """Lets the device see what was added. It still has to be notified."""
        self._ram.store(self.addresses.driver + 2, INDEX, self.available_index)

    def take_used(self) -> list[tuple[int, int]]:
        """(slot, bytes written) of each request that the device has finished since.

        Raises `GuestPanic` for a used ring that no device may write.
        """
        (device_index,) = self._ram.load(self.addresses.device + 2, INDEX)
        count = (device_index - self.used_index) & _INDEX_MASK
        if count > self.size:
            raise GuestPanic(f"the device used {count} buffers of a queue of {self.size}")
        used = []
        for _ in range(count):
            at = self.addresses.device + 4 + USED_ENTRY.size * (self.used_index % self.size)
            head, written = self._ram.load(at, USED_ENTRY)
            slot, rest = divmod(head, DESCRIPTORS_PER_REQUEST)
            if rest:
                raise GuestPanic(f"the device used descriptor {head}, which is no head")
            used.append((slot, written))
            self.used_index = (self.used_index + 1) & _INDEX_MASK
        return used

    def _write_chain(self, table: int, first: int, segments: list[Segment]) -> None:
        last = len(segments) - 1
        for position, segment in enumerate(segments):
            flags = FLAG_WRITE if segment.device_writes else 0
            if position < last:
                flags |= FLAG_NEXT
            index = first + position
            self._ram.store(
                table + DESCRIPTOR.size * index,
                DESCRIPTOR,
                segment.address,
                segment.length,
                flags,
                index + 1 if position < last else 0,
            )
