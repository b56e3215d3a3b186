"""The link is cut again and again while a stock QEMU's stream, opened or as it is, crosses it."""

from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import trio

from ferry.errors import Exit
from lab.qemu.environment import Environment
from lab.qemu.two_hosts import MIGRATION_S, Case
from tests.qemu.moving import WatchedRig, run
from tests.qemu.proxy import Proxy

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(800), pytest.mark.full]

CUTS = 20
POLL_S = 0.05

in_thread = trio.to_thread.run_sync


@pytest.mark.parametrize("stream", ["open", "closed"])
def test_i3_the_guest_does_not_notice_that_the_link_is_cut(
    environment: Environment, initramfs: Path, short_path: Path, stream: str
) -> None:
    async def body(rig: WatchedRig) -> None:
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            source = await rig.boot(stack)
            target = await rig.start(stack, "b", incoming=True)
            a, b = rig.hosts["a"], rig.hosts["b"]
            link = Proxy(b.folder / "link", b.folder / "link.sock")
            await nursery.start(link.serve)
            steer = ("--control-socket", str(rig.bed.folder / "steer"))
            receiver = await in_thread(rig.bed.receive, b)
            endless = ("--downtime-limit", "1", "--max-rounds", "100000", *steer)
            flags = (*rig.case.flags, "--vmm-stream", stream, *endless)
            sender = rig.bed.send(a, b, *flags, "--to", f"ipc://{link.path}")
            await in_thread(sender.wait_event, "progress")
            for _ in range(CUTS):
                link.cut(for_good=False)
                await trio.sleep(0.3)
                rig.guest.look(source)
                assert sender.running, sender.tail()
            words = ("set", "--downtime-limit", "1000", *steer)
            steering = rig.bed.start("set", *words)
            assert await in_thread(steering.wait, MIGRATION_S) == Exit.OK, steering.tail()
            with trio.fail_after(MIGRATION_S):
                while sender.running or receiver.running:
                    rig.guest.look(source)
                    await trio.sleep(POLL_S)
            assert await in_thread(partial(sender.wait, 1)) == Exit.OK, sender.tail()
            assert await in_thread(partial(receiver.wait, 1)) == Exit.OK, receiver.tail()
            report = sender.wait_event("report")
            assert report["vmm_stream"]["form"] == stream
            assert 0 < report["link"]["resumed"] <= CUTS
            await rig.wait_work(target)
            await rig.end(target)
            nursery.cancel_scope.cancel()

    run(environment, initramfs, short_path, Case("replay", "logging"), body)
