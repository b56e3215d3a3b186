"""What was read on the guest's behalf reaches the guest: exactly once, wherever it goes on."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.gateway.datapath.deferred_reads import MAX_BYTES, DeferredReads
from sync.gateway.engine import jobs
from sync.gateway.engine.custody import CustodyState
from sync.gateway.errors import BadRequest
from sync.registers.record import Access, Op, pack_accesses, unpack_accesses
from sync.vfio_user.protocol import Command, RegionAccess, Version
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.mediation import mediating

CAUSE = 0x40
"""A register of the model device; the test clears it where a real one would by being read."""


def _guest_reads(bench: Bench, offset: int = CAUSE, size: int = 1) -> bytes:
    _, body = bench.ask(Command.REGION_READ, RegionAccess(offset, 0, size).pack())
    return RegionAccess.unpack(body).data


def _take(bench: Bench) -> bytes:
    """What the migration reads instead of the guest, with the device at rest."""
    records = pack_accesses([Access(Op.READ, 0, CAUSE, 1, deferred=True)])
    done = list(unpack_accesses(bench.job(jobs.batch(bench.link, records))))
    bench.device.registers.bar[CAUSE] = 0
    return done[0].data


def _mediate_and_stop(bench: Bench, *, capture: bool = True) -> None:
    job = mediating(bench, capture=capture)
    bench.job(job, held=True)
    bench.job(jobs.stop(bench.link, bench.custody, fence=False, resume=b""), held=True)


@pytest.mark.parametrize("capture", [True, False])
def test_i8_a_source_that_goes_on_gets_what_was_read(
    make_bench: Callable[..., Bench], capture: bool
) -> None:
    bench = make_bench()
    bench.device.registers.bar[CAUSE] = 1
    _mediate_and_stop(bench, capture=capture)
    assert _take(bench) == b"\1"
    bench.job(jobs.restore(bench.link, bench.custody), held=True)
    bench.device.registers.bar[CAUSE] = 2
    assert _guest_reads(bench) == b"\3"
    assert _guest_reads(bench) == b"\2"


def test_a_second_migration_takes_over_what_is_still_owed(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.device.registers.bar[CAUSE] = 1
    _mediate_and_stop(bench)
    _take(bench)
    bench.job(jobs.restore(bench.link, bench.custody), held=True)
    bench.device.registers.bar[CAUSE] = 2
    _mediate_and_stop(bench)
    assert _take(bench) == b"\3"
    assert _guest_reads(bench) == b"\3"
    (captured,) = unpack_accesses(bench.link.journal.take(64))
    assert captured.data == b"\3"
    assert _guest_reads(bench) == b"\0"


def test_the_target_pays_without_the_device_seeing_it(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.job(jobs.standby(bench.link, bench.custody, "s"), held=True)
    bench.custody.own("s")
    bench.device.registers.log.clear()
    records = pack_accesses([Access(Op.WRITE, 0, CAUSE, 1, b"\1", deferred=True)])
    bench.job(jobs.start(bench.link, bench.custody, records), held=True)
    assert not bench.device.registers.log
    assert _guest_reads(bench, CAUSE - 1, 4) == b"\0\1\0\0"
    assert _guest_reads(bench) == b"\0"


def test_a_counter_goes_on_from_what_it_had_come_to(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.job(jobs.standby(bench.link, bench.custody, "s"), held=True)
    bench.custody.own("s")
    count = Access(Op.WRITE, 0, CAUSE, 1, b"\x07", deferred=True, counts=True)
    bench.job(jobs.start(bench.link, bench.custody, pack_accesses([count])), held=True)
    bench.device.registers.bar[CAUSE] = 5
    assert _guest_reads(bench) == b"\x0c"
    bench.device.registers.bar[CAUSE] = 1
    assert _guest_reads(bench) == b"\1"


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.binary(max_size=6)), max_size=8),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 8)), max_size=8),
)
def test_every_byte_is_paid_once(
    debts: list[tuple[int, int, bytes]], reads: list[tuple[int, int, int]]
) -> None:
    deferred = DeferredReads()
    expected = {(region, at): 0 for region in range(3) for at in range(40)}
    for region, offset, data in debts:
        deferred.add(region, offset, data)
        for at, value in enumerate(data, offset):
            expected[region, at] |= value
    for region, offset, size in reads:
        found = bytearray(size)
        deferred.deliver(region, offset, memoryview(found))
        assert list(found) == [expected[region, at] for at in range(offset, offset + size)]
        for at in range(offset, offset + size):
            expected[region, at] = 0
    assert bool(deferred) == any(expected.values())


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 0xFFFF)), max_size=8),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8), st.binary(max_size=9)), max_size=8),
)
def test_every_count_is_paid_once_to_a_read_of_its_whole_counter(
    debts: list[tuple[int, int, int]], reads: list[tuple[int, int, bytes]]
) -> None:
    """Counters of 2 bytes, side by side, in two regions; what is read is the device's own count."""
    deferred = DeferredReads()
    expected = {(region, 2 * number): 0 for region in range(2) for number in range(4)}
    for region, number, value in debts:
        total = deferred.add(region, 2 * number, value.to_bytes(2, "little"), count=True)
        expected[region, 2 * number] = min(expected[region, 2 * number] + value, 0xFFFF)
        assert int.from_bytes(total, "little") == expected[region, 2 * number]
    for region, offset, own in reads:
        data = bytearray(own)
        deferred.deliver(region, offset, memoryview(data))
        want = bytearray(own)
        for at in range(0, 8, 2):
            if offset <= at and at + 2 <= offset + len(own):
                part = slice(at - offset, at - offset + 2)
                value = int.from_bytes(want[part], "little") + expected[region, at]
                want[part] = min(value, 0xFFFF).to_bytes(2, "little")
                expected[region, at] = 0
        assert data == want
    assert bool(deferred) == any(expected.values())


@pytest.mark.parametrize("count", [False, True])
def test_i9_a_controller_cannot_owe_without_bound(count: bool) -> None:
    deferred = DeferredReads()
    for offset in range(0, MAX_BYTES, 8):
        deferred.add(0, offset, b"\1" * 8, count=count)
    with pytest.raises(BadRequest):
        deferred.add(1, 0, b"\1")


def test_i8_too_great_a_debt_does_not_keep_the_source_from_going_on(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    _mediate_and_stop(bench)
    debt = Access(Op.WRITE, 0, 0, MAX_BYTES + 1, b"\1" * (MAX_BYTES + 1), deferred=True)
    bench.link.resume_records = pack_accesses([debt])
    with pytest.raises(BadRequest):
        bench.job(jobs.restore(bench.link, bench.custody), held=True)
    assert bench.custody.state is CustodyState.PASSTHROUGH
    assert not bench.link.relay.holding


def test_another_vmm_is_owed_nothing(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.link.deferred.add(0, CAUSE, b"\7")
    bench.link.attach_vmm(lambda data, fds: None, Version())
    assert not bench.link.deferred
