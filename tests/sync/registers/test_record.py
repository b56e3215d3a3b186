"""The 32-byte record: what goes in comes out, and nothing malformed gets through."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.registers.record import (
    NUMPY_FIELDS,
    RECORD_BYTES,
    STRUCT,
    Access,
    Flag,
    Op,
    RecordFormatError,
    pack_accesses,
    unpack_accesses,
)


@st.composite
def accesses(draw: st.DrawFn) -> Access:
    op = draw(st.sampled_from(Op))
    failed = draw(st.booleans())
    if op is Op.RESET:
        return Access(Op.RESET, 0, 0, 0, failed=failed)
    data = draw(st.binary(min_size=1, max_size=40))
    back = op is Op.WRITE and draw(st.booleans())
    region, offset = draw(st.integers(0, 9)), draw(st.integers(0, 1 << 40))
    owed, counts = draw(st.booleans()), draw(st.booleans())
    return Access(op, region, offset, len(data), data, failed, back, owed, counts)


@given(st.lists(accesses(), max_size=20), st.integers(0, 1 << 40))
def test_accesses_survive_the_record_format(batch: list[Access], seq: int) -> None:
    records = pack_accesses(batch, seq)
    assert list(unpack_accesses(records)) == batch
    rows = np.frombuffer(records, np.dtype(NUMPY_FIELDS))
    assert rows["seq"].tolist() == list(range(seq, seq + len(rows)))


def test_the_layout_is_the_one_that_is_drawn() -> None:
    record = pack_accesses([Access(Op.WRITE, 2, 0x10, 2, b"\x34\x12", True, True)], 7)
    expected = struct.pack("<QQQHBBI", 7, 0x10, 0x1234, 2, 2, 1, Flag.FAILED | Flag.WRITE_BACK)
    assert record == expected
    assert len(record) == RECORD_BYTES == 32


@pytest.mark.parametrize(
    "records",
    [
        b"\0" * 31,
        STRUCT.pack(0, 0, 0, 0, 0, Op.READ, 0),
        STRUCT.pack(0, 0, 0, 0, 9, Op.READ, 0),
        STRUCT.pack(0, 0, 0, 0, 4, 3, 0),
        STRUCT.pack(0, 0, 0x100, 0, 1, Op.WRITE, 0),
        STRUCT.pack(0, 0, 0, 0, 8, Op.WRITE, Flag.MORE),
        STRUCT.pack(0, 0, 0, 0, 8, Op.WRITE, Flag.MORE) + STRUCT.pack(1, 9, 0, 0, 8, 1, 0),
        STRUCT.pack(0, 0, 0, 0, 8, Op.WRITE, Flag.MORE) + STRUCT.pack(1, 8, 0, 1, 8, 1, 0),
        STRUCT.pack(0, 0, 0, 0, 8, Op.WRITE, Flag.MORE) + STRUCT.pack(1, 8, 0, 0, 8, 0, 0),
    ],
)
def test_malformed_records_are_refused(records: bytes) -> None:
    with pytest.raises(RecordFormatError):
        list(unpack_accesses(records))
