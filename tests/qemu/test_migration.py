"""A stock guest in a stock QEMU migrates with the project's virtio-blk device, under load.

One move is made by default, the others by `make test-full`.
"""

from pathlib import Path

import pytest

from lab.qemu.environment import Environment
from lab.qemu.two_hosts import Case
from tests.qemu.moving import WatchedRig, go_there_and_back, migrate_once, run

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(800)]

CASES = [
    Case("replay", "message"),
    Case("v2", "logging", interrupts="intx"),
    Case("replay", "scan", root_port=True),
    Case("replay", "logging", interrupts="intx", root_port=True),
    Case("v2", "message", root_port=True),
    Case("replay", "logging", root_port=True, express=True),
]
DEFAULT = CASES[5]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case is DEFAULT else pytest.mark.full) for case in CASES],
    ids=str,
)
def test_the_guest_does_not_notice(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    run(environment, initramfs, short_path, case, migrate_once)


@pytest.mark.full
@pytest.mark.parametrize(
    "case", [Case("replay", "message"), Case("v2", "logging", interrupts="intx")], ids=str
)
def test_there_and_back_again_three_times(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    async def body(rig: WatchedRig) -> None:
        await go_there_and_back(rig, 3)

    run(environment, initramfs, short_path, case, body)
