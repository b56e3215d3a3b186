"""A stock guest in a stock QEMU keeps its devices while their gateways are upgraded under load."""

from pathlib import Path

import pytest
import trio

from lab.qemu.environment import Environment
from lab.qemu.machine import Machine
from lab.qemu.two_hosts import Case
from tests.qemu.moving import WatchedRig
from tests.qemu.test_device_restart import BOTH, DISK, Slot, go_on, replace_all

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(300)]


async def upgrade_all(rig: WatchedRig, machine: Machine, slots: list[Slot]) -> None:
    for slot in slots:
        await trio.to_thread.run_sync(rig.bed.upgrade_gateway, slot.gateway)


async def upgrade_and_replace(rig: WatchedRig, machine: Machine, slots: list[Slot]) -> None:
    """What the new gateway knows of the driver's registers and rings is what the first one saw."""
    await upgrade_all(rig, machine, slots)
    await replace_all(rig, machine, slots)


@pytest.mark.parametrize("case", [DISK, BOTH], ids=["disk", "both"])
def test_i9_a_guest_does_not_notice_that_its_gateways_are_upgraded(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    go_on(environment, initramfs, short_path, case, upgrade_all, 2)


def test_i9_nor_that_its_disk_is_replaced_behind_a_gateway_that_was_upgraded(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    go_on(environment, initramfs, short_path, DISK, upgrade_and_replace, 2)
