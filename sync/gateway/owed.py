"""What the guest is owed of registers that a read clears: it was read on its behalf.

Owned here: the bytes, and giving them out with the guest's next read of the same registers. A
cause of an interrupt that was pending when the guest was stopped is read at the source (a device
has no other way to tell) and owed at the target; should the source go on, it is owed there.
"""

from sync.gateway.errors import BadRequest

MAX_BYTES = 4096
"""Of all registers of a device that a read clears; they are few."""


class Owed:
    """Bytes by region and offset. Truth value: whether anything is owed."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[int, int], int] = {}

    def __bool__(self) -> bool:
        return bool(self._bytes)

    def add(self, region: int, offset: int, data: bytes) -> bytes:
        """From here on `data` is owed, too. Returns all that is owed of these registers. Raises
        `BadRequest` if it becomes too much."""
        if len(self._bytes) + len(data) > MAX_BYTES:
            raise BadRequest(f"more than {MAX_BYTES} bytes of registers that a read clears")
        for position, value in enumerate(data, offset):
            if value:
                key = (region, position)
                self._bytes[key] = self._bytes.get(key, 0) | value
        return bytes(self._bytes.get((region, offset + at), 0) for at in range(len(data)))

    def pay(self, region: int, offset: int, data: memoryview) -> None:
        """Adds to `data`, just read from the device for the guest, what is owed of it."""
        for key in [key for key in self._bytes if key[0] == region]:
            position = key[1] - offset
            if 0 <= position < len(data):
                data[position] |= self._bytes.pop(key)

    def clear(self) -> None:
        self._bytes.clear()
