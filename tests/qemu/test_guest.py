"""A stock guest in a real QEMU: its own reports are the judge."""

import os
import select
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from lab.children import start_child
from lab.qemu.environment import Environment
from lab.qemu.machine import Guest, Machine, MachineSpec, VfioUserDevice, running
from lab.qemu.report import GuestReport
from sync.vmm.client import QmpClient
from tests.listening import wait_until_listening

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(400)]

DEADLINE_S = 200.0
PASSES = "ferry.workload=disk ferry.passes=2"
DEVICE = """
import sys
from lab.devices.main import DeviceOptions, run
run(DeviceOptions(socket_path=sys.argv[1], image_path=sys.argv[2]))
"""
GATEWAY = """
import sys
from pathlib import Path
from sync.gateway.main import GatewayOptions, run
run(GatewayOptions(*map(Path, sys.argv[1:])))
"""

HOLDER = """
import sys, trio
from pathlib import Path
from lab.qemu.machine import MachineSpec, running
from ferry.doctor.qemu_program import Qemu
async def main():
    qemu, *paths = map(Path, sys.argv[1:])
    async with running(Qemu(qemu, ()), MachineSpec(*paths, incoming=True)) as machine:
        print(machine.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@contextmanager
def serving(code: str, folder: Path, name: str, *arguments: Path) -> Iterator[Path]:
    """`code` in a process that listens at the socket which this yields; it has to end well."""
    path, log = folder / f"{name}.sock", folder / f"{name}.log"
    with log.open("wb") as stderr:
        process = start_child([sys.executable, "-c", code, path, *arguments], stderr=stderr)
    try:
        wait_until_listening(path, process)
        yield path
    finally:
        process.terminate()
        assert process.wait(20) == 0, log.read_text()


@contextmanager
def device(folder: Path) -> Iterator[Path]:
    """The project's virtio-blk device; yields its socket."""
    image = folder / "device.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(32 << 20)
    with serving(DEVICE, folder, "device", image) as path:
        yield path


@contextmanager
def gateway(folder: Path, device_path: Path) -> Iterator[Path]:
    """A gateway before the device; yields the VMM's socket."""
    with serving(GATEWAY, folder, "gateway", device_path, folder / "control.sock") as path:
        yield path


def run_guest(
    environment: Environment,
    spec: MachineSpec,
    then: Callable[[Guest, Machine], Awaitable[None]] | None = None,
) -> GuestReport:
    """Boots the guest, does `then`, and returns its report once it has ended."""

    async def main() -> GuestReport:
        guest = Guest()
        async with running(environment.qemu, spec) as machine:
            with trio.fail_after(DEADLINE_S):
                if then is not None:
                    await then(guest, machine)
                await guest.wait(machine, lambda report: report.ended)
                assert await machine.wait_ended() == 0
        return guest.report

    return trio.run(main)


def test_a_machine_ends_with_the_process_that_started_it(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    words = (environment.qemu.program, short_path / "m", environment.kernel, initramfs)
    with start_child([sys.executable, "-c", HOLDER, *words], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        machine = os.pidfd_open(int(holder.stdout.readline()))
        assert not select.select([machine], [], [], 0)[0]
        holder.kill()
    assert select.select([machine], [], [], DEADLINE_S)[0]
    os.close(machine)


@pytest.mark.parametrize(
    ("options", "interrupts", "through_gateway"), [("", "msix", False), ("pci=nomsi", "intx", True)]
)
def test_the_stock_driver_uses_the_virtio_blk_device(
    environment: Environment,
    initramfs: Path,
    short_path: Path,
    options: str,
    interrupts: str,
    through_gateway: bool,
) -> None:
    """On the root bus with the device itself, behind a root port through a gateway."""
    with ExitStack() as stack:
        path = stack.enter_context(device(short_path))
        if through_gateway:
            path = stack.enter_context(gateway(short_path, path))
        spec = MachineSpec(
            short_path / "m",
            environment.kernel,
            initramfs,
            f"{PASSES} {options}",
            (VfioUserDevice(path, 4, root_port=through_gateway),),
        )
        report = run_guest(environment, spec)
    assert report.complaints() == []
    assert report.interrupts == interrupts
    assert report.passes == {"direct": 8, "synced": 2, "cached": 2}
    assert report.queue_depth is not None
    assert report.queue_depth > 1
    assert report.longest_io_us is not None


def test_damage_on_the_disk_is_noticed(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    """The load would be worth nothing if it did not see what a migration could break."""

    async def damage(guest: Guest, machine: Machine) -> None:
        await guest.wait(machine, lambda report: "load" in report.stages)
        half = (short_path / "device.img").stat().st_size // 2
        with (short_path / "device.img").open("r+b", buffering=0) as image:
            while not guest.report.errors:
                image.seek(half)
                image.write(b"damage" * 80_000)
                await trio.sleep(0.01)
                guest.look(machine)
        await machine.send_line("stop")

    with device(short_path) as path:
        spec = MachineSpec(
            short_path / "m",
            environment.kernel,
            initramfs,
            "ferry.workload=disk",
            (VfioUserDevice(path, 4),),
        )
        report = run_guest(environment, spec, damage)
    assert set(report.errors) == {"direct-checksum vda-job-0"}


def test_source_and_target_are_machines_that_qemu_can_migrate_between(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    async def main() -> Guest:
        guest = Guest()
        spec = MachineSpec(short_path / "a", environment.kernel, initramfs)
        target_spec = MachineSpec(short_path / "b", environment.kernel, initramfs, incoming=True)
        channel = f"unix:{short_path}/migration"
        with trio.fail_after(DEADLINE_S):
            async with (
                running(environment.qemu, spec) as source,
                running(environment.qemu, target_spec) as target,
                await QmpClient.connect(str(source.qmp)) as source_qmp,
                await QmpClient.connect(str(target.qmp)) as target_qmp,
            ):
                await guest.wait(source, lambda report: report.beats > 1)
                await target_qmp.execute("migrate-incoming", {"uri": channel})
                await source_qmp.execute("migrate", {"uri": channel})
                while True:
                    if (await target_qmp.execute("query-status"))["status"] == "paused":
                        break
                    await trio.sleep(0.05)
                guest.look(source)
                beats = guest.report.beats
                await target_qmp.execute("cont")
                await guest.wait(target, lambda report: report.beats > beats + 1)
                await target.send_line("stop")
                await guest.wait(target, lambda report: report.ended)
        return guest

    assert trio.run(main).report.complaints() == []
