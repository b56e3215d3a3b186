"""Linux's own nvme driver in a stock QEMU, at our controller."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from lab.qemu.environment import Environment
from lab.qemu.machine import MachineSpec, VfioUserDevice
from lab.qemu.two_hosts import Case, Rig
from lab.testbed import Setup, Testbed
from tests.qemu.moving import PATIENT, tell
from tests.qemu.test_guest import gateway, run_guest, serving

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(400)]

CONTROLLER = """
import sys
from lab.devices.nvme.main import NvmeOptions, run
run(NvmeOptions(socket_path=sys.argv[1], image_paths=sys.argv[2:], queues=2))
"""


@pytest.mark.parametrize("behind_a_gateway", [False, True])
def test_linux_uses_a_namespace_without_a_complaint(
    environment: Environment, initramfs: Path, short_path: Path, behind_a_gateway: bool
) -> None:
    image = short_path / "namespace.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(32 << 20)
    with serving(CONTROLLER, short_path, "nvme", image) as device:
        spec = MachineSpec(
            folder=short_path / "machine",
            kernel=environment.kernel,
            initramfs=initramfs,
            command_line="ferry.workload=disk ferry.disk=nvme0n1 ferry.passes=2",
            devices=(VfioUserDevice(device, 4),),
        )
        if not behind_a_gateway:
            report = run_guest(environment, spec)
        else:
            with gateway(short_path, device) as front:
                between = MachineSpec(
                    spec.folder,
                    spec.kernel,
                    spec.initramfs,
                    spec.command_line,
                    (VfioUserDevice(front, 4),),
                )
                report = run_guest(environment, between)
    assert report.complaints() == []


def test_linux_goes_on_at_another_controller(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    """Its stock driver, under load, by what the gateway makes of the controller's queues."""
    setup = Setup(gateway=("--queues",), image_bytes=32 << 20)

    async def main(rig: Rig) -> None:
        async with AsyncExitStack() as stack:
            with trio.fail_after(300):
                source = await rig.start(stack, "a", incoming=False)
                await rig.wait(source, lambda report: report.loads == 1)
                await rig.wait_writes(source, 100)
                target = await rig.start(stack, "b", incoming=True)
                sender = await rig.migrate(source, "ab", *PATIENT)
                tell(sender.wait_event("report"))
                await rig.wait_writes(target, 100)
                await rig.end(target)

    with Testbed(short_path / "bed", setup) as bed:
        rig = Rig(bed, environment, initramfs, Case("auto", "auto", loads=("nvme",)))
        try:
            trio.run(main, rig)
        except BaseException as error:
            for name, console in rig.consoles().items():
                error.add_note(f"{name}: {console}")
            raise
    assert rig.guest.report.complaints() == []
    assert rig.guest.report.interrupts == "msix"
