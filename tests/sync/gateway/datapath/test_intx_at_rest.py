"""A stopped device does not assert INTx again: the VMM would carry the line to the target."""

import errno
from collections.abc import Callable

import pytest

from sync.gateway.engine import jobs
from sync.vfio_user.protocol import Command, IrqSet, PciIrq, RegionAccess, SetIrqs
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.mediation import mediating

UNMASK = SetIrqs(IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK, PciIrq.INTX, 0, 1).pack()
MASK = SetIrqs(IrqSet.DATA_NONE | IrqSet.ACTION_MASK, PciIrq.INTX, 0, 1).pack()


def _stopped(make_bench: Callable[..., Bench]) -> Bench:
    bench = make_bench()
    mediate = mediating(bench)
    bench.job(mediate, held=True)
    bench.job(jobs.stop(bench.link, bench.custody, fence=True, resume=b""), held=True)
    bench.device.commands.clear()
    return bench


def _restore(bench: Bench) -> None:
    bench.job(jobs.restore(bench.link, bench.custody), held=True)


@pytest.mark.parametrize("at_rest", [True, False])
def test_a_read_that_a_device_at_rest_refuses_still_deasserts_intx(
    make_bench: Callable[..., Bench], at_rest: bool
) -> None:
    """A device in STOP_COPY refuses every access; a VMM whose read fails keeps the line up."""
    bench = make_bench(v2=True)
    bench.job(mediating(bench, capture=False), held=True)
    if at_rest:
        bench.job(jobs.stop(bench.link, bench.custody, fence=False, resume=b""), held=True)
    bench.device.refuse[Command.REGION_READ] = errno.EBUSY
    error, body = bench.ask(Command.REGION_READ, RegionAccess(0, 0, 4).pack())
    if at_rest:
        assert (error, RegionAccess.unpack(body).data) == (0, bytes(4))
        config = RegionAccess(0, 7, 4).pack()
        assert bench.ask(Command.REGION_READ, config)[0] == errno.EBUSY, "this is content"
    else:
        assert error == errno.EBUSY


def test_an_unmask_reaches_the_device_only_if_it_goes_on_here(
    make_bench: Callable[..., Bench],
) -> None:
    bench = _stopped(make_bench)
    bench.ask(Command.DEVICE_SET_IRQS, UNMASK)
    assert Command.DEVICE_SET_IRQS not in bench.device.commands
    _restore(bench)
    assert bench.device.commands.count(Command.DEVICE_SET_IRQS) == 1
    bench.ask(Command.DEVICE_SET_IRQS, UNMASK)
    assert bench.device.commands.count(Command.DEVICE_SET_IRQS) == 2


def test_nothing_is_unmasked_that_the_vmm_did_not_unmask(make_bench: Callable[..., Bench]) -> None:
    bench = _stopped(make_bench)
    bench.ask(Command.DEVICE_SET_IRQS, MASK)
    assert bench.device.commands.count(Command.DEVICE_SET_IRQS) == 1
    _restore(bench)
    assert bench.device.commands.count(Command.DEVICE_SET_IRQS) == 1
