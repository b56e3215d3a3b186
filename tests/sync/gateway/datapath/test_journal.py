"""The journal against a plain list: order, completeness, bound."""

import tracemalloc
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sync.gateway.datapath.journal import Entry, Journal
from sync.registers.record import RECORD_BYTES, STRUCT, Access, Op, unpack_accesses

ACCESS = st.tuples(
    st.sampled_from(["read", "write", "posted", "reset"]),
    st.integers(0, 8),
    st.integers(0, 1 << 40),
    st.binary(min_size=1, max_size=20),
    st.booleans(),
)


def _begin(journal: Journal, kind: str, region: int, offset: int, data: bytes) -> Entry | None:
    if kind == "posted":
        journal.posted(region, offset, data)
        return None
    if kind == "reset":
        return journal.begin(Op.RESET, 0, 0, 0)
    if kind == "read":
        return journal.begin(Op.READ, region, offset, len(data))
    return journal.begin(Op.WRITE, region, offset, len(data), data)


def _expected(kind: str, region: int, offset: int, data: bytes, failed: bool) -> Access:
    if kind == "reset":
        return Access(Op.RESET, 0, 0, 0, failed=failed)
    if kind == "posted":
        return Access(Op.WRITE, region, offset, len(data), data)
    if kind == "read":
        value = bytes(len(data)) if failed else data
        return Access(Op.READ, region, offset, len(data), value, failed)
    return Access(Op.WRITE, region, offset, len(data), data, failed)


@given(st.lists(ACCESS, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_records_come_in_the_order_of_execution(
    accesses: list[tuple[Any, ...]], random: Random
) -> None:
    """Replies may come in any order: an access shows only when all before it are complete."""
    journal = Journal()
    entries = [_begin(journal, *access[:4]) for access in accesses]
    open_ones = [number for number, entry in enumerate(entries) if entry is not None]
    random.shuffle(open_ones)
    taken = bytearray(journal.take(1000))
    for number in open_ones:
        kind, _, _, data, failed = accesses[number]
        read = data if kind == "read" and not failed else None
        entry = entries[number]
        assert entry is not None
        journal.finish(entry, data=read, failed=failed)
        taken += journal.take(1000)
        complete = [access.op for access in unpack_accesses(bytes(taken))]
        assert len(complete) <= len(accesses)
    assert list(unpack_accesses(bytes(taken))) == [_expected(*access) for access in accesses]
    numbers = [record[0] for record in STRUCT.iter_unpack(bytes(taken))]
    assert numbers == list(range(len(numbers)))
    assert journal.next_seq == len(numbers)
    assert not journal.overflow


def test_a_posted_write_behind_an_open_read_waits_for_it() -> None:
    journal = Journal()
    read = journal.begin(Op.READ, 0, 0, 4)
    journal.posted(0, 4, b"\x01")
    assert journal.take(10) == b""
    journal.finish(read, data=b"abcd")
    assert [access.op for access in unpack_accesses(journal.take(10))] == [Op.READ, Op.WRITE]


@given(
    st.lists(ACCESS, max_size=40),
    st.lists(st.integers(0, 40), max_size=40),
    st.integers(1, 20),
    st.integers(1, 8),
)
@settings(max_examples=200, deadline=None)
def test_i9_the_bound_counts_what_waits_behind_an_open_access(
    accesses: list[tuple[Any, ...]], finished: list[int], max_records: int, batch: int
) -> None:
    """Whatever is answered and taken when: no more than the bound is kept, and what is taken is the
    beginning of what happened, up to the first access that found no room."""
    journal = Journal(max_records)
    entries: list[tuple[Entry, tuple[Any, ...]]] = []
    happened: list[Access] = []
    taken = bytearray()
    answers = iter(finished)
    for access in accesses:
        entry = _begin(journal, *access[:4])
        assert journal.n_records <= max_records
        if not journal.overflow:
            happened.append(_expected(*access))
        if entry is not None:
            entries.append((entry, access))
        answer = next(answers, 40)
        if entries and answer < len(entries):
            _finish(journal, *entries.pop(answer))
            taken += journal.take(batch)
    for entry, access in entries:
        _finish(journal, entry, access)
    while part := journal.take(batch):
        taken += part
    assert list(unpack_accesses(bytes(taken))) == happened
    assert journal.n_records == 0


def _finish(journal: Journal, entry: Entry, access: tuple[Any, ...]) -> None:
    kind, _, _, data, failed = access
    journal.finish(entry, data=data if kind == "read" and not failed else None, failed=failed)


def test_i9_posted_writes_behind_an_unanswered_read_take_no_more_memory_than_the_bound() -> None:
    journal = Journal(max_records=1 << 13)
    tracemalloc.start()
    try:
        journal.begin(Op.READ, 0, 0, 4)
        for _ in range(1 << 15):
            journal.posted(0, 0, bytes(4))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert journal.overflow
    assert kept < 2 * RECORD_BYTES << 13


def test_an_answer_to_what_an_earlier_capture_has_seen_changes_nothing() -> None:
    journal = Journal()
    earlier = journal.begin(Op.WRITE, 0, 0, 4, b"old.")
    journal.restart()
    journal.posted(0, 8, b"new.")
    journal.finish(earlier, failed=True)
    (record,) = unpack_accesses(journal.take(9))
    assert record == Access(Op.WRITE, 0, 8, 4, b"new.")


def test_i10_a_full_journal_drops_and_says_so_instead_of_waiting() -> None:
    journal = Journal(max_records=4)
    for value in range(10):
        journal.posted(0, 0, bytes([value]))
    assert journal.overflow
    assert journal.n_records == 4
    kept = list(unpack_accesses(journal.take(10)))
    assert [access.data for access in kept] == [b"\0", b"\1", b"\2", b"\3"]
    journal.posted(0, 0, b"\x0b")
    assert journal.overflow and journal.n_records == 0, "a gap must not be papered over"
    journal.restart()
    journal.posted(0, 0, b"\x0c")
    assert not journal.overflow and journal.n_records == 1


def test_an_access_that_is_split_is_kept_whole_or_not_at_all() -> None:
    journal = Journal(max_records=4)
    journal.posted(0, 0, bytes(24))
    journal.posted(0, 0, bytes(16))
    assert journal.overflow
    assert len(journal.take(10)) == 3 * RECORD_BYTES


def test_taking_is_bounded_and_continues() -> None:
    journal = Journal()
    for value in range(5):
        journal.posted(0, value, b"\0")
    assert len(journal.take(2)) == 2 * RECORD_BYTES
    assert journal.n_records == 3
    assert [access.offset for access in unpack_accesses(journal.take(9))] == [2, 3, 4]
