"""Replaying the guest's captured register operations on the target device.

Owns what becomes of each operation (by its register's class, see `profile.model`), that each is
taken exactly once and in order (I4), what is held back, and the count of it all. Executes nothing:
records in, records to execute out, results in.

Whole batches are judged with numpy. An operation goes through `_Careful` one by one only where
its meaning depends on its value or on more than one register: the write that resets the device,
resets, accesses of more than 8 bytes, and accesses that do not lie within a single register.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sync.registers.errors import PayloadError, RefusedAccess, RegisterError, SequenceError
from sync.registers.profile.classifier import STRADDLES, UNLISTED, Classifier
from sync.registers.profile.layout import Layout, Place
from sync.registers.profile.model import RegisterClass, Unlisted
from sync.registers.record import (
    NUMPY_FIELDS,
    RECORD_BYTES,
    VALUE_BYTES,
    Access,
    Flag,
    Op,
    pack_access,
    unpack_accesses,
)
from sync.registers.snapshot import Values, held_bits, kicks

DTYPE = np.dtype(NUMPY_FIELDS)
MAX_HELD = 1 << 16
"""Different doorbells that are remembered; a device with more has none that it needs."""
# numpy takes plain numbers, not enumerations.
_READ, _WRITE, _RESET = int(Op.READ), int(Op.WRITE), int(Op.RESET)
_MORE, _FAILED = int(Flag.MORE), int(Flag.FAILED)

Records = NDArray[Any]
"""`DTYPE`, one element for each record."""


class _Fate(IntEnum):
    DROP = 0
    EXECUTE = 1
    HOLD = 2
    CAREFUL = 3
    REFUSE = 4


_WRITE_FATE = {
    RegisterClass.SNAPSHOT: _Fate.EXECUTE,
    RegisterClass.REPLAY: _Fate.EXECUTE,
    RegisterClass.HOLD: _Fate.HOLD,
    RegisterClass.READ_TO_CLEAR: _Fate.EXECUTE,
    RegisterClass.WRITE_ONE_TO_CLEAR: _Fate.EXECUTE,
    RegisterClass.CONSTANT: _Fate.DROP,
    RegisterClass.IGNORE: _Fate.DROP,
    RegisterClass.REFUSE: _Fate.REFUSE,
}
_UNLISTED_FATE = {
    Unlisted.REPLAY: _Fate.EXECUTE,
    Unlisted.IGNORE: _Fate.DROP,
    Unlisted.REFUSE: _Fate.REFUSE,
}


@dataclass(slots=True)
class ReplayStatistics:
    """Counts of accesses since the snapshot."""

    captured: int = 0
    """What the guest did on the source."""
    replayed: int = 0
    """Writes and resets executed on the target."""
    read_backs: int = 0
    """Reads executed on the target."""
    held: int = 0
    """Kept back until the target owns the guest; of those to one register only the last counts."""
    ignored: int = 0
    """Everything else: reads without effect, registers that the profile ignores."""
    divergences: dict[str, int] = field(default_factory=dict)
    """By register: accesses that ended otherwise than on the source (another value, or one of
    the two failed)."""


class Replay(NamedTuple):
    """A batch to execute on the target: `records`, as they go to the gateway."""

    records: bytes
    captured: Records
    """The same operations as they were on the source."""
    places: NDArray[np.int32]


class Replayer:
    """`next_seq` is where the journal begins."""

    def __init__(self, layout: Layout, next_seq: int) -> None:
        self._layout = layout
        self._classifier = Classifier(layout)
        self._careful = _Careful(layout)
        self._held: dict[tuple[int, int], tuple[int, Access]] = {}
        self.next_seq = next_seq
        self.statistics = ReplayStatistics()
        self._write_fates, self._read_fates = _fates(layout)
        self._hold_bits = np.array(
            [place.register.hold_bits for place in layout.places] + [0, 0], np.uint64
        )
        self._offsets = np.array([place.offset for place in layout.places] + [0, 0], np.uint64)

    def feed(self, records: bytes) -> Replay:
        """Take the next part of the journal, and return what to execute of it now.

        Raises `SequenceError` if it is not the next part, `PayloadError` if it is malformed or
        touches what the device does not have, `RefusedAccess` if the profile refuses it. The
        replayer is of no further use then.
        """
        batch = self._checked(records)
        places = self._classifier.classify(batch)
        write = batch["op"] == _WRITE
        fates = np.where(write, self._write_fates[places], self._read_fates[places])
        fates[(places == STRADDLES) | (batch["op"] == _RESET)] = _Fate.CAREFUL
        more = (batch["flags"] & _MORE) != 0
        continued = np.concatenate(([False], more[:-1]))[: len(batch)]
        fates[more | continued] = _Fate.CAREFUL
        refused = np.flatnonzero(fates == _Fate.REFUSE)
        if refused.size:
            (access,) = unpack_accesses(batch[refused[0] : refused[0] + 1].tobytes())
            raise RefusedAccess(_refusal(self._layout, access))

        request = batch.copy()
        request["flags"] &= _MORE
        execute = fates == _Fate.EXECUTE
        request["value"] &= ~np.where(execute & write, self._held_bits(batch, places), 0)
        self._hold(batch, fates == _Fate.HOLD)
        self._go_carefully(batch, request, np.flatnonzero(fates == _Fate.CAREFUL), execute)
        self._drop_void()

        self.next_seq += len(batch)
        first = ~continued
        counts = self.statistics
        counts.captured += int(np.count_nonzero(first))
        counts.replayed += int(np.count_nonzero(first & execute & (batch["op"] != _READ)))
        counts.read_backs += int(np.count_nonzero(first & execute & (batch["op"] == _READ)))
        counts.ignored += int(np.count_nonzero(first & (fates == _Fate.DROP)))
        request["value"][request["op"] == _READ] = 0
        return Replay(request[execute].tobytes(), batch[execute], places[execute])

    def executed(self, replay: Replay, results: bytes) -> None:
        """Compare the outcome on the target with that on the source, and count the differences."""
        if len(results) != len(replay.records):
            raise RegisterError("the gateway did not execute the whole batch")
        done = np.frombuffer(results, DTYPE)
        captured, places = replay.captured, replay.places
        held = self._held_bits(captured, places)
        for row in np.flatnonzero(places == STRADDLES):
            held[row] = self._hold_bits_in(captured[row])
        other = (captured["op"] == _READ) & (((done["value"] ^ captured["value"]) & ~held) != 0)
        failed = (done["flags"] ^ captured["flags"]) & _FAILED
        for row in np.flatnonzero(other | (failed != 0)):
            place = int(places[row])
            name = self._layout.places[place].name if place >= 0 else _address(captured[row])
            tally = self.statistics.divergences
            if name in tally or len(tally) < MAX_HELD:
                tally[name] = tally.get(name, 0) + 1

    def _held_bits(self, records: Records, places: NDArray[np.int32]) -> NDArray[np.uint64]:
        """Of each record, the bits that are held back of the register that it lies in."""
        shift = np.minimum((records["offset"] - self._offsets[places]) * 8, 63)
        bits: NDArray[np.uint64] = self._hold_bits[places] >> shift
        return bits

    def _hold_bits_in(self, record: Any) -> int:
        """The bits of a record's value that are held back on the target."""
        offset, size = int(record["offset"]), int(record["size"])
        bits = 0
        for place in self._layout.touched(int(record["region"]), offset, size):
            shift = 8 * (place.offset - offset)
            held = place.register.hold_bits
            bits |= held << shift if shift >= 0 else held >> -shift
        return bits & ((1 << 64) - 1)

    def start(self, final: Values) -> list[Access]:
        """What to execute when the target owns the guest and the device may use its memory.

        `final` is what the source's registers held at the end. First the registers of which bits
        were held back, in the order of the profile; then the doorbells, the last one of each, in
        the order in which the guest rang them; then those of all queues in use.
        """
        held = [access for _, access in sorted(self._held.values(), key=lambda each: each[0])]
        rung = {(access.region, access.offset) for access in held}
        more = [kick for kick in kicks(self._layout, final) if kick[1:3] not in rung]
        return [*held_bits(self._layout, final), *held, *more]

    def _checked(self, records: bytes) -> Records:
        if len(records) % RECORD_BYTES:
            raise PayloadError(f"{len(records)} bytes are no whole number of records")
        batch: Records = np.frombuffer(records, DTYPE)
        expected = np.arange(self.next_seq, self.next_seq + len(batch), dtype=np.uint64)
        wrong = np.flatnonzero(batch["seq"] != expected)
        if wrong.size:
            row = int(wrong[0])
            raise SequenceError(
                f"operation {int(expected[row])} of the journal was expected, "
                f"number {int(batch['seq'][row])} came"
            )
        reset = batch["op"] == _RESET
        more = (batch["flags"] & _MORE) != 0
        size = batch["size"]
        sound = np.where(reset, size == 0, (size >= 1) & (size <= VALUE_BYTES))
        sound &= batch["op"] <= _RESET
        sound &= reset | self._classifier.inside(batch)
        sound &= ~more | (~reset & (size == VALUE_BYTES))
        width = np.minimum(size, VALUE_BYTES - 1).astype(np.uint64) * 8
        sound &= (size >= VALUE_BYTES) | (batch["value"] >> width == 0)
        follows = np.zeros(len(batch), bool)
        follows[:-1] = (
            (batch["op"][1:] == batch["op"][:-1])
            & (batch["region"][1:] == batch["region"][:-1])
            & (batch["offset"][1:] == batch["offset"][:-1] + VALUE_BYTES)
        )
        sound &= ~more | follows
        wrong = np.flatnonzero(~sound)
        if wrong.size:
            row = int(wrong[0])
            raise PayloadError(f"operation {int(expected[row])} of the journal has no sense")
        return batch

    def _hold(self, batch: Records, hold: NDArray[np.bool_]) -> None:
        rows = np.flatnonzero(hold)
        self.statistics.held += len(rows)
        if not rows.size:
            return
        latest = rows[::-1]
        keys = (batch["region"][latest].astype(np.uint64) << np.uint64(48)) + batch["offset"][
            latest
        ]
        _, last = np.unique(keys, return_index=True)
        for row in latest[last]:
            (access,) = unpack_accesses(batch[row : row + 1].tobytes())
            self._hold_one(int(batch["seq"][row]), access)

    def _hold_one(self, seq: int, access: Access) -> None:
        key = (access.region, access.offset)
        if key not in self._held and len(self._held) >= MAX_HELD:
            raise PayloadError(f"more than {MAX_HELD} different doorbells were rung")
        before = self._held.get(key)
        if before is None or before[0] < seq:
            self._held[key] = (seq, access._replace(failed=False))

    def _go_carefully(
        self,
        batch: Records,
        request: Records,
        rows: NDArray[np.int64],
        execute: NDArray[np.bool_],
    ) -> None:
        for first, access in _joined(batch, rows):
            seq = int(batch["seq"][first])
            fate, altered = self._careful.judge(seq, access)
            last = first + max(1, -(-access.size // VALUE_BYTES))
            if fate is _Fate.HOLD:
                self.statistics.held += 1
                self._hold_one(seq, access)
            elif fate is _Fate.EXECUTE:
                execute[first:last] = True
                if access.op is Op.WRITE:
                    altered_records = np.frombuffer(pack_access(altered, seq), DTYPE)
                    request["value"][first:last] = altered_records["value"]
            else:
                self.statistics.ignored += 1

    def _drop_void(self) -> None:
        reset_seq = self._careful.reset_seq
        self._held = {key: held for key, held in self._held.items() if held[0] > reset_seq}


class _Careful:
    """Operations one by one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.reset_seq = -1
        """The last operation that reset the device: what was held before it is void."""

    def judge(self, seq: int, access: Access) -> tuple[_Fate, Access]:
        """What becomes of `access`, and the access as it is to be executed."""
        if access.op is Op.RESET:
            self.reset_seq = seq
            return _Fate.EXECUTE, access
        touched = self._layout.touched(access.region, access.offset, access.size)
        if access.op is Op.READ:
            reads = any(place.register.reads for place in touched)
            return (_Fate.EXECUTE if reads else _Fate.DROP), access
        fates = {_WRITE_FATE[place.register.kind] for place in touched}
        if not touched:
            fates = {_UNLISTED_FATE[self._layout.profile.unlisted]}
        # Only a part of it may be executed now, and the device may not take it in parts.
        if _Fate.REFUSE in fates or fates >= {_Fate.HOLD, _Fate.EXECUTE}:
            raise RefusedAccess(_refusal(self._layout, access))
        if _Fate.HOLD in fates:
            return _Fate.HOLD, access
        if _Fate.EXECUTE not in fates:
            return _Fate.DROP, access
        data = bytearray(access.data)
        for place in touched:
            if place.register.hold_bits:
                self._keep_back(place, access, data)
            if self._resets(place, access):
                self.reset_seq = seq
        return _Fate.EXECUTE, access._replace(data=bytes(data))

    @staticmethod
    def _keep_back(place: Place, access: Access, data: bytearray) -> None:
        bits = place.register.hold_bits.to_bytes(place.size, "little")
        for at in range(place.size):
            byte = place.offset + at - access.offset
            if 0 <= byte < access.size:
                data[byte] &= ~bits[at]

    def _resets(self, place: Place, access: Access) -> bool:
        reset = self._layout.profile.reset
        if reset is None or place.name != reset.register or access.failed:
            return False
        start = place.offset - access.offset
        if start < 0 or start + place.size > access.size:
            return False
        return int.from_bytes(access.data[start : start + place.size], "little") == reset.value


def _fates(layout: Layout) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """What becomes of writes and reads, by place; the last two stand for -2 and -1."""
    reset = layout.profile.reset
    writes: list[int] = []
    reads: list[int] = []
    for place in layout.places:
        careful = reset is not None and place.name == reset.register
        writes.append(_Fate.CAREFUL if careful else _WRITE_FATE[place.register.kind])
        reads.append(_Fate.EXECUTE if place.register.reads else _Fate.DROP)
    writes += [_Fate.CAREFUL, _UNLISTED_FATE[layout.profile.unlisted]]
    reads += [_Fate.CAREFUL, _Fate.DROP]
    return np.array(writes, np.int8), np.array(reads, np.int8)


assert (STRADDLES, UNLISTED) == (-2, -1)


def _joined(batch: Records, rows: NDArray[np.int64]) -> Iterator[tuple[int, Access]]:
    """The accesses in the given rows, with the row in which each begins."""
    accesses = unpack_accesses(batch[rows].tobytes())
    place = 0
    for access in accesses:
        yield int(rows[place]), access
        place += max(1, -(-access.size // VALUE_BYTES))


def _address(record: Any) -> str:
    return f"region {int(record['region'])} offset {int(record['offset']):#x}"


def _refusal(layout: Layout, access: Access) -> str:
    names = [place.name for place in layout.touched(access.region, access.offset, access.size)]
    what = " and ".join(names) or f"region {access.region} offset {access.offset:#x}, unlisted"
    return (
        f"the guest wrote to {what}: profile {layout.profile.name} says that this cannot be "
        "replayed; try again when the guest does not use it, or change the profile"
    )
