"""A stock guest in a stock QEMU migrates with an e1000, by register capture and replay alone.

TCP runs through it in both directions all the time: every byte arrives, in its order and once, and
no segment had to be sent again because of a wrong checksum. The driver knows INTx only.
"""

from pathlib import Path

import pytest

from lab.qemu.environment import Environment
from lab.qemu.two_hosts import Case
from tests.qemu.moving import WatchedRig, go_there_and_back, migrate_once, run

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(800)]

CASES = [
    Case("replay", "scan", interrupts="intx", loads=("net",)),
    Case("replay", "logging", interrupts="intx", root_port=True, loads=("net",)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tcp_goes_on_through_a_nic_that_migrates(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    run(environment, initramfs, short_path, case, migrate_once)


def test_a_nic_goes_there_and_back_again(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    async def body(rig: WatchedRig) -> None:
        await go_there_and_back(rig, 1)

    case = Case("replay", "message", interrupts="intx", loads=("net",))
    run(environment, initramfs, short_path, case, body)


def test_a_disk_and_a_nic_migrate_together(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    case = Case("replay", "message", loads=("disk", "net"))
    run(environment, initramfs, short_path, case, migrate_once)
