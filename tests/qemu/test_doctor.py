"""`doctor` and `send --check` with a stock guest in a stock QEMU, which then migrates."""

from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.errors import Exit
from lab.qemu.environment import Environment
from lab.qemu.two_hosts import MIGRATION_S, Case
from sync.vmm.driver import Vmm
from tests.qemu.moving import DEADLINE_S, WatchedRig, run

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(400)]

CASE = Case("replay", "message", root_port=True)


def examine(rig: WatchedRig, name: str) -> tuple[int, dict[str, str]]:
    """The doctor's exit code and, by check, the last finding for host `name`."""
    host = rig.hosts[name]
    words = ("doctor", "--json", *host.control_flags, "--qmp", host.qmp_socket)
    process = rig.bed.start(f"doctor {name}", *words)
    code = process.wait(MIGRATION_S)
    findings: list[dict[str, Any]] = [e for e in process.events if e["event"] == "finding"]
    return code, {finding["check"]: finding["text"] for finding in findings}


async def chardevs(path: Path) -> list[str]:
    async with await Vmm.connect(str(path)) as vmm:
        return [chardev["label"] for chardev in await vmm.execute("query-chardev")]


def test_both_say_that_it_works_and_it_does(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    async def body(rig: WatchedRig) -> None:
        in_thread = trio.to_thread.run_sync
        a, b = rig.hosts["a"], rig.hosts["b"]
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                source = await rig.start(stack, "a", incoming=False)
                target = await rig.start(stack, "b", incoming=True)
                await rig.wait_loads(source)
                for name, part in (("a", "source"), ("b", "target")):
                    before = await chardevs(rig.hosts[name].qmp_socket)
                    code, found = await in_thread(examine, rig, name)
                    assert code == Exit.OK, found
                    assert part in found["guest"]
                    assert found["RAM"] == "shared: ram of 256 MiB"
                    assert "behind the bridge at 04.0" in found["device"]
                    assert found["device 1af4:1042"].endswith(
                        "registers by replay, dirty pages by message"
                    )
                    assert "to be had" in found["qtest"]
                    assert await chardevs(rig.hosts[name].qmp_socket) == before
                receiver = await in_thread(rig.bed.receive, b)
                for flags in (("--check",), ()):
                    await rig.wait_work(source)
                    sender = await in_thread(partial(rig.bed.send, a, b, *CASE.flags, *flags))
                    code = await in_thread(sender.wait, MIGRATION_S)
                    assert code == Exit.OK, (sender.tail(), receiver.tail())
                assert await in_thread(receiver.wait, MIGRATION_S) == Exit.OK
                await rig.wait_work(target)
                await rig.end(target)

    run(environment, initramfs, short_path, CASE, body)
