"""The journal: register accesses of the guest in the order of their execution, in a bounded ring.

Owned here: the order, the numbers and the bound. An access whose outcome is still open holds back
the ones behind it, so that a record that can be taken is complete and in its place. When the ring
is full, what comes is dropped and the overflow kept in mind: the guest never waits (I10).
"""

from collections import deque

from sync.registers.record import RECORD_BYTES, STRUCT, VALUE_BYTES, Access, Flag, Op, pack_access

DEFAULT_RECORDS = 1 << 20
"""32 MiB: at 50,000 accesses a second, what 20 seconds without a reader leave behind."""

_WRITE = int(Op.WRITE)
_NONE, _FAILED = int(Flag.NONE), int(Flag.FAILED)
_pack = STRUCT.pack
_from_bytes = int.from_bytes


class Entry:
    """An access on its way. `data` is what is written, or what was read once it is `done`."""

    __slots__ = ("data", "done", "failed", "offset", "op", "region", "size")

    def __init__(self, op: int, region: int, offset: int, size: int, data: bytes) -> None:
        self.op = op
        self.region = region
        self.offset = offset
        self.size = size
        self.data = data
        self.done = False
        self.failed = False


class Journal:
    """`max_records` bounds what is kept for the reader; numbers count from 0 for its life."""

    def __init__(self, max_records: int = DEFAULT_RECORDS) -> None:
        self._max_bytes = max_records * RECORD_BYTES
        self._ring = bytearray()
        self._open: deque[Entry] = deque()
        self.next_seq = 0
        self.overflow = False

    @property
    def n_records(self) -> int:
        return len(self._ring) // RECORD_BYTES

    def restart(self) -> None:
        """Forgets everything but the numbers: the next record is the first of a new capture."""
        self._ring = bytearray()
        self._open.clear()
        self.overflow = False

    def begin(self, op: int, region: int, offset: int, size: int, data: bytes = b"") -> Entry:
        """An access goes to the device; `finish` tells what became of it."""
        entry = Entry(op, region, offset, size, data)
        self._open.append(entry)
        return entry

    def finish(self, entry: Entry, *, data: bytes | None = None, failed: bool = False) -> None:
        """The device has answered: with `data` to a read, or with an error."""
        entry.done = True
        entry.failed = failed
        if data is not None:
            entry.data = data
        waiting = self._open
        while waiting and waiting[0].done:
            done = waiting.popleft()
            self._append(done.op, done.region, done.offset, done.size, done.data, done.failed)

    def posted(self, region: int, offset: int, data: bytes) -> None:
        """A write that is never answered goes to the device."""
        if self._open:
            self.begin(_WRITE, region, offset, len(data), data).done = True
        else:
            self._append(_WRITE, region, offset, len(data), data, False)

    def take(self, max_records: int) -> bytes:
        """Takes the oldest records out, at most `max_records`."""
        end = max_records * RECORD_BYTES
        records = bytes(self._ring[:end])
        del self._ring[:end]
        return records

    def _append(
        self, op: int, region: int, offset: int, size: int, data: bytes, failed: bool
    ) -> None:
        if self.overflow:
            return
        ring = self._ring
        if 0 < size <= VALUE_BYTES and len(ring) < self._max_bytes:
            # Nearly every access is one record, and the guest waits while it is written.
            value = _from_bytes(data, "little")
            ring += _pack(
                self.next_seq, offset, value, region, size, op, _FAILED if failed else _NONE
            )
            self.next_seq += 1
            return
        records = pack_access(Access(Op(op), region, offset, size, data, failed), self.next_seq)
        if len(ring) + len(records) > self._max_bytes:
            self.overflow = True
            return
        self.next_seq += len(records) // RECORD_BYTES
        ring += records
