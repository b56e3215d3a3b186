"""Registers that a read clears, read on the guest's behalf: it gets the values with its next read.

Owned here: the bytes, and giving them out with the guest's next read of the same registers. The
cause of an interrupt that was pending when the guest was stopped is read at the source (a device
has no other way to tell) and given to the guest at the target, or at the source should it go on
there. So is what a counter had come to.
"""

from collections.abc import Iterable

from sync.gateway.errors import BadRequest

MAX_BYTES = 4096
"""What is kept of one device at most: its registers that a read clears are few."""


class DeferredReads:
    """Bits by region and offset, and counters. True while the guest has anything to get."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[int, int], int] = {}
        self._counters: dict[tuple[int, int, int], int] = {}
        """By region, offset and size."""

    def __bool__(self) -> bool:
        return bool(self._bytes or self._counters)

    def add(self, region: int, offset: int, data: bytes, *, count: bool = False) -> bytes:
        """Keeps `data` for the guest, too: bits, or with `count` what one counter has come to.

        Returns all that is kept of these registers. Raises `BadRequest` if it becomes too much.
        """
        n_bytes = len(self._bytes) + sum(size for _, _, size in self._counters)
        if n_bytes + len(data) > MAX_BYTES:
            raise BadRequest(f"more than {MAX_BYTES} bytes of registers that a read clears")
        if count:
            counter = (region, offset, len(data))
            total = _sum(data, self._counters.get(counter, 0))
            if any(total):
                self._counters[counter] = int.from_bytes(total, "little")
            return total
        for position, value in enumerate(data, offset):
            if value:
                key = (region, position)
                self._bytes[key] = self._bytes.get(key, 0) | value
        return bytes(self._bytes.get((region, offset + at), 0) for at in range(len(data)))

    def deliver(self, region: int, offset: int, data: memoryview) -> None:
        """Adds what is kept of a register to `data`, which the guest has just read from the device;
        of a counter only if all of it was read."""
        end = offset + len(data)
        for counter in [key for key in self._counters if key[0] == region]:
            _, at, size = counter
            if offset <= at and at + size <= end:
                part = data[at - offset : at - offset + size]
                part[:] = _sum(bytes(part), self._counters.pop(counter))
        for key in [key for key in self._bytes if key[0] == region]:
            position = key[1] - offset
            if 0 <= position < len(data):
                data[position] |= self._bytes.pop(key)

    def plain(
        self,
    ) -> tuple[tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int, int], ...]]:
        """Region, offset and bits of each byte; region, offset, size and value of each counter."""
        bits = tuple((*key, value) for key, value in self._bytes.items())
        return bits, tuple((*key, value) for key, value in self._counters.items())

    def take(
        self, bits: Iterable[tuple[int, int, int]], counters: Iterable[tuple[int, int, int, int]]
    ) -> None:
        """What `plain` has given."""
        self._bytes = {(region, offset): value for region, offset, value in bits}
        self._counters = {(region, at, size): count for region, at, size, count in counters}

    def clear(self) -> None:
        self._bytes.clear()
        self._counters.clear()


def _sum(counter: bytes, more: int) -> bytes:
    """`counter` (little-endian) plus `more`, at most the highest value that its bytes can hold."""
    most = (1 << 8 * len(counter)) - 1
    return min(int.from_bytes(counter, "little") + more, most).to_bytes(len(counter), "little")
