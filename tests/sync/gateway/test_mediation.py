"""Mediation, standby and the ways back, between a VMM and a model device, stepped by hand."""

import errno
import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sync.gateway import jobs
from sync.gateway.dma import AtDevice
from sync.gateway.errors import (
    BadRequest,
    DeviceRefused,
    LayoutUnaligned,
    SessionFenced,
    Unsupported,
    WrongState,
)
from sync.gateway.state import State
from sync.registers.record import (
    RECORD_BYTES,
    Access,
    Op,
    pack_accesses,
    unpack_accesses,
)
from sync.vfio_user.protocol import (
    Command,
    DmaAccess,
    Feature,
    FeatureIndex,
    IrqSet,
    MigrationState,
    RegionAccess,
    SetIrqs,
    WriteMulti,
)

PAGE = 4096
SELECTOR, BANKED, COUNTER = 0x10, 0x14, 0x20


def _read(offset: int, size: int = 4, region: int = 0) -> Access:
    return Access(Op.READ, region, offset, size)


def _write(offset: int, value: int, *, back: bool = False, region: int = 0) -> Access:
    data = value.to_bytes(4, "little")
    return Access(Op.WRITE, region, offset, 4, data, write_back=back)


def _mediate(bench, tracker="none", *, capture=True, snapshot=b"", page=PAGE):
    job = jobs.mediate(
        bench.link,
        bench.custody,
        tracker=tracker,
        page_bytes=page,
        capture=capture,
        snapshot=snapshot,
    )
    return bench.job(job, held=True)


def _restore(bench) -> None:
    bench.job(jobs.restore(bench.link, bench.custody), held=True)


def _guest_read(bench, offset: int, size: int = 4, region: int = 0) -> int:
    return bench.vmm(Command.REGION_READ, RegionAccess(offset, region, size).pack())


def _guest_write(bench, offset: int, data: bytes, *, posted=False, region: int = 0) -> int:
    body = RegionAccess(offset, region, len(data), data).pack()
    return bench.vmm(Command.REGION_WRITE, body, posted=posted)


def _journal(bench) -> list[Access]:
    return list(unpack_accesses(bench.link.journal.take(1 << 20)))


def _dirty_pages(bench) -> set[int]:
    bitmap = bench.link.service.bitmap
    collected = bench.job(jobs.dirty(bench.link))
    start = collected.half * bitmap.half_bytes
    data = os.pread(bitmap.descriptor, bitmap.half_bytes, start)
    os.pwrite(bitmap.descriptor, bytes(bitmap.half_bytes), start)
    assert collected.complete
    bits = int.from_bytes(data, "little")
    return {page for page in range(len(data) * 8) if bits >> page & 1}


# --- capture ---

ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "posted", "multi", "posted multi", "reset", "step"]),
        st.integers(0, 60),
        st.binary(min_size=1, max_size=12),
        st.sampled_from([0, 0, 7]),
    ),
    max_size=40,
)


def _issue(bench, kind: str, offset: int, data: bytes, region: int) -> None:
    if kind == "read":
        _guest_read(bench, offset, len(data), region)
    elif kind in ("write", "posted"):
        _guest_write(bench, offset, data, posted=kind == "posted", region=region)
    elif kind == "reset":
        bench.vmm(Command.DEVICE_RESET)
    elif kind == "step":
        bench.step()
    else:
        writes = tuple(
            RegionAccess(offset + number, region, 1, bytes([byte]))
            for number, byte in enumerate(data)
        )
        posted = kind.startswith("posted")
        bench.vmm(Command.REGION_WRITE_MULTI, WriteMulti(writes).pack(), posted=posted)


@given(ACCESSES, st.sets(st.integers(0, 60), max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i4_the_journal_is_what_the_device_executed_in_its_order(
    make_bench, accesses, refused
) -> None:
    """The oracle is the device's own log. The VMM pipelines as much as it likes, the device may
    refuse some registers, and accesses of the time before are not in the journal."""
    bench = make_bench()
    registers = bench.device.registers
    bench.link.journal.posted(0, 0, b"from a mediation before")
    _guest_write(bench, 1, b"before", posted=True)
    _guest_read(bench, 2)
    outcome = bench.start(
        jobs.mediate(
            bench.link,
            bench.custody,
            tracker="none",
            page_bytes=PAGE,
            capture=True,
            snapshot=pack_accesses([_read(COUNTER)]),
        ),
        held=True,
    )
    _guest_read(bench, 3)
    bench.settle()
    assert outcome[0][1] is None
    at_snapshot = registers.log.index(Access(Op.READ, 0, COUNTER, 4, b"\1\0\0\0"))
    registers.refuse_offsets = refused
    for kind, offset, data, region in accesses:
        # Nobody is told that a posted write was refused.
        if "posted" not in kind or not refused & set(range(offset, offset + len(data))):
            _issue(bench, kind, offset, data, region)
    bench.settle()
    executed = registers.log[at_snapshot + 1 :]
    journal = _journal(bench)
    assert [a for a in journal if not a.failed] == [a for a in executed if not a.failed]
    assert executed[0].offset == 3
    bench.close()


def test_an_access_the_device_refuses_is_journaled_as_failed(make_bench) -> None:
    bench = make_bench()
    _mediate(bench)
    bench.device.registers.refuse_offsets = {8}
    number = _guest_read(bench, 8)
    _guest_write(bench, 8, b"abcd")
    bench.settle()
    assert bench.reply_to(number)[0] == errno.EIO
    assert _journal(bench) == [
        Access(Op.READ, 0, 8, 4, bytes(4), failed=True),
        Access(Op.WRITE, 0, 8, 4, b"abcd", failed=True),
    ]


def test_the_rest_of_a_multi_write_that_stopped_is_journaled_as_failed(make_bench) -> None:
    bench = make_bench()
    _mediate(bench)
    bench.device.registers.refuse_offsets = {1}
    writes = tuple(RegionAccess(offset, 0, 1, b"x") for offset in range(3))
    bench.ask(Command.REGION_WRITE_MULTI, WriteMulti(writes).pack())
    assert [access.failed for access in _journal(bench)] == [False, True, True]


def test_without_capture_nothing_is_journaled(make_bench) -> None:
    bench = make_bench(v2=True)
    _mediate(bench, capture=False)
    _guest_write(bench, 0, b"abcd")
    bench.settle()
    assert bytes(bench.device.registers.bar[:4]) == b"abcd"
    assert bench.link.journal.n_records == 0


@pytest.mark.parametrize(
    "body",
    [
        RegionAccess(0, 0, 0).pack(),
        RegionAccess(0, 0x10000, 4).pack(),
        RegionAccess((1 << 64) - 2, 0, 4).pack(),
        RegionAccess(0, 0, (1 << 20) + 1).pack(),
    ],
)
def test_i9_an_access_that_no_record_can_hold_is_refused(make_bench, body: bytes) -> None:
    bench = make_bench()
    _mediate(bench)
    assert bench.ask(Command.REGION_READ, body)[0] == errno.EINVAL
    assert bench.device.registers.log == []
    assert bench.link.journal.n_records == 0


def test_the_vmm_keeps_its_fingers_off_the_migration_state(make_bench) -> None:
    bench = make_bench(v2=True)
    request = Feature.get(FeatureIndex.MIGRATION, 8).pack()
    assert bench.ask(Command.DEVICE_FEATURE, request)[0] == 0
    _mediate(bench)
    assert bench.ask(Command.DEVICE_FEATURE, request)[0] == errno.EBUSY


# --- the snapshot ---


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_snapshot_of_a_banked_register_leaves_no_trace(make_bench, data) -> None:
    """The guest selects banks and uses them all the time, pipelined; the snapshot selects banks of
    its own. The oracle is a guest that is alone with its device."""
    steps = st.tuples(st.sampled_from(["select", "write", "read"]), st.integers(0, 3))
    before = data.draw(st.lists(steps, max_size=8))
    meanwhile = data.draw(st.lists(steps, max_size=8))
    stepped = data.draw(st.integers(0, 8))
    alone, bench = make_bench(), make_bench()

    def play(which, script) -> list[int]:
        numbers = []
        for kind, value in script:
            raw = value.to_bytes(4, "little")
            if kind == "select":
                _guest_write(which, SELECTOR, raw, posted=True)
            elif kind == "write":
                _guest_write(which, BANKED, raw, posted=True)
            else:
                numbers.append(_guest_read(which, BANKED))
        return numbers

    expected = play(alone, before + meanwhile)
    alone.settle()
    snapshot = [_read(SELECTOR)]
    for bank in range(4):
        snapshot += [_write(SELECTOR, bank), _read(BANKED)]
    # Nobody knows beforehand what the guest has selected by then: it is written back.
    snapshot.append(_write(SELECTOR, 99, back=True))
    numbers = play(bench, before)
    outcome = bench.start(
        jobs.mediate(
            bench.link,
            bench.custody,
            tracker="none",
            page_bytes=PAGE,
            capture=True,
            snapshot=pack_accesses(snapshot),
        ),
        held=True,
    )
    for _ in range(stepped):
        bench.step()
    numbers += play(bench, meanwhile)
    bench.settle()
    ((mediated, error),) = outcome
    assert error is None
    assert [bench.reply_to(n) for n in numbers] == [alone.reply_to(n) for n in expected]
    assert bench.device.registers.banks == alone.device.registers.banks
    assert bench.device.registers.bar == alone.device.registers.bar
    values = list(unpack_accesses(mediated.values))
    assert values[-1].data == values[0].data, "written back is what was read first"
    # The snapshot and the journal together are the device as the guest has left it.
    banks = {bank: values[2 + 2 * bank].data for bank in range(4)}
    selected = int.from_bytes(values[0].data, "little")
    for access in _journal(bench):
        if access.op is Op.WRITE and access.offset == SELECTOR:
            selected = int.from_bytes(access.data, "little")
        elif access.op is Op.WRITE:
            banks[selected] = access.data
    final = bench.device.registers
    assert banks == {bank: final.banks.get(bank, bytes(4)) for bank in range(4)}
    for each in (alone, bench):
        each.close()


def test_the_snapshot_comes_back_in_the_shape_it_was_given(make_bench) -> None:
    bench = make_bench()
    bench.device.registers.bar[64:84] = bytes(range(20))
    bench.device.registers.refuse_offsets = {4}
    asked = pack_accesses([_read(64, 20), _read(4), _write(0, 7)], seq=50)
    mediated = _mediate(bench, snapshot=asked)
    assert len(mediated.values) == len(asked)
    values = list(unpack_accesses(mediated.values))
    assert values[0].data == bytes(range(20))
    assert [access.failed for access in values] == [False, True, False]
    seqs = [struct.unpack_from("<Q", mediated.values, at)[0] for at in range(0, 160, RECORD_BYTES)]
    assert seqs == [50, 51, 52, 53, 54]


def test_a_snapshot_that_is_no_batch_changes_nothing(make_bench) -> None:
    bench = make_bench()
    for nonsense in (b"x" * 31, bytes(31) + b"\xff", pack_accesses([_read(1 << 63, 8)])[:16]):
        with pytest.raises(BadRequest):
            _mediate(bench, snapshot=nonsense)
    assert bench.custody.state is State.PASSTHROUGH
    assert bench.device.commands == []


# --- trackers ---


@given(st.lists(st.tuples(st.integers(0, 8 * PAGE - 1), st.integers(1, 3 * PAGE)), max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i1_the_message_tracker_marks_exactly_the_pages_written(make_bench, writes) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, 5 * PAGE), bench.share(0x10000 + 5 * PAGE, 3 * PAGE)]
    _mediate(bench, "message")
    expected: set[int] = set()
    for offset, count in writes:
        count = min(count, 8 * PAGE - offset)
        body = DmaAccess(0x10000 + offset, count, b"\1" * count).pack()
        assert bench.dma(Command.DMA_WRITE, body)[0] == 0
        expected |= {place // PAGE for place in range(offset, offset + count)}
        assert bench.dma(Command.DMA_READ, DmaAccess(0x10000, PAGE).pack())[0] == 0
    assert _dirty_pages(bench) == expected
    assert _dirty_pages(bench) == set()
    for fd in fds:
        os.close(fd)
    bench.close()


def test_the_message_tracker_takes_the_descriptors_away_and_gives_them_back(make_bench) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    bench.share(0x80000, PAGE, fd=False)
    number = _guest_read(bench, 0)
    mediated = _mediate(bench, "message")
    assert bench.reply_to(number)[0] == 0
    assert (mediated.n_pages, mediated.half_bytes) == (1, 8)
    mapped = {a: has_fd for a, (_, has_fd) in bench.device.mapped.items()}
    assert mapped == {0x10000: False, 0x80000: False}
    assert bench.device.commands.count(Command.DMA_UNMAP) == 1, "the other had none to take"
    late = bench.share(0x20000, PAGE)
    assert bench.device.mapped[0x20000][1] is False
    assert bench.link.memory.generation == mediated.layout_generation + 1
    _restore(bench)
    mapped = {a: has_fd for a, (_, has_fd) in bench.device.mapped.items()}
    assert mapped == {0x10000: True, 0x20000: True, 0x80000: False}
    assert bench.custody.state is State.PASSTHROUGH
    for number in (fd, late):
        os.close(number)


def test_a_device_that_drains_on_unmap_is_served_meanwhile(make_bench) -> None:
    """It asks for guest memory before it lets go of it, while the guest is held back."""
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    outcome = bench.start(
        jobs.mediate(
            bench.link,
            bench.custody,
            tracker="message",
            page_bytes=PAGE,
            capture=True,
            snapshot=b"",
        ),
        held=True,
    )
    held = _guest_read(bench, 0)
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10010, 4, b"late").pack())[0] == 0
    assert bench.step(), "the unmap"
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10020, 4, b"more").pack())[0] == 0
    bench.settle()
    assert outcome[0][1] is None
    assert bench.reply_to(held)[0] == 0
    assert os.pread(fd, 4, 0x10) == b"late"
    assert _dirty_pages(bench) == {0}
    os.close(fd)


def test_a_remap_that_the_device_refuses_is_undone(make_bench) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, PAGE), bench.share(0x20000, PAGE)]
    device = bench.device
    execute = device._execute

    def refuse_one(command: int, body: bytes, n_descriptors: int) -> bytes:
        if command == Command.DMA_MAP and not n_descriptors:
            device.refuse[Command.DMA_MAP] = errno.EINVAL
        return execute(command, body, n_descriptors)

    device._execute = refuse_one
    outcome = bench.start(
        jobs.mediate(
            bench.link,
            bench.custody,
            tracker="message",
            page_bytes=PAGE,
            capture=True,
            snapshot=b"",
        ),
        held=True,
    )
    while device.refuse.get(Command.DMA_MAP) is None:
        assert bench.step()
    while len(bench.to_device) > 0 and bench.to_device[0][1] == 0:
        bench.step()
    device.refuse.clear()
    bench.settle()
    assert isinstance(outcome[0][1], DeviceRefused)
    assert {a: has_fd for a, (_, has_fd) in device.mapped.items()} == {0x10000: True, 0x20000: True}
    assert bench.custody.state is State.PASSTHROUGH
    assert bench.link.service.bitmap is None
    assert not bench.link.relay.holding
    _mediate(bench, "none")
    for fd in fds:
        os.close(fd)


@given(
    st.sets(st.integers(0, 79), max_size=12),
    st.sampled_from([PAGE, 4 * PAGE, 1 << 20]),
    st.sampled_from([1 << 20, 64 + 8, 64 + 24]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i1_the_logging_tracker_reports_every_page_written(
    make_bench, pages, device_page, transfer
) -> None:
    """Any granularity of the device, any limit on a report, and regions that fill no word."""
    bench = make_bench(logging=True)
    bench.device.features.log_pages_of = device_page
    # With 1 MiB, three regions have a page of the device in common.
    rows = [(0x10000, 13), (0x40000, 3), (0x100000 - 2 * PAGE, 64)]
    fds = [bench.share(address, pages * PAGE) for address, pages in rows]
    object.__setattr__(bench.link.facts.capabilities, "max_data_xfer_size", transfer)
    mediated = _mediate(bench, "logging")
    assert mediated.page_bytes == device_page
    addresses = [address + page * PAGE for address, pages in rows for page in range(pages)]
    for page in pages:
        bench.device.features.wrote(addresses[page] + 5, 1)
    expected = {
        other
        for other in range(80)
        for page in pages
        if addresses[other] // device_page == addresses[page] // device_page
    }
    assert _dirty_pages(bench) == expected
    assert _dirty_pages(bench) == set()
    _restore(bench)
    assert bench.device.features.log_page == 0
    for fd in fds:
        os.close(fd)
    bench.close()


def test_i1_dma_by_message_counts_while_the_device_logs(make_bench) -> None:
    bench = make_bench(logging=True)
    fd = bench.share(0x10000, 4 * PAGE)
    _mediate(bench, "logging")
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x12000, 1, b"x").pack())[0] == 0
    bench.device.features.wrote(0x13000, 1)
    assert _dirty_pages(bench) == {2, 3}
    os.close(fd)


def test_a_device_that_logs_for_a_gateway_that_was_killed_starts_again(make_bench) -> None:
    bench = make_bench(logging=True)
    fd = bench.share(0x10000, PAGE)
    bench.device.features.log_page = PAGE
    bench.device.features.wrote(0x10000, 1)
    _mediate(bench, "logging")
    assert _dirty_pages(bench) == set()
    os.close(fd)


def test_a_report_that_is_refused_is_said_to_be_incomplete(make_bench) -> None:
    bench = make_bench(logging=True)
    fd = bench.share(0x10000, PAGE)
    _mediate(bench, "logging")
    bench.device.features.refuse = {FeatureIndex.DMA_LOGGING_REPORT}
    assert bench.job(jobs.dirty(bench.link)).complete is False
    os.close(fd)


def test_what_cannot_be_tracked_is_refused_before_anything_is_done(make_bench) -> None:
    bench = make_bench()
    with pytest.raises(Unsupported):
        _mediate(bench, "message")
    fd = bench.share(0x10000, PAGE)
    with pytest.raises(Unsupported):
        _mediate(bench, "logging")
    odd = bench.share(0x20000, PAGE + 512)
    with pytest.raises(LayoutUnaligned):
        _mediate(bench, "message")
    _mediate(bench, "none")
    with pytest.raises(WrongState):
        bench.job(jobs.dirty(bench.link))
    for number in (fd, odd):
        os.close(number)


# --- stop, and the ways back ---


def test_a_fence_takes_all_memory_away(make_bench) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, PAGE), bench.share(0x20000, PAGE)]
    _mediate(bench, "message")
    resume = pack_accesses([_write(0x40, 5)])
    bench.job(jobs.stop(bench.link, bench.custody, fence=True, resume=resume), held=True)
    assert bench.device.mapped == {}
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10000, 1, b"x").pack())[0] == errno.EFAULT
    late = bench.share(0x30000, PAGE)
    assert bench.device.mapped == {}
    _guest_write(bench, 0x44, b"late")
    bench.settle()
    assert [access.offset for access in _journal(bench)] == [0x44]
    event = os.eventfd(0, os.EFD_NONBLOCK)
    assign = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 0, 1)
    bench.ask(Command.DEVICE_SET_IRQS, assign.pack(), fds=(event,))
    _restore(bench)
    assert sorted(bench.device.mapped) == [0x10000, 0x20000, 0x30000]
    assert all(has_fd for _, has_fd in bench.device.mapped.values())
    assert bench.device.registers.bar[0x40] == 5, "the operations given with `stop`"
    assert os.eventfd_read(event) == 1
    assert bench.link.service.bitmap is None
    for number in (*fds, late, event):
        os.close(number)


def test_a_device_with_migration_states_runs_again_after_an_abort(make_bench) -> None:
    bench = make_bench(v2=True)
    _mediate(bench, capture=False)
    job = jobs.set_migration_state(bench.link, MigrationState.STOP_COPY)
    bench.job(job)
    bench.device.features.state_data = b"state" * 10
    assert bench.job(jobs.read_migration_data(bench.link, 20)) == b"state" * 4
    assert bench.job(jobs.read_migration_data(bench.link, 100)) == b"state" * 6
    assert bench.job(jobs.read_migration_data(bench.link, 100)) == b""
    _restore(bench)
    assert bench.job(jobs.get_migration_state(bench.link)) is MigrationState.RUNNING


def test_i8_a_restore_tries_everything_even_if_a_step_is_refused(make_bench) -> None:
    bench = make_bench(v2=True, logging=True)
    fd = bench.share(0x10000, PAGE)
    _mediate(bench, "logging")
    bench.job(jobs.set_migration_state(bench.link, MigrationState.STOP))
    bench.job(jobs.stop(bench.link, bench.custody, fence=True, resume=b""), held=True)
    bench.device.features.refuse = {FeatureIndex.DMA_LOGGING_STOP, FeatureIndex.MIG_DEVICE_STATE}
    with pytest.raises(DeviceRefused):
        _restore(bench)
    assert bench.custody.state is State.PASSTHROUGH
    assert bench.device.mapped[0x10000][1]
    assert not bench.link.relay.holding
    os.close(fd)


# --- the target ---


def _standby(bench, session: str = "s") -> None:
    bench.job(jobs.standby(bench.link, bench.custody, session), held=True)


def test_i4_a_standby_has_no_memory_and_executes_no_register_write(make_bench) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    bench.device.registers.bar[0] = 1
    _standby(bench)
    assert bench.device.mapped == {}
    assert bench.device.registers.bar[0] == 0, "it was reset"
    bench.device.registers.log.clear()
    late = bench.share(0x20000, PAGE)
    assert bench.device.mapped == {}
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10000, 1, b"x").pack())[0] == errno.EFAULT
    assert bench.dma(Command.DMA_READ, DmaAccess(0x20000, 1).pack())[0] == errno.EFAULT
    number = _guest_write(bench, 0x50, b"bell")
    _guest_write(bench, 0x50, b"bell", posted=True)
    writes = (RegionAccess(0x50, 0, 1, b"x"), RegionAccess(4, 7, 2, b"\6\0"))
    bench.vmm(Command.REGION_WRITE_MULTI, WriteMulti(writes).pack())
    reset = bench.vmm(Command.DEVICE_RESET)
    bench.settle()
    assert bench.reply_to(number) == (0, RegionAccess(0x50, 0, 4).pack())
    assert bench.reply_to(reset) == (0, b"")
    assert bench.device.registers.log == [Access(Op.WRITE, 7, 4, 2, b"\6\0")]
    assert bench.link.gate.dropped == 4
    _guest_write(bench, 4, b"\7\0", region=7)
    read = _guest_read(bench, 0x50)
    bench.settle()
    assert bench.reply_to(read) == (0, RegionAccess(0x50, 0, 4, bytes(4)).pack())
    assert bench.device.registers.config[4] == 7
    for number in (fd, late):
        os.close(number)


def test_i4_what_was_held_is_executed_once_and_only_after_the_commit(make_bench) -> None:
    bench = make_bench(v2=True)
    fd = bench.share(0x10000, PAGE)
    _standby(bench)
    bench.job(jobs.batch(bench.link, pack_accesses([_write(0x60, 1)])), held=True)
    bench.job(jobs.set_migration_state(bench.link, MigrationState.RESUMING))
    bench.job(jobs.write_migration_data(bench.link, b"from the source"))
    held = pack_accesses([_write(0x64, 2)])
    with pytest.raises(WrongState):
        bench.job(jobs.start(bench.link, bench.custody, held), held=True)
    assert bench.device.mapped == {}
    bench.custody.own("s")
    bench.link.start_records = pack_accesses([_write(0x64, 2)])
    bench.device.refuse[Command.DMA_MAP] = errno.ENOMEM
    with pytest.raises(DeviceRefused):
        bench.job(jobs.start(bench.link, bench.custody, b""), held=True)
    bench.device.refuse.clear()
    event = os.eventfd(0, os.EFD_NONBLOCK)
    assign = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 0, 1)
    bench.ask(Command.DEVICE_SET_IRQS, assign.pack(), fds=(event,))
    bench.device.commands.clear()
    bench.job(jobs.start(bench.link, bench.custody, b""), held=True)
    assert bench.device.mapped[0x10000][1]
    assert bench.device.features.state is MigrationState.RUNNING
    assert bench.device.features.loaded == b"from the source"
    written = [a for a in bench.device.registers.log if a.offset == 0x64]
    assert len(written) == 1
    assert bench.device.commands.index(Command.DMA_MAP) < bench.device.commands.index(
        Command.REGION_WRITE
    )
    assert os.eventfd_read(event) == 1
    assert bench.custody.state is State.PASSTHROUGH
    assert bench.link.relay.vmm_commands == bench.link.snoops.commands
    for number in (fd, event):
        os.close(number)


def test_i7_an_abandoned_standby_is_in_passthrough_and_fenced(make_bench) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    _standby(bench)
    bench.job(jobs.abandon(bench.link, bench.custody), held=True)
    assert bench.device.mapped[0x10000][1]
    assert bench.custody.state is State.PASSTHROUGH
    with pytest.raises(SessionFenced):
        _standby(bench)
    _standby(bench, "another")
    os.close(fd)


def test_a_standby_that_the_device_refuses_is_undone(make_bench) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    bench.device.refuse[Command.DEVICE_RESET] = errno.EIO
    with pytest.raises(DeviceRefused):
        _standby(bench)
    assert bench.device.mapped[0x10000][1]
    assert bench.link.snoops.sharing is AtDevice.DIRECT
    assert bench.custody.state is State.PASSTHROUGH
    os.close(fd)


def test_i7_a_released_source_executes_no_register_write(make_bench) -> None:
    bench = make_bench()
    _mediate(bench)
    bench.job(jobs.stop(bench.link, bench.custody, fence=True, resume=b""), held=True)
    bench.custody.release("s")
    bench.link.enter(bench.custody.state)
    _guest_write(bench, 0x50, b"bell")
    bench.settle()
    assert bench.device.registers.log == []
    assert bench.link.gate.dropped == 1
