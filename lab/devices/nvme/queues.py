"""Entries and rings of an NVMe controller, as it sees them.

Owns the form of entries, the position in each ring and the reading of data pointers (PRP). Does not
own what a command means. Sources: NVM Express Base Specification 1.4, sections 4.2, 4.3 and 4.6.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lab.devices.memory import GuestMemory, MemoryFault

SQE_BYTES = 64
CQE_BYTES = 16
PAGE_BYTES = 4096
_ENTRY = struct.Struct("<BBHI8xQQQ6I")
_COMPLETION = struct.Struct("<I4xHHHH")


class Status:
    """Status codes with their type in the bits above the lowest eight."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    INVALID_NAMESPACE = 0x00B
    OUT_OF_RANGE = 0x080
    CQ_INVALID = 0x100
    QUEUE_ID_INVALID = 0x101
    QUEUE_SIZE_INVALID = 0x102
    TOO_MANY_EVENTS = 0x105
    VECTOR_INVALID = 0x108
    QUEUE_IN_USE = 0x10C


@dataclass(frozen=True, slots=True)
class Entry:
    """A submission queue entry."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    mptr: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int

    @classmethod
    def unpack(cls, data: bytes) -> "Entry":
        return cls(*_ENTRY.unpack(data))


@dataclass(slots=True)
class SubmissionRing:
    """What the driver submits: `head` is ours, `tail` its doorbell."""

    id: int
    base: int
    size: int
    cq: int
    head: int = 0
    tail: int = 0

    def take(self, memory: GuestMemory) -> Entry:
        """The next entry. Raises `MemoryFault` or `MemoryAbsent`; nothing is taken then."""
        entry = Entry.unpack(memory.read(self.base + SQE_BYTES * self.head, SQE_BYTES))
        self.head = (self.head + 1) % self.size
        return entry

    def put_back(self) -> None:
        """The entry that was taken last could not be done now."""
        self.head = (self.head - 1) % self.size


@dataclass(slots=True)
class CompletionRing:
    """What we complete: `tail` is ours, `head` the driver's doorbell."""

    id: int
    base: int
    size: int
    vector: int
    interrupts: bool
    tail: int = 0
    head: int = 0
    phase: int = 1

    @property
    def is_full(self) -> bool:
        return (self.tail + 1) % self.size == self.head

    def post(
        self, memory: GuestMemory, ring: SubmissionRing, cid: int, result: int, status: int
    ) -> None:
        """Write an entry. Raises `MemoryFault` or `MemoryAbsent`; nothing is posted then."""
        more = 0x8000 if status else 0
        data = _COMPLETION.pack(result, ring.head, ring.id, cid, more | status << 1 | self.phase)
        at = self.base + CQE_BYTES * self.tail
        # The phase last: it tells a driver that polls that the rest is there.
        memory.write(at, data[:14])
        memory.write_u16(at + 14, int.from_bytes(data[14:], "little"))
        self.tail += 1
        if self.tail == self.size:
            self.tail, self.phase = 0, 1 - self.phase


def data_ranges(entry: Entry, length: int, memory: GuestMemory) -> Iterator[tuple[int, int]]:
    """Address and length of the parts of a transfer. Raises `MemoryFault` or `MemoryAbsent`."""
    if entry.flags >> 6:
        raise MemoryFault("a scatter-gather list, which is not offered")
    first = min(length, PAGE_BYTES - entry.prp1 % PAGE_BYTES)
    yield entry.prp1, first
    left = length - first
    if 0 < left <= PAGE_BYTES:
        yield entry.prp2, left
        return
    at = entry.prp2
    while left:
        room = (PAGE_BYTES - at % PAGE_BYTES) // 8
        needed = -(-left // PAGE_BYTES)
        count = needed if needed <= room else room
        entries = struct.unpack(f"<{count}Q", memory.read(at, 8 * count))
        pages = entries if needed <= room else entries[:-1]
        if any(page % PAGE_BYTES for page in entries):
            raise MemoryFault("a list names what is no page")
        for page in pages:
            yield page, min(left, PAGE_BYTES)
            left -= min(left, PAGE_BYTES)
        at = entries[-1]
        if not pages and left:
            raise MemoryFault("a list that names no page")
