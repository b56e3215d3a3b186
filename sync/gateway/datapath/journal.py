"""The journal: register accesses of the guest in the order of their execution, in a bounded ring.

Owned here: the order, the numbers and the bound. An access has its place and its numbers in the
ring from its beginning, and they count for the bound; one whose outcome is still open holds back
the ones behind it, so that a record that can be taken is complete. When the ring is full, what
comes is dropped and the overflow kept in mind: the guest never waits (I10).
"""

from collections import deque

from sync.registers.record import RECORD_BYTES, STRUCT, VALUE_BYTES, Access, Flag, Op, pack_access

DEFAULT_RECORDS = 1 << 20
"""32 MiB: at 50,000 accesses a second, what 20 seconds without a reader leave behind."""

_WRITE = int(Op.WRITE)
_NONE = int(Flag.NONE)
_pack, _pack_into = STRUCT.pack, STRUCT.pack_into
_from_bytes = int.from_bytes


class Entry:
    """An access on its way; `seq` is the number of its first record, -1 if there is none."""

    __slots__ = ("done", "offset", "op", "region", "seq", "size")

    def __init__(self, op: int, region: int, offset: int, size: int, seq: int) -> None:
        self.op = op
        self.region = region
        self.offset = offset
        self.size = size
        self.seq = seq
        self.done = False


class Journal:
    """`max_records` bounds what is kept for the reader; numbers count from 0 for its life."""

    def __init__(self, max_records: int = DEFAULT_RECORDS) -> None:
        self._max_bytes = max_records * RECORD_BYTES
        self._ring = bytearray()
        self._first_seq = 0
        """The number of the first record in the ring."""
        self._open: deque[Entry] = deque()
        self.next_seq = 0
        self.overflow = False

    @property
    def n_records(self) -> int:
        return len(self._ring) // RECORD_BYTES

    def restart(self) -> None:
        """Forgets everything but the numbers: the next record is the first of a new capture."""
        self._ring = bytearray()
        self._first_seq = self.next_seq
        self._open.clear()
        self.overflow = False

    def begin(self, op: int, region: int, offset: int, size: int, data: bytes = b"") -> Entry:
        """An access goes to the device, a write with its `data`; `finish` tells what became of
        it."""
        entry = Entry(op, region, offset, size, self.next_seq)
        if self._append(op, region, offset, size, data):
            self._open.append(entry)
        else:
            entry.seq = -1
        return entry

    def finish(self, entry: Entry, *, data: bytes | None = None, failed: bool = False) -> None:
        """The device has answered: with `data` to a read, or with an error."""
        seq, size = entry.seq, entry.size
        if seq < self._first_seq:
            # It was dropped, or belongs to an earlier capture.
            return
        entry.done = True
        if data is not None and 0 < size <= VALUE_BYTES:
            position = (seq - self._first_seq) * RECORD_BYTES
            value = _from_bytes(data, "little")
            _pack_into(
                self._ring, position, seq, entry.offset, value, entry.region, size, entry.op, _NONE
            )
        elif data is not None or failed:
            self._complete(entry, data, failed)
        waiting = self._open
        while waiting and waiting[0].done:
            waiting.popleft()

    def posted(self, region: int, offset: int, data: bytes) -> None:
        """A write that is never answered goes to the device."""
        self._append(_WRITE, region, offset, len(data), data)

    def take(self, max_records: int) -> bytes:
        """Takes the oldest complete records out, at most `max_records`."""
        if self._open:
            max_records = min(max_records, self._open[0].seq - self._first_seq)
        end = max_records * RECORD_BYTES
        records = bytes(self._ring[:end])
        del self._ring[:end]
        self._first_seq += len(records) // RECORD_BYTES
        return records

    def _append(self, op: int, region: int, offset: int, size: int, data: bytes) -> bool:
        """Whether there was room for it."""
        if self.overflow:
            return False
        ring = self._ring
        if 0 < size <= VALUE_BYTES and len(ring) < self._max_bytes:
            # Nearly every access is one record, and the guest waits while it is written.
            value = _from_bytes(data, "little")
            ring += _pack(self.next_seq, offset, value, region, size, op, _NONE)
            self.next_seq += 1
            return True
        if len(ring) + max(-(-size // VALUE_BYTES), 1) * RECORD_BYTES > self._max_bytes:
            self.overflow = True
            return False
        records = pack_access(Access(Op(op), region, offset, size, data), self.next_seq)
        self.next_seq += len(records) // RECORD_BYTES
        ring += records
        return True

    def _complete(self, entry: Entry, data: bytes | None, failed: bool) -> None:
        """Writes what was read, or that the device refused, into the records of an access."""
        start = (entry.seq - self._first_seq) * RECORD_BYTES
        size = max(-(-entry.size // VALUE_BYTES), 1) * RECORD_BYTES
        if data is None:
            rows = STRUCT.iter_unpack(self._ring[start : start + size])
            data = b"".join(row[2].to_bytes(VALUE_BYTES, "little") for row in rows)
        access = Access(Op(entry.op), entry.region, entry.offset, entry.size, data, failed)
        self._ring[start : start + size] = pack_access(access, entry.seq)
