"""A stock guest in a stock QEMU migrates with the project's virtio-blk device, under load."""

import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from ferry.errors import Exit
from ferry.qemu.environment import Environment
from ferry.qemu.rig import MIGRATION_S, Case
from tests.qemu.moving import DEADLINE_S, WatchedRig, go_there_and_back, migrate_once, run

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(800)]

CASES = [
    Case("replay", "message"),
    Case("v2", "logging", interrupts="intx"),
    Case("replay", "scan", root_port=True),
    Case("replay", "logging", interrupts="intx", root_port=True),
    Case("v2", "message", root_port=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_guest_does_not_notice(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    run(environment, initramfs, short_path, case, migrate_once)


@pytest.mark.parametrize(
    "case", [Case("replay", "message"), Case("v2", "logging", interrupts="intx")], ids=str
)
def test_there_and_back_again_three_times(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    async def body(rig: WatchedRig) -> None:
        await go_there_and_back(rig, 3)

    run(environment, initramfs, short_path, case, body)


@pytest.mark.parametrize(
    "case", [Case("replay", "message"), Case("v2", "logging", interrupts="intx")], ids=str
)
def test_i8_the_guest_goes_on_when_the_target_is_killed_in_the_switchover(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    async def body(rig: WatchedRig) -> None:
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                source = await rig.start(stack, "a", incoming=False)
                target = await rig.start(stack, "b", incoming=True)
                await rig.wait_loads(source)
                await rig.wait_work(source)
                receiver = await trio.to_thread.run_sync(rig.bed.receive, rig.bed.hosts["b"])
                hold = (*case.flags, "--break-at", "finalizing")
                a, b = rig.bed.hosts["a"], rig.bed.hosts["b"]
                sender = await trio.to_thread.run_sync(rig.bed.send, a, b, *hold)
                await trio.to_thread.run_sync(sender.wait_stopped)
                os.kill(target.pid, signal.SIGKILL)
                sender.resume()
                for process in (sender, receiver):
                    assert await trio.to_thread.run_sync(process.wait, MIGRATION_S) != Exit.OK
                await rig.wait_work(source)
                await rig.end(source)

    run(environment, initramfs, short_path, case, body)
