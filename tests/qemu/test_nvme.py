"""Linux's own nvme driver in a stock QEMU, at our controller."""

from pathlib import Path

import pytest

from lab.qemu.environment import Environment
from lab.qemu.initramfs import MODULES, build_initramfs, write_initramfs
from lab.qemu.machine import MachineSpec, VfioUserDevice
from tests.qemu.test_guest import gateway, run_guest, serving

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(400)]

CONTROLLER = """
import sys
from lab.devices.nvme.main import NvmeOptions, run
run(NvmeOptions(socket_path=sys.argv[1], image_paths=sys.argv[2:], queues=2))
"""


@pytest.mark.parametrize("behind_a_gateway", [False, True])
def test_linux_uses_a_namespace_without_a_complaint(
    environment: Environment, short_path: Path, behind_a_gateway: bool
) -> None:
    image = short_path / "namespace.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(32 << 20)
    initramfs = short_path / "initramfs.cpio"
    write_initramfs(initramfs, build_initramfs(environment, modules=(*MODULES, "nvme")))
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
