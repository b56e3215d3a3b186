"""A device that is stopped, given back, or stands by at the target, stepped by hand."""

import errno
import os
from collections.abc import Callable

import pytest

from lab.vfio_user.access import DmaAccess
from sync.gateway.datapath.dma import AtDevice
from sync.gateway.engine import jobs
from sync.gateway.engine.custody import CustodyState
from sync.gateway.errors import (
    DeviceRefused,
    SessionFenced,
    WrongState,
)
from sync.registers.record import (
    Access,
    Op,
    pack_accesses,
)
from sync.vfio_user.protocol import (
    Command,
    FeatureIndex,
    IrqSet,
    MigrationState,
    RegionAccess,
    SetIrqs,
    WriteMulti,
)
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.mediation import (
    PAGE,
    guest_read,
    guest_write,
    mediate,
    restore,
    take_journal,
    writing,
)


def test_a_fence_takes_all_memory_away(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, PAGE), bench.share(0x20000, PAGE)]
    mediate(bench, "message")
    resume = pack_accesses([writing(0x40, 5)])
    bench.job(jobs.stop(bench.link, bench.custody, fence=True, resume=resume), held=True)
    assert bench.device.mapped == {}
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10000, 1, b"x").pack())[0] == errno.EFAULT
    late = bench.share(0x30000, PAGE)
    assert bench.device.mapped == {}
    guest_write(bench, 0x44, b"late")
    bench.settle()
    assert [access.offset for access in take_journal(bench)] == [0x44]
    event = os.eventfd(0, os.EFD_NONBLOCK)
    assign = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 0, 1)
    bench.ask(Command.DEVICE_SET_IRQS, assign.pack(), fds=(event,))
    restore(bench)
    assert sorted(bench.device.mapped) == [0x10000, 0x20000, 0x30000]
    assert all(has_fd for _, has_fd in bench.device.mapped.values())
    assert bench.device.registers.bar[0x40] == 5, "the operations given with `stop`"
    assert os.eventfd_read(event) == 1
    assert bench.link.service.bitmap is None
    for number in (*fds, late, event):
        os.close(number)


def test_a_device_with_migration_states_runs_again_after_an_abort(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(v2=True)
    mediate(bench, capture=False)
    job = jobs.set_migration_state(bench.link, MigrationState.STOP_COPY)
    bench.job(job)
    bench.device.features.state_data = b"state" * 10
    assert bench.job(jobs.read_migration_data(bench.link, 20)) == b"state" * 4
    assert bench.job(jobs.read_migration_data(bench.link, 100)) == b"state" * 6
    assert bench.job(jobs.read_migration_data(bench.link, 100)) == b""
    restore(bench)
    assert bench.device.features.state is MigrationState.RUNNING


def test_i8_a_restore_tries_everything_even_if_a_step_is_refused(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(v2=True, logging=True)
    fd = bench.share(0x10000, PAGE)
    mediate(bench, "logging")
    bench.job(jobs.set_migration_state(bench.link, MigrationState.STOP))
    bench.job(jobs.stop(bench.link, bench.custody, fence=True, resume=b""), held=True)
    bench.device.features.refuse = {FeatureIndex.DMA_LOGGING_STOP, FeatureIndex.MIG_DEVICE_STATE}
    with pytest.raises(DeviceRefused):
        restore(bench)
    assert bench.custody.state is CustodyState.PASSTHROUGH
    assert bench.device.mapped[0x10000][1]
    assert not bench.link.relay.holding
    os.close(fd)


def stand_by(bench: Bench, session: str = "s") -> None:
    bench.job(jobs.standby(bench.link, bench.custody, session), held=True)


def test_i4_a_standby_has_no_memory_and_executes_no_register_write(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    bench.device.registers.bar[0] = 1
    stand_by(bench)
    assert bench.device.mapped == {}
    assert bench.device.registers.bar[0] == 0, "it was reset"
    bench.device.registers.log.clear()
    late = bench.share(0x20000, PAGE)
    assert bench.device.mapped == {}
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10000, 1, b"x").pack())[0] == errno.EFAULT
    assert bench.dma(Command.DMA_READ, DmaAccess(0x20000, 1).pack())[0] == errno.EFAULT
    number = guest_write(bench, 0x50, b"bell")
    guest_write(bench, 0x50, b"bell", posted=True)
    writes = (RegionAccess(0x50, 0, 1, b"x"), RegionAccess(4, 7, 2, b"\6\0"))
    bench.vmm(Command.REGION_WRITE_MULTI, WriteMulti(writes).pack())
    reset = bench.vmm(Command.DEVICE_RESET)
    bench.settle()
    assert bench.reply_to(number) == (0, RegionAccess(0x50, 0, 4).pack())
    assert bench.reply_to(reset) == (0, b"")
    assert bench.device.registers.log == [Access(Op.WRITE, 7, 4, 2, b"\6\0")]
    assert bench.link.gate.dropped == 4
    guest_write(bench, 4, b"\7\0", region=7)
    read = guest_read(bench, 0x50)
    bench.settle()
    assert bench.reply_to(read) == (0, RegionAccess(0x50, 0, 4, bytes(4)).pack())
    assert bench.device.registers.config[4] == 7
    for number in (fd, late):
        os.close(number)


def test_i4_what_was_held_is_executed_once_and_only_after_the_commit(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(v2=True)
    fd = bench.share(0x10000, PAGE)
    stand_by(bench)
    bench.job(jobs.batch(bench.link, pack_accesses([writing(0x60, 1)])), held=True)
    bench.job(jobs.set_migration_state(bench.link, MigrationState.RESUMING))
    bench.job(jobs.write_migration_data(bench.link, b"from the source"))
    held = pack_accesses([writing(0x64, 2)])
    with pytest.raises(WrongState):
        bench.job(jobs.start(bench.link, bench.custody, held), held=True)
    assert bench.device.mapped == {}
    bench.custody.own("s")
    bench.link.start_records = pack_accesses([writing(0x64, 2)])
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
    assert bench.custody.state is CustodyState.PASSTHROUGH
    bench.job(jobs.end_watch(bench.link, bench.custody))
    assert bench.link.relay.vmm_commands == bench.link.snoops.commands
    for number in (fd, event):
        os.close(number)


def test_i7_an_abandoned_standby_is_fenced_and_its_vmm_stays_away_from_the_device(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    stand_by(bench)
    bench.job(jobs.abandon(bench.link, bench.custody), held=True)
    assert bench.device.mapped == {}
    body = RegionAccess(0x50, 0, 4, b"bell").pack()
    assert bench.ask(Command.REGION_WRITE, body)[0] == errno.EACCES
    assert bench.ask(Command.DEVICE_RESET)[0] == errno.EACCES
    assert bench.custody.state is CustodyState.PASSTHROUGH
    with pytest.raises(SessionFenced):
        stand_by(bench)
    stand_by(bench, "another")
    os.close(fd)


def test_i7_a_vmm_that_starts_at_a_shut_gateway_may_reset_and_reaches_nothing(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    bench.link.enter(CustodyState.RELEASED, shut=True, vmm_starts=True)
    body = RegionAccess(0x50, 0, 4, b"bell").pack()
    assert bench.ask(Command.REGION_WRITE, body)[0] == errno.EACCES
    bench.device.refuse[Command.DEVICE_RESET] = errno.EIO  # what it would say if it were asked
    assert bench.ask(Command.DEVICE_RESET)[0] == 0
    assert bench.device.registers.log == []


def test_a_standby_that_the_device_refuses_is_undone(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    bench.device.refuse[Command.DEVICE_RESET] = errno.EIO
    with pytest.raises(DeviceRefused):
        stand_by(bench)
    assert bench.device.mapped[0x10000][1]
    assert bench.link.snoops.sharing is AtDevice.DIRECT
    assert bench.custody.state is CustodyState.PASSTHROUGH
    os.close(fd)


def test_i7_a_released_source_executes_no_register_write(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    mediate(bench)
    bench.job(jobs.stop(bench.link, bench.custody, fence=True, resume=b""), held=True)
    bench.custody.release("s")
    bench.link.enter(bench.custody.state)
    guest_write(bench, 0x50, b"bell")
    bench.settle()
    assert bench.device.registers.log == []
    assert bench.link.gate.dropped == 1
