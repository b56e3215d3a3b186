"""The driver's side of NVMe queues in guest RAM: rings, entries, where they lie.

Owns no register; which command means what is the driver's. Source: NVM Express Base Specification
1.4, sections 4.1 (rings), 4.2 (submission entries), 4.6 (completion entries).
"""

import struct
from typing import NamedTuple

from lab.guest.errors import GuestPanic
from lab.guest.fields import Fields
from lab.guest.options import GuestOptions
from lab.guest.ram import Ram
from sync.memory import PAGE_BYTES

SQE = struct.Struct("<BBHI16xQQ6I")
"""opcode, flags, command ID, namespace, PRP 1 and 2, CDW10 to CDW15."""
CQE = struct.Struct("<I4xHHHH")
"""DW0, SQ head, SQ number, command ID, status with the phase in its lowest bit."""
ADMIN_ENTRIES = 16


class Sizes(NamedTuple):
    """Entries of a submission and of a completion ring."""

    sq: int
    cq: int


class Completion(NamedTuple):
    """What the device says of a command."""

    command_id: int
    status: int
    """Status code and type; 0: well."""
    result: int


def queue_sizes(options: GuestOptions) -> tuple[Sizes, ...]:
    """The admin queue and two for I/O. All that is in flight fits into either of them; the second
    has room for hardly more, so that it wraps often, and rings that wrap at different times."""
    return (
        Sizes(ADMIN_ENTRIES, ADMIN_ENTRIES),
        Sizes(options.queue_size, options.queue_size),
        Sizes(options.queue_depth + 1, options.queue_depth + 2),
    )


def queues_bytes(options: GuestOptions) -> int:
    """How much RAM the rings take, and a page for what the device says of itself."""
    rings = (_pages(s.sq * SQE.size) + _pages(s.cq * CQE.size) for s in queue_sizes(options))
    return (sum(rings) + 1) * PAGE_BYTES


class QueuePair:
    """A submission and a completion ring at `address`. Its positions are the driver's state."""

    def __init__(self, ram: Ram, address: int, sizes: Sizes) -> None:
        self._ram = ram
        self.sizes = sizes
        self.sq_address = address
        self.cq_address = address + _pages(sizes.sq * SQE.size) * PAGE_BYTES
        self.end = self.cq_address + _pages(sizes.cq * CQE.size) * PAGE_BYTES
        self.sq_tail = self.cq_head = 0
        self._phase = 1

    def clear(self) -> None:
        """The state before the device is told of the rings."""
        self._ram.write(self.sq_address, bytes(self.end - self.sq_address))
        self.sq_tail = self.cq_head = 0
        self._phase = 1

    def add(
        self, opcode: int, command_id: int, namespace: int, prps: tuple[int, int], *cdws: int
    ) -> None:
        """One more entry; `cdws` are CDW10 and those that follow. The device has to be told."""
        at = self.sq_address + SQE.size * self.sq_tail
        filled = (*cdws, *(0,) * (6 - len(cdws)))
        self._ram.store(at, SQE, opcode, 0, command_id, namespace, *prps, *filled)
        self.sq_tail = (self.sq_tail + 1) % self.sizes.sq

    def take(self) -> list[Completion]:
        """What the device has completed since. Raises `GuestPanic` for more than there can be."""
        found: list[Completion] = []
        while True:
            at = self.cq_address + CQE.size * self.cq_head
            result, _, _, command_id, status = self._ram.load(at, CQE)
            if status & 1 != self._phase:
                return found
            if len(found) == self.sizes.cq:
                raise GuestPanic(f"the device has completed more than {self.sizes.cq} commands")
            found.append(Completion(command_id, status >> 1 & 0x7FF, result))
            self.cq_head += 1
            if self.cq_head == self.sizes.cq:
                self.cq_head, self._phase = 0, 1 - self._phase

    def state(self) -> dict[str, int]:
        """VM state that is not in RAM."""
        return {"sq_tail": self.sq_tail, "cq_head": self.cq_head, "phase": self._phase}

    def load_state(self, fields: Fields) -> None:
        """Raises `StreamError`."""
        self.sq_tail = fields.number("sq_tail", self.sizes.sq - 1)
        self.cq_head = fields.number("cq_head", self.sizes.cq - 1)
        self._phase = fields.number("phase", 1)


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_BYTES)
