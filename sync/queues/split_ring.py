"""What is under way in a split virtqueue, seen in guest memory alone (virtio 1.2, section 2.7).

Sans-IO. A device may complete requests in any order, and whoever comes after one that has died
begins where the used index stands. Which requests it still owes is not in the rings: each tells
only what was offered or used last. So they are followed: who looks before a ring has gone round
once sees every entry, and knows which heads were offered and not used. What was offered before the
first look is known as soon as all of it was used.

`offer_again` writes the heads that are owed into the slots of the available ring behind the used
index. The driver does not read them, and writes only slots that come later.
"""

import struct
from typing import Protocol

_U16 = struct.Struct("<H")
_HEAD_BYTES = 4
_USED_BYTES = 8
_INDEX_AT = 2


class RingMemory(Protocol):
    """Guest memory by the device's addresses. Raises what its owner raises."""

    def read(self, address: int, count: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


class SplitRing:
    """A queue of `size` descriptors with its rings at the addresses `available` and `used`. One
    that is `new` was just set up by its driver, and begins at 0."""

    def __init__(
        self, memory: RingMemory, available: int, used: int, size: int, *, new: bool = False
    ) -> None:
        self._memory = memory
        self._available = available
        self._used = used
        self.size = size
        self._next_offered = 0
        self._next_used = 0
        self._heads: dict[int, int] = {}
        """How often each head is under way, in the order of their offers."""
        self._unknown: int | None = 0 if new else None
        """How many are under way that nobody has seen to be offered; None before the first look."""

    @property
    def under_way(self) -> list[int] | None:
        """The heads that are owed, in the order of their offers; None if that is not known."""
        return list(self._heads) if self._unknown == 0 else None

    @property
    def busy(self) -> bool:
        """Whether the device owes anything, as of the last look."""
        return self._unknown != 0 or bool(self._heads)

    def look(self) -> None:
        """Sees what was offered and used since."""
        # In this order: what is seen to be used has been offered before.
        used_end = self._index(self._used)
        offered_end = self._index(self._available)
        n_offered = (offered_end - self._next_offered) & 0xFFFF
        n_used = (used_end - self._next_used) & 0xFFFF
        if self._unknown is None or max(n_offered, n_used) > self.size:
            self._begin(offered_end, used_end)
            return
        for head in self._entries(self._available, self._next_offered, n_offered, _U16.size):
            self._heads[head] = self._heads.pop(head, 0) + 1
        for head in self._entries(self._used, self._next_used, n_used, _USED_BYTES):
            times = self._heads.get(head, 0)
            if times > 1:
                self._heads[head] = times - 1
            elif times:
                del self._heads[head]
            else:
                self._unknown -= 1
        self._next_offered, self._next_used = offered_end, used_end
        if self._unknown < 0:
            self._begin(offered_end, used_end)

    def offer_again(self) -> bool:
        """Has the device that begins at the used index find what is owed; False if that is not
        known. Only for a time in which no device uses the queue."""
        self.look()
        heads = self.under_way
        if heads is None or len(heads) != (self._next_offered - self._next_used) & 0xFFFF:
            return False
        for place, head in enumerate(heads, self._next_used):
            slot = (place & 0xFFFF) % self.size
            address = self._available + _HEAD_BYTES + _U16.size * slot
            self._memory.write(address, _U16.pack(head))
        return True

    def _begin(self, offered_end: int, used_end: int) -> None:
        self._heads = {}
        self._next_offered, self._next_used = offered_end, used_end
        self._unknown = (offered_end - used_end) & 0xFFFF

    def _index(self, ring: int) -> int:
        index: int
        (index,) = _U16.unpack(self._memory.read(ring + _INDEX_AT, _U16.size))
        return index

    def _entries(self, ring: int, first: int, count: int, entry_bytes: int) -> list[int]:
        """The heads in `count` entries from number `first` on."""
        data = b""
        while count:
            slot = first % self.size
            n = min(count, self.size - slot)
            data += self._memory.read(ring + _HEAD_BYTES + entry_bytes * slot, entry_bytes * n)
            first, count = (first + n) & 0xFFFF, count - n
        return [_U16.unpack_from(data, at)[0] for at in range(0, len(data), entry_bytes)]
