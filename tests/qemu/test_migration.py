"""A stock guest in a stock QEMU migrates with the project's virtio-blk device, under load.

All processes are real: QEMU, devices, gateways, `send` and `receive` on either side. The guest's
own report is the judge: no checksum error, no I/O error, nothing in its log.
"""

import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.demo import device_flags
from ferry.errors import Exit
from ferry.qemu.environment import Environment
from ferry.qemu.machine import CONSOLE_LOG, Guest, Machine, MachineSpec, VfioUserDevice, running
from ferry.qemu.report import GuestReport
from ferry.testbed import Host, Process, Setup, Testbed

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(400)]

DEADLINE_S = 100.0
MIGRATION_S = 90.0
WRITES = 100
"""Requests of the guest before the migration, and as many after it."""
IMAGE_BYTES = 32 << 20
SLOT = 4


@dataclass(frozen=True)
class Case:
    """How the guest uses its device, and how that moves."""

    registers: str
    dirty: str
    interrupts: str = "msix"
    root_port: bool = False

    def __str__(self) -> str:
        place = "root-port" if self.root_port else "root-bus"
        return f"{self.interrupts}-{self.registers}-{self.dirty}-{place}"

    @property
    def kernel_options(self) -> str:
        return "pci=nomsi" if self.interrupts == "intx" else ""


class QemuHost(Host):
    """A side whose VMM is a QEMU."""

    @property
    def qmp_socket(self) -> Path:
        return self.folder / "m" / "qmp"


class Rig:
    """Two hosts with a device each and one QEMU guest that goes from one to the other."""

    def __init__(self, bed: Testbed, environment: Environment, initramfs: Path, case: Case) -> None:
        self.bed = bed
        self.environment = environment
        self.initramfs = initramfs
        self.case = case
        self.guest = Guest()
        bed.hosts = {name: QemuHost(name, host.folder) for name, host in bed.hosts.items()}

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--registers", self.case.registers, "--dirty", self.case.dirty)

    async def start(self, stack: AsyncExitStack, name: str, *, incoming: bool) -> Machine:
        """QEMU on host `name`, and its device and gateway where they do not run yet."""
        host = self.bed.hosts[name]
        if host.device is None:
            await trio.to_thread.run_sync(self.bed.start_device, host)
            await trio.to_thread.run_sync(self.bed.start_gateway, host)
        spec = MachineSpec(
            host.folder / "m",
            self.environment.kernel,
            self.initramfs,
            f"ferry.workload=disk {self.case.kernel_options}",
            (VfioUserDevice(host.gateway_socket, SLOT, root_port=self.case.root_port),),
            incoming=incoming,
        )
        return await stack.enter_async_context(running(self.environment.qemu, spec))

    async def migrate(self, source: Machine, target: Machine, way: str) -> Process:
        """From host `way[0]` to host `way[1]`; has to succeed. Returns the sender."""
        a, b = (self.bed.hosts[name] for name in way)
        receiver = await trio.to_thread.run_sync(self.bed.receive, b)
        sender = await trio.to_thread.run_sync(self.bed.send, a, b, *self.flags)
        while sender.running or receiver.running:
            self.guest.look(source)
            await trio.sleep(0.02)
        codes = [await trio.to_thread.run_sync(p.wait, MIGRATION_S) for p in (sender, receiver)]
        assert codes == [Exit.OK, Exit.OK], f"{sender.events[-1]}\n{receiver.events[-1]}"
        self.guest.look(source)
        return sender

    async def wait(self, machine: Machine, ready: Callable[[GuestReport], bool]) -> None:
        await self.guest.wait(machine, ready)

    async def end(self, machine: Machine) -> None:
        """Ends the load; the guest then checks its file system and its log."""
        await machine.send_line("stop")
        await self.wait(machine, lambda report: report.ended)

    async def wait_writes(self, machine: Machine, more: int) -> None:
        goal = self.guest.report.writes + more
        await self.guest.wait(machine, lambda report: report.writes >= goal)


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
            for host in bed.hosts.values():
                console = host.folder / "m" / CONSOLE_LOG
                if console.exists():
                    error.add_note(f"{host.name}: {console.read_text(errors='replace')[-1000:]}")
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
                sender = await rig.migrate(source, target, "ab")
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
                    await rig.migrate(source, target, way)
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
                hold = (*rig.flags, "--break-at", "finalizing")
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
