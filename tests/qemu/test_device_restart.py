"""A stock guest in a stock QEMU keeps its devices while their processes are replaced, and die.

The drivers are Linux's. After a replacement the guest has noticed nothing at all. A disk that died
comes back with what was under way.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from ferry.errors import Exit
from lab.qemu.environment import Environment
from lab.qemu.machine import Machine
from lab.qemu.two_hosts import Case
from lab.testbed import Process, Unit
from tests.qemu.moving import WatchedRig, run

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(400)]

DEADLINE_S = 360.0
TIMES = 20
WRITES = 20
TRANSFER_BYTES = 128 << 10
END_S = 30
DISK = Case("replay", "logging")
NATIVE = Case("v2", "logging")
NIC = Case("replay", "scan", interrupts="intx", loads=("net",))
BOTH = Case("replay", "message", loads=("disk", "net"))


class Slot:
    """A device of the guest: its gateway, and the process behind it."""

    def __init__(self, rig: WatchedRig, unit: Unit, load: str) -> None:
        self.gateway = unit
        self._rig = rig
        self._load = load
        self._current = unit
        self._number = 0

    def _start(self, unit: Unit) -> None:
        if self._load == "net":
            self._rig.bed.start_nic(unit, self._rig.hub, *self._rig.case.device_flags)
        else:
            self._rig.bed.start_device(unit)

    def replace(self) -> None:
        """By a new process; the old one is ended."""
        self._number += 1
        name = f"{self._load}{self._number}"
        unit = Unit(name, self.gateway.folder / name)
        unit.folder.mkdir(mode=0o700)
        self._start(unit)
        words = ("--gateway", self.gateway.control_socket, "--device", unit.device_socket)
        command: Process = self._rig.bed.start(f"replace {name}", "replace", *words, "--json")
        assert command.wait(END_S) == Exit.OK, command.tail()
        assert self._current.device is not None
        self._current.device.kill()
        self._current = unit

    def die(self) -> None:
        """SIGKILL, and a new process at the same place."""
        assert self._current.device is not None and self.gateway.gateway is not None
        self._current.device.kill()
        self._current.device_socket.unlink(missing_ok=True)
        events = self.gateway.gateway.events
        before = sum(event["event"] == "device-back" for event in events)
        self._start(self._current)
        self.gateway.gateway.wait_event(
            "device-back",
            END_S,
            where=lambda _: sum(event["event"] == "device-back" for event in events) > before,
        )


Step = Callable[[WatchedRig, Machine, list[Slot]], Awaitable[None]]


def go_on(
    environment: Environment, initramfs: Path, folder: Path, case: Case, step: Step, times: int
) -> None:
    """The guest boots, lives through `step` so many times, and ends its load."""

    async def body(rig: WatchedRig) -> None:
        async with AsyncExitStack() as stack:
            with trio.fail_after(DEADLINE_S):
                machine = await rig.boot(stack)
                host = rig.hosts["a"]
                slots = [
                    Slot(rig, unit, load) for unit, load in zip(host.units, case.loads, strict=True)
                ]
                for _ in range(times):
                    await step(rig, machine, slots)
                    await work_goes_on(rig, machine)
                await rig.end(machine)

    run(environment, initramfs, folder, case, body)


async def work_goes_on(rig: WatchedRig, machine: Machine) -> None:
    """Each load does more than what was under way."""
    writes = rig.guest.report.writes + WRITES
    peer = rig.peer
    ways = (peer.down, peer.up) if peer is not None else ()
    goals = [way.n_bytes + TRANSFER_BYTES for way in ways]

    def done() -> bool:
        moved = all(way.n_bytes >= goal for way, goal in zip(ways, goals, strict=True))
        return moved and ("disk" not in rig.case.loads or rig.guest.report.writes >= writes)

    await rig.wait(machine, lambda _: done())


async def replace_all(rig: WatchedRig, machine: Machine, slots: list[Slot]) -> None:
    for slot in slots:
        await trio.to_thread.run_sync(slot.replace)


async def all_die(rig: WatchedRig, machine: Machine, slots: list[Slot]) -> None:
    for slot in slots:
        await trio.to_thread.run_sync(slot.die)


@pytest.mark.parametrize("case", [DISK, NATIVE, NIC, BOTH], ids=["disk", "native", "nic", "both"])
def test_a_guest_does_not_notice_that_its_devices_are_replaced(
    environment: Environment, initramfs: Path, short_path: Path, case: Case
) -> None:
    go_on(environment, initramfs, short_path, case, replace_all, TIMES)


def test_a_guest_does_not_notice_that_its_disk_dies(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    go_on(environment, initramfs, short_path, DISK, all_die, TIMES)
