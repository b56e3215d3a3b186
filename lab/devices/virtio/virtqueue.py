"""A split virtqueue from the device's side.

Owns the walk over descriptors, the position in both rings, which requests were taken and not
completed, and the two rules for when to notify. Does not own what a request means.

Everything in guest memory is untrusted: an index, address or length is checked before it is used
and each is read once. What breaks the rules of a ring raises `RingError`; nothing is guessed.

A queue begins at the used ring's index: a driver that has just set a queue up has zeroed it, and
when a device takes over a ring in use, by a replay of registers, it is where the device before it
stopped. Nothing in memory is touched before the first `take`.

Writes to a ring reach memory in program order on x86; the locked operation in `_fence` keeps a
later read behind them.

Source: virtio 1.2, section 2.7 (split virtqueues).
"""

import struct
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from lab.devices.errors import StateStreamError
from lab.devices.memory import GuestMemory, Segment
from sync.vfio_user.protocol import DmaFlags

MAX_INDIRECT_DESCRIPTORS = 1024
"""Longest indirect table. Linux builds one for each request, of its segments and two more."""

MAX_CHAIN_BYTES = 1 << 32
"""The specification's limit for the sum of a chain's lengths."""

_DESCRIPTOR = struct.Struct("<QIHH")
_USED_ELEMENT = struct.Struct("<II")
_STATE = struct.Struct("<HHBBQQQHHH")

_MAX_TABLE_BYTES = MAX_INDIRECT_DESCRIPTORS * _DESCRIPTOR.size

_NEXT = 1
_WRITE = 2
_INDIRECT = 4
_NO_INTERRUPT = 1

_RING_START = 4
_INDEX = 2


class RingError(Exception):
    """The driver broke the rules of a virtqueue: the device needs a reset."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A request: what the device reads, then what it writes. `head` names it in the used ring."""

    head: int
    readable: list[Segment]
    writable: list[Segment]


class Virtqueue:
    """A queue of up to `max_size` descriptors.

    `take`, `has_more`, `complete` and `put_back` are for any thread. The registers and all other
    methods are for an owner who knows that nobody is in those.
    """

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self._lock = threading.Lock()
        self._fence_lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Back to what a driver finds after a reset of the device."""
        self.size = self.max_size
        self.vector = 0xFFFF
        self.enabled = False
        self.descriptors = 0
        """Address of the descriptor table."""
        self.driver_area = 0
        """Address of the available ring."""
        self.device_area = 0
        """Address of the used ring."""
        self.notified = False
        """Whether the driver notified the queue since it enabled it."""
        self.indirect = False
        self.event_index = False
        self._begun = False
        self._next = 0
        self._seen = 0
        self._used = 0
        self._taken: dict[int, None] = {}
        self._again: deque[int] = deque()

    def take(self, memory: GuestMemory) -> Chain | None:
        """The next request, None if there is none.

        Raises `RingError`, `MemoryFault` or `MemoryAbsent`; nothing is taken then.
        """
        with self._lock:
            if not self._begun:
                self._begin(memory)
            if self._again:
                chain = self._walk(memory, self._again[0])
                self._again.popleft()
            elif self._is_available(memory):
                slot = self._next % self.size
                head = memory.read_u16(self.driver_area + _RING_START + 2 * slot)
                if head in self._taken or head in self._again:
                    raise RingError(f"descriptor {head} is in use")
                chain = self._walk(memory, head)
                self._next = (self._next + 1) & 0xFFFF
            else:
                return None
            self._taken[chain.head] = None
            return chain

    def has_more(self, memory: GuestMemory) -> bool:
        """Whether `take` would find something; if not, the driver will notify. Raises as `take`."""
        with self._lock:
            return bool(self._again) or self._is_available(memory)

    def complete(self, memory: GuestMemory, head: int, written: int) -> bool:
        """Give a request back with the number of bytes written. Returns whether to interrupt.

        Raises `MemoryFault` or `MemoryAbsent`; the request is not completed then.
        """
        with self._lock:
            used = self._used
            element = self.device_area + _RING_START + _USED_ELEMENT.size * (used % self.size)
            memory.write(element, _USED_ELEMENT.pack(head, written))
            memory.write_u16(self.device_area + _INDEX, (used + 1) & 0xFFFF)
            self._used = (used + 1) & 0xFFFF
            self._taken.pop(head, None)
            self._fence()
            if self.event_index:
                wanted = self.driver_area + _RING_START + 2 * self.size
                return memory.read_u16(wanted) == used
            return not memory.read_u16(self.driver_area) & _NO_INTERRUPT

    def put_back(self, head: int) -> None:
        """A request that was taken could not be done now: it is the next to be taken."""
        with self._lock:
            del self._taken[head]
            self._again.append(head)

    def save(self) -> bytes:
        """Registers and positions, for `load` of a queue of the same `max_size`."""
        heads = [*self._again, *self._taken]
        fixed = _STATE.pack(
            self.size,
            self.vector,
            self.enabled | self.notified << 1,
            self._begun,
            self.descriptors,
            self.driver_area,
            self.device_area,
            self._next,
            self._used,
            len(heads),
        )
        return fixed + struct.pack(f"<{len(heads)}H", *heads)

    def load(self, state: bytes, n_vectors: int) -> None:
        """Take over what `save` returned. Raises `StateStreamError`, and is unchanged then."""
        if len(state) < _STATE.size:
            raise StateStreamError("the state of a queue is truncated")
        size, vector, flags, begun, *addresses, next_, used, n_heads = _STATE.unpack_from(state)
        if len(state) != _STATE.size + 2 * n_heads:
            raise StateStreamError(f"{n_heads} requests in {len(state)} bytes")
        heads = struct.unpack_from(f"<{n_heads}H", state, _STATE.size)
        if not self.is_valid_size(size) or not (vector < n_vectors or vector == 0xFFFF):
            raise StateStreamError(f"no queue of {size} descriptors with vector {vector}")
        if len(set(heads)) != n_heads or any(head >= size for head in heads):
            raise StateStreamError("requests that the queue cannot have")
        if flags & ~3 or begun > 1 or (n_heads and not begun):
            raise StateStreamError("a queue in an impossible state")
        self.reset()
        self.size, self.vector = size, vector
        self.enabled, self.notified = bool(flags & 1), bool(flags & 2)
        self.descriptors, self.driver_area, self.device_area = addresses
        self._begun = bool(begun)
        self._next = self._seen = next_
        self._used = used
        self._again.extend(heads)

    def is_valid_size(self, size: int) -> bool:
        """Whether a driver may choose `size`: a power of two, not above `max_size`."""
        return 0 < size <= self.max_size and not size & (size - 1)

    def _begin(self, memory: GuestMemory) -> None:
        if self.descriptors % 16 or self.driver_area % 2 or self.device_area % 4:
            raise RingError("a ring is not aligned")
        self._used = memory.read_u16(self.device_area + _INDEX)
        self._next = self._seen = self._used
        self._begun = True

    def _is_available(self, memory: GuestMemory) -> bool:
        if self._seen != self._next or self._look(memory):
            return True
        if not self.event_index:
            return False
        # Ask for a notification, then look again: the driver may have missed the request.
        wanted = self.device_area + _RING_START + _USED_ELEMENT.size * self.size
        memory.write_u16(wanted, self._next)
        self._fence()
        return self._look(memory)

    def _look(self, memory: GuestMemory) -> bool:
        seen = memory.read_u16(self.driver_area + _INDEX)
        if (seen - self._next) & 0xFFFF > self.size:
            raise RingError(f"{seen} is no available index after {self._next}")
        self._seen = seen
        return seen != self._next

    def _walk(self, memory: GuestMemory, head: int) -> Chain:
        chain = Chain(head, [], [])
        total_bytes = 0
        for address, length, flags in self._descriptors(memory, head):
            total_bytes += length
            if total_bytes > MAX_CHAIN_BYTES:
                raise RingError("a chain is longer than 4 GiB")
            if flags & _WRITE:
                chain.writable.extend(memory.segments(address, length, DmaFlags.WRITE))
            elif chain.writable:
                raise RingError("a readable descriptor behind a writable one")
            else:
                chain.readable.extend(memory.segments(address, length, DmaFlags.READ))
        return chain

    def _descriptors(self, memory: GuestMemory, head: int) -> Iterator[tuple[int, int, int]]:
        """(address, length, flags) of a chain: ordinary ones, the last of which may be a table."""
        table: bytes | None = None
        index, limit, steps = head, self.size, 0
        while True:
            if index >= limit or steps >= limit:
                raise RingError(f"descriptor {index} of {limit}, {steps} in a chain")
            steps += 1
            at = _DESCRIPTOR.size * index
            if table is None:
                raw = memory.read(self.descriptors + at, _DESCRIPTOR.size)
            else:
                raw = table[at : at + _DESCRIPTOR.size]
            address, length, flags, following = _DESCRIPTOR.unpack(raw)
            if flags & _INDIRECT:
                if table is not None or flags & _NEXT or not self.indirect:
                    raise RingError("an indirect descriptor where there can be none")
                if not length or length % _DESCRIPTOR.size or length > _MAX_TABLE_BYTES:
                    raise RingError(f"an indirect table of {length} bytes")
                table = memory.read(address, length)
                index, limit, steps = 0, length // _DESCRIPTOR.size, 0
                continue
            yield address, length, flags
            if not flags & _NEXT:
                return
            index = following

    def _fence(self) -> None:
        with self._fence_lock:
            pass
