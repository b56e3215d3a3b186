"""I6: what the VMM's stream brings late does not stay over pages that were brought up to date.

QEMU sends a page, the device writes it, our round brings it up to date, and only then does the
target's QEMU get to load what it was sent. It is not sent again: the source's QEMU has not seen the
device's write. Here all of the stream is late: the target's QEMU loads it after the last round.
"""

import random
import re
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.errors import Exit
from lab.qemu.environment import Environment
from lab.qemu.initramfs import build_initramfs, write_initramfs
from lab.qemu.two_hosts import MIGRATION_S, Case
from tests.qemu.moving import DEADLINE_S, IMAGE_BYTES, WatchedRig, run
from tests.qemu.proxy import CHUNK_BYTES, LateProxy, Proxy

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(800)]

POLL_S = 0.02
BANDWIDTH = "64M"
"""So that the device writes much between QEMU's first pass over the memory and the switchover."""
READING = """
. /lib/ferry.sh
until [ -b /dev/vda ]; do sleep 0.1; done
expected=$(checksum < /dev/vda)
report load disk=vda
while ! stopped; do
    echo 1 > /proc/sys/vm/drop_caches
    [ "$(checksum < /dev/vda)" = "$expected" ] || error read-checksum vda
    [ "$(checksum < /dev/vda)" = "$expected" ] || error cache-checksum vda
done
"""
"""The device fills page after page of the guest's cache, which the guest itself only reads: QEMU
sees none of it, and does not send them again."""
ONLY_THE_DEVICE_WRITES = "init_on_alloc=0"
"""Else the guest clears each page before the device fills it: QEMU sees that and sends it again."""
PASSES_BEATS = 50
"""Some 10 s: enough to read what is in the cache."""
STREAM = re.compile(rb'"unix:([^"]+)"')


class ReadingCase(Case):
    """A guest that only reads."""

    @property
    def kernel_options(self) -> str:
        return f"{super().kernel_options} {ONLY_THE_DEVICE_WRITES}"


class DivertingQmp(Proxy):
    """QMP of the target's QEMU, which is told to take its stream from behind a `LateProxy`."""

    def __init__(self, path: Path, behind: Path, nursery: trio.Nursery) -> None:
        super().__init__(path, behind)
        self._nursery = nursery
        self.stream: LateProxy | None = None

    async def _carry_there(
        self, near: trio.SocketStream, far: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        while data := await near.receive_some(CHUNK_BYTES):
            command = bytes(data)
            if b"migrate-incoming" in command:
                command = await self._divert(command)
            await far.send_all(command)
        scope.cancel()

    async def _divert(self, command: bytes) -> bytes:
        match = STREAM.search(command)
        assert match is not None, command
        behind = self.path.with_name("incoming")
        self.stream = LateProxy(Path(match[1].decode()), behind)
        await self._nursery.start(self.stream.serve)
        return command.replace(match[1], str(behind).encode())


@pytest.mark.parametrize(
    "case",
    [
        ReadingCase("replay", "logging", loads=("reading",)),
        ReadingCase("v2", "message", interrupts="intx", loads=("reading",)),
    ],
    ids=str,
)
def test_i6_old_pages_in_the_vmms_stream_do_not_stay(
    environment: Environment, short_path: Path, case: Case
) -> None:
    initramfs = short_path / "initramfs.cpio"
    workloads = {"reading": READING}
    write_initramfs(initramfs, build_initramfs(environment, workloads=workloads))

    async def body(rig: WatchedRig) -> None:
        a, b = rig.hosts["a"], rig.hosts["b"]
        events: list[dict[str, Any]] = []
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                rig.bed.image.write_bytes(random.randbytes(IMAGE_BYTES))
                source = await rig.boot(stack)
                target = await rig.start(stack, "b", incoming=True)
                async with trio.open_nursery() as nursery:
                    qmp = DivertingQmp(b.folder / "qmp", b.qmp_socket, nursery)
                    await nursery.start(qmp.serve)
                    receiver = await trio.to_thread.run_sync(rig.bed.receive, b, "--qmp", qmp.path)
                    slowly = ("--bandwidth", BANDWIDTH)
                    sender = rig.bed.send(a, b, *case.flags, *slowly, on_event=events.append)
                    while sender.running or receiver.running:
                        rig.guest.look(source)
                        if qmp.stream is not None and the_last_round_is_over(events):
                            qmp.stream.released.set()
                        await trio.sleep(POLL_S)
                    nursery.cancel_scope.cancel()
                for process in (sender, receiver):
                    assert process.wait(MIGRATION_S) == Exit.OK, process.tail()
                assert qmp.stream is not None
                verification = sender.wait_event("report")["verification"]
                print(qmp.stream.held_bytes, verification)
                assert verification["repaired_pages"] > 0
                beats = rig.guest.report.beats + PASSES_BEATS
                await rig.wait(target, lambda report: report.beats >= beats)
                await rig.end(target)

    run(environment, initramfs, short_path, case, body)


def the_last_round_is_over(events: list[dict[str, Any]]) -> bool:
    names = [event.get("phase", event["event"]) for event in list(events)]
    return "finalizing" in names and "round" in names[names.index("finalizing") :]
