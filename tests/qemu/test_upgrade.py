"""Gateways are upgraded under a stock QEMU whose guest's virtio-blk works all the while."""

import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from lab.qemu.environment import Environment
from lab.qemu.two_hosts import Case
from sync.gateway.control.blocking import upgrade
from tests.qemu.moving import DEADLINE_S, WatchedRig, run

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(400)]

TIMES = 5
UPGRADE_S = 60.0


def test_i9_a_stock_guest_does_not_notice_that_its_gateway_is_upgraded(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    async def body(rig: WatchedRig) -> None:
        pid = 0
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                machine = await rig.boot(stack)
                host = rig.bed.hosts["a"]
                for _ in range(TIMES):
                    pid = (
                        await trio.to_thread.run_sync(upgrade, str(host.control_socket), UPGRADE_S)
                    ).pid
                    await rig.wait_work(machine)
                await rig.end(machine)
        os.kill(pid, signal.SIGKILL)
        assert host.gateway is not None
        seen = [event for event in host.gateway.events if event["event"] == "took-over"]
        print("the guest waited for (ms):", [event["pause_ms"] for event in seen])
        assert len(seen) == TIMES

    run(environment, initramfs, short_path, Case("replay", "logging"), body)
