"""One register operation as 32 bytes: what the journal, a snapshot and a replay are made of.

     0        8        16       24     26    27    28      32
    +--------+--------+--------+------+-----+-----+-------+
    | seq    | offset | value  |region|size | op  | flags |
    | u64    | u64    | u64    | u16  | u8  | u8  | u32   |
    +--------+--------+--------+------+-----+-----+-------+

Little-endian. `value` holds the low `size` (1 to 8) bytes. A longer access is split into records
that carry `MORE`, but for the last one; they are executed as one access. A `RESET` has size 0.

A write that carries `WRITE_BACK` belongs to a batch: who executes it writes what the first read of
the same register in the same batch returned, or `value` where there was none. So a batch can use
a selector register and leave no trace, although nobody knows beforehand what it holds by then.

`DEFERRED` is for registers that a read clears: what a read with it returns, and what a write with
it holds (which the device never sees), is given to the guest with its next read of that register:
as further bits, or, with `COUNT`, added to what the counter there has come to by then.

The gateway packs single records with `struct` (it does not want numpy's start-up time on its
data path); everybody else handles whole batches through `NUMPY_FIELDS`.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import NamedTuple

from sync.errors import SyncError

STRUCT = struct.Struct("<QQQHBBI")
RECORD_BYTES = STRUCT.size
VALUE_BYTES = 8

NUMPY_FIELDS = [
    ("seq", "<u8"),
    ("offset", "<u8"),
    ("value", "<u8"),
    ("region", "<u2"),
    ("size", "u1"),
    ("op", "u1"),
    ("flags", "<u4"),
]
"""`numpy.dtype(NUMPY_FIELDS)` reads a batch of records in place."""


class Op(IntEnum):
    READ = 0
    WRITE = 1
    RESET = 2


class Flag(IntFlag):
    NONE = 0
    MORE = 1
    FAILED = 2
    WRITE_BACK = 4
    DEFERRED = 8
    COUNT = 16


class RecordFormatError(SyncError):
    """A batch of register operations is malformed."""


class Access(NamedTuple):
    """A register access as the device sees it. `data` is empty for a read not yet executed."""

    op: Op
    region: int
    offset: int
    size: int
    data: bytes = b""
    failed: bool = False
    write_back: bool = False
    deferred: bool = False
    counts: bool = False


def pack_access(access: Access, seq: int) -> bytes:
    """`access` as one or more records, numbered from `seq`."""
    if access.op is Op.RESET:
        return STRUCT.pack(seq, 0, 0, 0, 0, Op.RESET, Flag.FAILED if access.failed else 0)
    pieces: list[bytes] = []
    flags = Flag.FAILED if access.failed else Flag.NONE
    if access.write_back:
        flags |= Flag.WRITE_BACK
    if access.deferred:
        flags |= Flag.DEFERRED
    if access.counts:
        flags |= Flag.COUNT
    for done in range(0, access.size, VALUE_BYTES):
        size = min(VALUE_BYTES, access.size - done)
        more = Flag.MORE if done + size < access.size else Flag.NONE
        pieces.append(
            STRUCT.pack(
                seq + len(pieces),
                access.offset + done,
                int.from_bytes(access.data[done : done + size], "little"),
                access.region,
                size,
                access.op,
                more | flags,
            )
        )
    return b"".join(pieces)


def pack_accesses(accesses: list[Access], seq: int = 0) -> bytes:
    """All of `accesses`, numbered on from `seq`."""
    out = bytearray()
    for access in accesses:
        out += pack_access(access, seq + len(out) // RECORD_BYTES)
    return bytes(out)


def unpack_accesses(records: bytes) -> Iterator[Access]:
    """The accesses in a batch, joined again. Raises `RecordFormatError` on anything malformed."""
    if len(records) % RECORD_BYTES:
        raise RecordFormatError(f"{len(records)} bytes are no whole number of records")
    start: tuple[int, int, int] | None = None
    data = bytearray()
    for _seq, offset, value, region, size, op, flags in STRUCT.iter_unpack(records):
        if op == Op.RESET and start is None:
            yield Access(Op.RESET, 0, 0, 0, failed=bool(flags & Flag.FAILED))
            continue
        if op not in (Op.READ, Op.WRITE) or not 1 <= size <= VALUE_BYTES:
            raise RecordFormatError(f"operation {op} of {size} bytes does not exist")
        if start is None:
            start = (op, region, offset)
        elif (op, region, offset) != (start[0], start[1], start[2] + len(data)):
            raise RecordFormatError("a split access does not continue where it stopped")
        if size != VALUE_BYTES and value >> (8 * size):
            raise RecordFormatError("a value is wider than its access")
        data += value.to_bytes(VALUE_BYTES, "little")[:size]
        if flags & Flag.MORE:
            continue
        yield Access(
            Op(start[0]),
            start[1],
            start[2],
            len(data),
            bytes(data),
            bool(flags & Flag.FAILED),
            bool(flags & Flag.WRITE_BACK),
            bool(flags & Flag.DEFERRED),
            bool(flags & Flag.COUNT),
        )
        start = None
        data = bytearray()
    if start is not None:
        raise RecordFormatError("the batch ends in the middle of an access")
