"""A stock guest in a stock QEMU migrates with the project's virtio-blk device, under load.

All processes are real: QEMU, devices, gateways, `send` and `receive` on either side. The guest's
own report is the judge: no checksum error, no I/O error, nothing in its log.
"""

import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.demo import device_flags
from ferry.errors import Exit
from ferry.qemu.environment import Environment
from ferry.qemu.rig import MIGRATION_S, Case, Rig
from ferry.testbed import Setup, Testbed

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(800)]

DEADLINE_S = 200.0
WRITES = 100
"""Requests of the guest before the migration, and as many after it."""
IMAGE_BYTES = 32 << 20


def tell(report: dict[str, Any]) -> None:
    """What the migration took, for the log of the test."""
    for key in ("methods", "downtime_total_ms", "downtime_ms", "target_ms", "registers"):
        print(key, report[key])
    print("verification", {k: v for k, v in report["verification"].items() if k != "regions"})
    print("rounds", len(report["rounds"]), "duration", report["duration_s"])


CASES = [
    Case("replay", "message"),
    Case("v2", "logging", interrupts="intx"),
    Case("replay", "scan", root_port=True),
    Case("replay", "logging", interrupts="intx", root_port=True),
    Case("v2", "message", root_port=True),
]


def run(
    environment: Environment,
    initramfs: Path,
    folder: Path,
    case: Case,
    body: Callable[[Rig], Awaitable[None]],
) -> None:
    """Runs `body`, then has the guest end its load, and judges what it reports."""
    setup = Setup(device=tuple(device_flags(case.registers, case.dirty)), image_bytes=IMAGE_BYTES)
    with Testbed(folder / "bed", setup) as bed:
        rig = Rig(bed, environment, initramfs, case)
        try:
            trio.run(body, rig)
        except BaseException as error:
            for name, console in rig.consoles().items():
                error.add_note(f"{name}: {console}")
            raise
    report = rig.guest.report
    print(report, rig.guest.longest_silence_s)
    assert report.complaints() == []
    assert report.interrupts == case.interrupts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_guest_does_not_notice(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    async def body(rig: Rig) -> None:
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                source = await rig.start(stack, "a", incoming=False)
                target = await rig.start(stack, "b", incoming=True)
                await rig.wait(source, lambda report: "load" in report.stages)
                await rig.wait_writes(source, WRITES)
                sender = await rig.migrate(source, "ab")
                tell(sender.wait_event("report"))
                await rig.wait_writes(target, WRITES)
                await rig.end(target)

    run(environment, initramfs, short_path, case, body)


@pytest.mark.parametrize(
    "case", [Case("replay", "message"), Case("v2", "logging", interrupts="intx")], ids=str
)
def test_there_and_back_again_three_times(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    async def body(rig: Rig) -> None:
        async with AsyncExitStack() as last, AsyncExitStack() as first:
            with trio.fail_after(3 * DEADLINE_S):
                stack = first
                source = await rig.start(stack, "a", incoming=False)
                await rig.wait(source, lambda report: "load" in report.stages)
                for way in ("ab", "ba") * 3:
                    await rig.wait_writes(source, WRITES)
                    following = await last.enter_async_context(AsyncExitStack())
                    target = await rig.start(following, way[1], incoming=True)
                    await rig.migrate(source, way)
                    await stack.aclose()
                    stack, source = following, target
                await rig.wait_writes(source, WRITES)
                await rig.end(source)

    run(environment, initramfs, short_path, case, body)


@pytest.mark.parametrize(
    "case", [Case("replay", "message"), Case("v2", "logging", interrupts="intx")], ids=str
)
def test_i8_the_guest_goes_on_when_the_target_is_killed_in_the_switchover(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    async def body(rig: Rig) -> None:
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                source = await rig.start(stack, "a", incoming=False)
                target = await rig.start(stack, "b", incoming=True)
                await rig.wait(source, lambda report: "load" in report.stages)
                await rig.wait_writes(source, WRITES)
                receiver = await trio.to_thread.run_sync(rig.bed.receive, rig.bed.hosts["b"])
                hold = (*case.flags, "--break-at", "finalizing")
                a, b = rig.bed.hosts["a"], rig.bed.hosts["b"]
                sender = await trio.to_thread.run_sync(rig.bed.send, a, b, *hold)
                await trio.to_thread.run_sync(sender.wait_stopped)
                os.kill(target.pid, signal.SIGKILL)
                sender.resume()
                for process in (sender, receiver):
                    assert await trio.to_thread.run_sync(process.wait, MIGRATION_S) != Exit.OK
                await rig.wait_writes(source, WRITES)
                await rig.end(source)

    run(environment, initramfs, short_path, case, body)
