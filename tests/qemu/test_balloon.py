"""A balloon beside a device whose gateway may have pinned guest memory: QEMU must not give back
what the guest puts into it, or the device would keep pages that the guest does not have."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from lab.qemu.environment import Environment
from lab.qemu.initramfs import MODULES, build_initramfs, write_initramfs
from lab.qemu.machine import CONTROL, Guest, Machine, MachineSpec, VfioUserDevice, running
from sync.vmm.client import QmpClient
from tests.qemu.test_guest import DEADLINE_S, device, gateway

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(400)]

LEFT_BYTES = 128 << 20
BALLOON = ("sh", "-c", 'exec "$@" -device virtio-balloon-pci', "sh")


def allocated_bytes(machine: Machine) -> int:
    """How much of the guest's RAM is there."""
    (ram,) = (
        path
        for path in Path(f"/proc/{machine.pid}/fd").iterdir()
        if str(path.readlink()).startswith("/memfd:")
    )
    return ram.stat().st_blocks * 512


async def inflate(machine: Machine) -> tuple[int, int]:
    """What of the guest's RAM is there before, and once all but `LEFT_BYTES` is in the balloon."""
    client = await QmpClient.connect(str(machine.spec.folder / CONTROL), deadline_s=DEADLINE_S)
    async with client:
        before = allocated_bytes(machine)
        await client.execute("balloon", {"value": LEFT_BYTES})
        while (await client.execute("query-balloon"))["actual"] != LEFT_BYTES:  # noqa: ASYNC110
            await trio.sleep(0.1)
        return before, allocated_bytes(machine)


@pytest.mark.parametrize("behind_a_gateway", [False, True])
def test_what_is_in_a_balloon_stays_with_a_guest_that_has_a_device_behind_a_gateway(
    environment: Environment, short_path: Path, behind_a_gateway: bool
) -> None:
    image = short_path / "initramfs.cpio"
    write_initramfs(image, build_initramfs(environment, modules=(*MODULES, "virtio_balloon")))

    async def main() -> tuple[int, int]:
        async with running(environment.qemu, spec) as machine:
            with trio.fail_after(DEADLINE_S):
                await Guest().wait(machine, lambda report: "ready" in report.stages)
                return await inflate(machine)

    with ExitStack() as stack:
        devices: tuple[VfioUserDevice, ...] = ()
        if behind_a_gateway:
            front = stack.enter_context(
                gateway(short_path, stack.enter_context(device(short_path)))
            )
            devices = (VfioUserDevice(front, 4),)
        spec = MachineSpec(
            short_path / "m", environment.kernel, image, devices=devices, prefix=BALLOON
        )
        before, after = trio.run(main)
    in_balloon = spec.memory_bytes - LEFT_BYTES
    if behind_a_gateway:
        assert after >= max(before, in_balloon)
    else:
        assert after < spec.memory_bytes - in_balloon // 2
