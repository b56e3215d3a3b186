"""Equal devices of one QEMU are told apart by the sockets that it was given (I11)."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from ferry.errors import Exit
from lab.qemu.environment import Environment
from lab.qemu.two_hosts import MIGRATION_S, Case, QemuHost
from lab.testbed import Process
from tests.qemu.moving import DEADLINE_S, WatchedRig, run

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(300)]

in_thread = trio.to_thread.run_sync


def test_two_equal_disks_in_another_order_are_refused(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    async def body(rig: WatchedRig) -> None:
        for host in rig.hosts.values():
            second = host.add_unit("second")
            rig.bed.start_device(second)
            rig.bed.start_gateway(second)
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                await rig.start(stack, "a", incoming=False)
                await rig.start(stack, "b", incoming=True)
                assert await in_thread(check, rig, rig.hosts["b"].control_flags) == Exit.OK
                flags = rig.hosts["b"].control_flags
                swapped = [flags[0], flags[3], flags[2], flags[1]]
                assert await in_thread(check, rig, swapped) == Exit.REFUSED
                assert "give --gateway in the same order" in rig.bed.processes[-1].tail()

    run(environment, initramfs, short_path, Case("replay", "logging"), body, ends=False)


def check(rig: WatchedRig, gateways: list[object]) -> int:
    """How `send --check` ends when `receive` is given `gateways`."""
    a, b = rig.hosts["a"], rig.hosts["b"]
    receiver = receive(rig, b, gateways)
    code = rig.bed.send(a, b, "--check").wait(MIGRATION_S)
    receiver.kill()
    return code


def receive(rig: WatchedRig, host: QemuHost, gateways: list[object]) -> Process:
    receiver = rig.bed.start(
        "receive b",
        *("receive", "--listen", f"ipc://{host.folder}/link.sock", "--json"),
        *(*gateways, "--qmp", host.qmp_socket),
    )
    receiver.wait_event("listening")
    return receiver
