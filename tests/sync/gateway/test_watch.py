"""What a gateway sees of a device that a guest has come to: interrupts, accesses, and for how
long it stands between the device and the VMM's eventfds."""

import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import Activity
from sync.gateway.engine.custody import ClientRole
from sync.vfio_user.protocol import IrqSet, PciIrq, SetIrqs
from tests.sync.gateway.conftest import House, ServedDevice

ASSIGN = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK)


def _which(descriptor: int) -> str:
    """What tells one eventfd from another, whoever has it open (proc(5), eventfd-id)."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return next(line for line in lines if line.startswith("eventfd-id"))


def _arrives(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(10_000)) and bool(os.eventfd_read(descriptor))


def test_interrupts_are_counted_for_a_guest_that_comes_and_then_go_directly(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    before, later = _eventfd(), _eventfd()
    vmm.set_irqs(SetIrqs(ASSIGN, PciIrq.MSIX, 0, 1), [before])
    assert _which(device.vectors[0]) == _which(before)

    async def move() -> None:
        gateway = await GatewayClient.connect(
            house.control_path, role=ClientRole.TARGET, session="s"
        )
        async with gateway:
            await gateway.standby("s")
            await trio.to_thread.run_sync(vmm.set_irqs, SetIrqs(ASSIGN, PciIrq.MSIX, 1, 1), [later])
            await gateway.own("s")
            await gateway.start()
            assert (await gateway.status()).activity == Activity(vectors=2)
            for descriptor in (before, later):
                assert os.eventfd_read(descriptor), "each vector is fired once as the device starts"
            await trio.to_thread.run_sync(vmm.region_write, 7, 0x04, bytes(2))
            await trio.to_thread.run_sync(vmm.region_write, 0, 0x80, bytes(4))
            assert (await gateway.status()).activity == Activity(writes=1, vectors=2)
            taps = device.vectors[-2:]
            assert {_which(tap) for tap in taps}.isdisjoint({_which(before), _which(later)})
            os.eventfd_write(taps[1], 1)
            assert await trio.to_thread.run_sync(_arrives, later)
            assert (await gateway.status()).activity == Activity(writes=1, interrupts=1, vectors=2)

    trio.run(move)
    wanted = [_which(before), _which(later)]
    wait_until(lambda: [_which(each) for each in device.vectors[-2:]] == wanted)


def test_a_guest_that_is_not_let_in_leaves_the_device_as_it_was(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    event = _eventfd()
    vmm.set_irqs(SetIrqs(ASSIGN, PciIrq.MSIX, 0, 1), [event])

    async def refuse() -> Any:
        gateway = await GatewayClient.connect(
            house.control_path, role=ClientRole.TARGET, session="s"
        )
        async with gateway:
            await gateway.standby("s")
            assert _which(device.vectors[-1]) != _which(event)
            await gateway.abandon()

    trio.run(refuse)
    wait_until(lambda: _which(device.vectors[-1]) == _which(event))
