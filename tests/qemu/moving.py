"""What the tests share that migrate a guest under QEMU: its way, and the verdict on it.

All processes are real: QEMU, devices, gateways, `send` and `receive` on either side. The guest's
own report is the judge: no checksum error, no I/O error, nothing in its log.
"""

import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio

from lab.qemu.environment import Environment
from lab.qemu.errors import LanUnavailable
from lab.qemu.lan import Peer, open_lan
from lab.qemu.machine import Machine
from lab.qemu.two_hosts import Case, Rig
from lab.testbed import Setup, Testbed

DEADLINE_S = 280.0
WRITES = 100
"""Requests of the guest before the migration, and as many after it."""
TRANSFER_BYTES = 1 << 20
"""What a guest with a NIC takes, and sends, before the migration, and as much after it."""
IMAGE_BYTES = 32 << 20
PATIENT = ("--downtime-limit", "3000")
"""What is left fits into this, however busy the machine is: a VMM may pause its guest by itself,
which then waits for the devices' pages."""


class WatchedRig(Rig):
    """A rig whose guest has a peer on its network, if it has a NIC."""

    peer: Peer | None = None

    async def boot(self, stack: AsyncExitStack) -> Machine:
        """The source on host a, its guest well under load."""
        source = await self.start(stack, "a", incoming=False)
        await self.wait_loads(source)
        await self.wait_work(source)
        return source

    async def wait_loads(self, machine: Machine) -> None:
        """Until all of the load has begun."""
        expected = {"express"} if self.case.express else set()
        await self.wait(
            machine,
            lambda report: report.loads == len(self.case.loads) and expected <= report.stages,
        )

    async def wait_work(self, machine: Machine) -> None:
        """Until each load has gone on for a good while."""
        goals = [now + more for now, more in self._work()]
        await self.wait(
            machine,
            lambda _: all(now >= goal for (now, _), goal in zip(self._work(), goals, strict=True)),
        )

    def _work(self) -> list[tuple[int, int]]:
        """For each thing that the loads do: how much is done, and how much more is a good deal."""
        work = [(self.guest.report.writes, WRITES)] if "disk" in self.case.loads else []
        if self.peer is not None:
            work += [(way.n_bytes, TRANSFER_BYTES) for way in (self.peer.down, self.peer.up)]
        return work

    def judge(self) -> None:
        """The guest has ended: it and its peer have noticed nothing."""
        report, peer = self.guest.report, self.peer
        print(report, self.guest.longest_silence_s)
        assert report.complaints() == []
        if "disk" in self.case.loads:
            assert report.interrupts == self.case.interrupts
        if peer is not None:
            print(peer.ping)
            assert peer.down.ended
            assert peer.up.ended
            assert report.streams == {"down": peer.down.sha256, "up": peer.up.sha256}
            assert peer.wrong_checksums() == 0
            assert peer.ping.answered


def unable(reason: str) -> NoReturn:
    """What a test needs cannot be had here: it is skipped, but in CI it fails."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def tell(report: dict[str, Any]) -> None:
    """What the migration took, for the log of the test."""
    for key in ("methods", "downtime_total_ms", "downtime_own_ms", "downtime_ms", "registers"):
        print(key, report[key])
    print("verification", {k: v for k, v in report["verification"].items() if k != "regions"})
    print("rounds", len(report["rounds"]), "duration", report["duration_s"])


def run(
    environment: Environment,
    initramfs: Path,
    folder: Path,
    case: Case,
    body: Callable[[WatchedRig], Awaitable[None]],
    *,
    ends: bool = True,
) -> None:
    """Runs `body`, which has the guest end its load, and judges what it reports; not where the
    guest comes to no end."""
    setup = Setup(device=tuple(case.device_flags), image_bytes=IMAGE_BYTES)
    with Testbed(folder / "bed", setup) as bed:
        rig = WatchedRig(bed, environment, initramfs, case)

        async def main() -> None:
            async with AsyncExitStack() as stack:
                if "net" in case.loads:
                    rig.peer = await stack.enter_async_context(open_lan(rig.hub))
                await body(rig)
                if ends:
                    rig.judge()

        try:
            trio.run(main)
        except LanUnavailable as error:
            unable(str(error))
        except BaseException as error:
            for name, console in rig.consoles().items():
                error.add_note(f"{name}: {console}")
            raise


async def migrate_once(rig: WatchedRig) -> None:
    """The guest goes from one host to the other under load."""
    async with AsyncExitStack() as stack:
        with trio.fail_after(DEADLINE_S):
            source = await rig.boot(stack)
            target = await rig.start(stack, "b", incoming=True)
            sender = await rig.migrate(source, "ab", *PATIENT)
            report = sender.wait_event("report")
            tell(report)
            assert report["vmm_stream"]["form"] == "open"
            assert report["vmm_stream"]["tail_bytes"] < 2 << 20
            await rig.wait_work(target)
            await rig.end(target)


async def go_there_and_back(rig: WatchedRig, times: int) -> None:
    """The guest goes to the other host and comes back, `times` times."""
    async with AsyncExitStack() as last, AsyncExitStack() as first:
        with trio.fail_after(times * DEADLINE_S):
            stack = first
            source = await rig.start(stack, "a", incoming=False)
            await rig.wait_loads(source)
            for way in ("ab", "ba") * times:
                await rig.wait_work(source)
                following = await last.enter_async_context(AsyncExitStack())
                target = await rig.start(following, way[1], incoming=True)
                await rig.migrate(source, way, *PATIENT)
                await stack.aclose()
                stack, source = following, target
            await rig.wait_work(source)
            await rig.end(source)
