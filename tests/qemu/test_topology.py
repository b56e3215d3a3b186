"""Where a stock QEMU has a device: root buses have numbers of their own. No guest runs."""

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from lab.qemu.environment import Environment
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmNotReady
from sync.vmm.pci import Way, way_to

pytestmark = pytest.mark.qemu

RNG = "/machine/peripheral/rng"
MACHINES = {
    "root bus": ("q35", ["virtio-rng-pci,id=rng,addr=7"], [7 << 3], 0),
    "pxb-pcie": (
        "q35",
        [
            "pxb-pcie,bus_nr=0x80,id=far,bus=pcie.0",
            "pcie-root-port,id=rp,bus=far,chassis=1,addr=3",
            "virtio-rng-pci,id=rng,bus=rp",
        ],
        [0, 3 << 3],
        0x80,
    ),
    "pxb": (
        "pc",
        ["pxb,bus_nr=0x40,id=far,bus=pci.0", "virtio-rng-pci,id=rng,bus=far,addr=2"],
        [2 << 3, 0],
        0x40,
    ),
    "pxb-pcie without an id": (
        "q35",
        [
            "pxb-pcie,bus_nr=0x80,bus=pcie.0",
            "pcie-root-port,id=rp,bus=pxb-pcie-bus.0,chassis=1",
            "virtio-rng-pci,id=rng,bus=rp",
        ],
        [],
        0,
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_way_to_a_device(environment: Environment, short_path: Path, machine: str) -> None:
    kind, devices, devfns, root_bus = MACHINES[machine]
    socket = short_path / "qmp"
    arguments = ["-M", f"{kind},accel=tcg", "-m", "64", "-S", "-nodefaults", "-display", "none"]
    for device in devices:
        arguments += ["-device", device]
    arguments += ["-qmp", f"unix:{socket},server=on,wait=off"]

    async def ask() -> Way | None:
        async with await Vmm.connect(str(socket), deadline_s=30) as vmm:
            with suppress(VmmNotReady):
                return await way_to(vmm, RNG)
            return None

    with subprocess.Popen([environment.qemu.program, *arguments]) as qemu:
        try:
            way = trio.run(ask)
        finally:
            qemu.kill()
    assert (way and (way.devfns, way.root_bus)) == ((devfns, root_bus) if devfns else None)
