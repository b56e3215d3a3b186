"""The opened stream with a stock QEMU: an idle guest on a slow link, and one that outruns it.

That QEMU gets its settings back after every failure is `test_failures`'.
"""

import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.errors import Exit
from lab.qemu.environment import Environment
from lab.qemu.initramfs import build_initramfs, write_initramfs
from lab.qemu.machine import CONTROL, Machine
from lab.qemu.two_hosts import MIGRATION_S, Case
from lab.testbed import Process
from perf.errors import NeedMissing
from perf.links import shaped_link
from sync.vmm.driver import Vmm
from sync.vmm.settings import SLEEPING_THROTTLE, THROTTLE, MigrationSettings
from tests.qemu.moving import DEADLINE_S, WatchedRig, run, unable

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(800)]

POLL_S = 0.02
BEATS = 10
MBIT = 10**6
DOWNTIME_LIMIT_MS = 1500
"""More than a busy machine adds, and a sixth of what the guest's content takes at 100 Mbit/s."""
WRITING = """
. /lib/ferry.sh
dd if=/dev/urandom of=/run/random bs=1M count=24 status=none
report load what=writing
n=0
while ! stopped; do
    n=$((n + 1))
    dd if=/run/random of=/run/work bs=64k count=256 iflag=skip_bytes skip=$((n * 37)) \\
        conv=notrunc status=none || error dd writing
done
"""
"""Nothing compresses what it writes, and no page is like one that was there before."""
LESS_THAN_IT_WRITES = "6M"
OPERATORS: dict[str, Any] = {
    "downtime-limit": 777,
    "cpu-throttle-initial": 40,
    "cpu-throttle-increment": 5,
    "max-cpu-throttle": 50,
}
"""What an operator has set."""


def test_i10_an_idle_guest_on_a_slow_link_stands_still_no_longer_than_it_may(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    async def body(rig: WatchedRig) -> None:
        a, b = rig.hosts["a"], rig.hosts["b"]
        async with AsyncExitStack() as stack:
            try:
                link = stack.enter_context(shaped_link(100 * MBIT))
            except NeedMissing as error:
                unable(str(error))
            rig.bed.inside = {"a": link.source_prefix, "b": link.target_prefix}
            with trio.fail_after(DEADLINE_S):
                source = await rig.start(stack, "a", incoming=False)
                await rig.wait(source, lambda report: report.beats >= BEATS)
                target = await rig.start(stack, "b", incoming=True)
                listen = ("--insecure", "--listen", f"tcp://{link.target_address}:0")
                receiver = await trio.to_thread.run_sync(lambda: rig.bed.receive(b, *listen))
                to = ("--insecure", "--to", receiver.wait_event("listening")["url"])
                limit = ("--downtime-limit", DOWNTIME_LIMIT_MS, "--strict-downtime")
                sender = rig.bed.send(a, b, *rig.case.flags, *to, *limit, "--verify", "all")
                await until(lambda: not sender.running and not receiver.running)
                assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
                report = sender.wait_event("report")
                print(report["downtime_total_ms"], report["wire_bytes"], report["duration_s"])
                assert report["vmm_stream"]["form"] == "open"
                # The target's QEMU has written nothing by itself, anywhere.
                assert report["verification"]["repaired_pages"] == 0
                rig.guest.look(source)
                beats = rig.guest.report.beats + BEATS
                await rig.wait(target, lambda report: report.beats >= beats)
                await rig.end(target)

    run(environment, initramfs, short_path, Case("replay", "logging", loads=("idle",)), body)


@pytest.mark.parametrize("ends", ["well", "by the operator"])
def test_i8_a_guest_that_outruns_the_link_is_throttled_and_that_is_undone(
    environment: Environment, short_path: Path, ends: str
) -> None:
    initramfs = short_path / "initramfs.cpio"
    write_initramfs(initramfs, build_initramfs(environment, workloads={"writing": WRITING}))

    async def body(rig: WatchedRig) -> None:
        a, b = rig.hosts["a"], rig.hosts["b"]
        async with AsyncExitStack() as stack:
            with trio.fail_after(2 * DEADLINE_S):
                source = await rig.start(stack, "a", incoming=False)
                await rig.wait_loads(source)
                before = await with_vmm(source, set_by_the_operator)
                target = await rig.start(stack, "b", incoming=True)
                receiver = await trio.to_thread.run_sync(rig.bed.receive, b)
                how = ("--on-stall", "throttle", "--bandwidth", LESS_THAN_IT_WRITES)
                control = a.folder / "send.sock"
                listen = ("--control-socket", control)
                sender = rig.bed.send(a, b, *rig.case.flags, *how, *listen)
                await until(lambda: is_throttling(sender) or not sender.running)
                assert is_throttling(sender), sender.tail()
                assert THROTTLE in (await with_vmm(source, capabilities))
                await with_vmm(source, wait_throttled)
                if ends == "well":
                    expected = Exit.OK
                    changed = ("--control-socket", control, "--bandwidth", "none")
                    rig.bed.start("set", "set", *changed)
                else:
                    expected = Exit.INTERRUPTED
                    sender.signal(signal.SIGINT)
                await until(lambda: not sender.running and not receiver.running)
                assert sender.wait(MIGRATION_S) == expected, sender.tail()
                assert await with_vmm(source, Vmm.settings) == before
                assert not await with_vmm(source, throttle_of)
                machine = target if ends == "well" else source
                beats = rig.guest.report.beats + BEATS
                await rig.wait(machine, lambda report: report.beats >= beats)
                await rig.end(machine)

    run(environment, initramfs, short_path, Case("replay", "logging", loads=("writing",)), body)


async def set_by_the_operator(vmm: Vmm) -> MigrationSettings:
    await vmm.execute("migrate-set-parameters", OPERATORS)
    return await vmm.settings()


async def capabilities(vmm: Vmm) -> list[str]:
    """Those that are on."""
    return [name for name, on in (await vmm.settings()).capabilities.items() if on]


async def throttle_of(vmm: Vmm) -> int:
    """By how many per cent the guest's processors are slowed down."""
    found: int = (await vmm.execute("query-migrate")).get("cpu-throttle-percentage", 0)
    return found


async def wait_throttled(vmm: Vmm) -> None:
    """Until it is throttled by more than while that sleeps."""
    while await throttle_of(vmm) <= SLEEPING_THROTTLE["max-cpu-throttle"]:  # noqa: ASYNC110
        await trio.sleep(POLL_S)


async def with_vmm(machine: Machine, work: Callable[[Vmm], Awaitable[Any]]) -> Any:
    """What `work` returns of the machine's VMM."""
    async with await Vmm.connect(str(machine.spec.folder / CONTROL)) as vmm:
        return await work(vmm)


def is_throttling(sender: Process) -> bool:
    return any("throttle" in str(event.get("text")) for event in list(sender.events))


async def until(done: Callable[[], bool]) -> None:
    """Until it is so; the caller sets the deadline."""
    while not done():  # noqa: ASYNC110
        await trio.sleep(POLL_S)
