"""Two hosts on this machine whose VMM is a QEMU, and one guest under load that moves between them.

For the demo and the tests. Owns which machine and devices a host gets, and a migration that has to
succeed.
The processes are `lab.testbed`'s, QEMU and what the guest says are `machine`'s.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from lab.demo import device_flags
from lab.qemu.environment import Environment
from lab.qemu.machine import CONSOLE_LOG, Guest, Machine, MachineSpec, VfioUserDevice, running
from lab.qemu.report import GuestReport
from lab.testbed import Host, Process, Testbed, TestbedError

MIGRATION_S = 240.0
LOOK_S = 0.02
"""How often the guest's report is read while it migrates: its longest silence is told as exact."""
SLOT = 4
"""The first device's place on the root bus, or its root port's."""


@dataclass(frozen=True)
class Case:
    """How the guest uses its devices, and how they move."""

    registers: str
    dirty: str
    interrupts: str = "msix"
    root_port: bool = False
    express: bool = False
    """The disk is a PCI Express device, with registers above the first 256 bytes."""
    loads: tuple[str, ...] = ("disk",)
    """What the guest's workloads use, a device each: `disk`, `net`, or `nvme` for a disk that is a
    namespace."""

    def __str__(self) -> str:
        place = "root-port" if self.root_port else "root-bus"
        kind = "-express" if self.express else ""
        return f"{self.interrupts}-{self.registers}-{self.dirty}-{place}{kind}"

    @property
    def kernel_options(self) -> str:
        loads = [load.replace("nvme", "disk") for load in self.loads]
        workloads = [*loads, "express"] if self.express else loads
        options = f"ferry.workload={','.join(workloads)}"
        if "nvme" in self.loads:
            options += " ferry.disk=nvme0n1"
        return f"{options} pci=nomsi" if self.interrupts == "intx" else options

    @property
    def flags(self) -> tuple[str, ...]:
        """The options of `send`."""
        return ("--registers", self.registers, "--dirty", self.dirty)

    @property
    def device_flags(self) -> list[str]:
        """The options of a device that offers what it takes."""
        return device_flags(self.registers, self.dirty) + ["--express"] * self.express


class QemuHost(Host):
    """A side whose VMM is a QEMU."""

    @property
    def machine_folder(self) -> Path:
        return self.folder / "m"

    @property
    def qmp_socket(self) -> Path:
        return self.machine_folder / "qmp"


class Rig:
    """Two hosts with the same devices and one QEMU guest that goes from one to the other."""

    def __init__(
        self,
        bed: Testbed,
        environment: Environment,
        initramfs: Path,
        case: Case,
        memory_bytes: int = 256 << 20,
    ) -> None:
        self.bed = bed
        self.environment = environment
        self.initramfs = initramfs
        self.case = case
        self.memory_bytes = memory_bytes
        self.guest = Guest()
        self.hosts = {name: QemuHost(name, host.folder) for name, host in bed.hosts.items()}
        bed.hosts = dict(self.hosts)

    @property
    def hub(self) -> Path:
        """Where the cables of the NICs end."""
        return self.bed.folder / "hub"

    async def start(self, stack: AsyncExitStack, name: str, *, incoming: bool) -> Machine:
        """QEMU on host `name`, and its devices and gateways where they do not run yet."""
        host = self.hosts[name]
        if host.gateway is None:
            await trio.to_thread.run_sync(self._start_devices, host)
        spec = MachineSpec(
            host.machine_folder,
            self.environment.kernel,
            self.initramfs,
            self.case.kernel_options,
            tuple(
                VfioUserDevice(unit.gateway_socket, SLOT + number, root_port=self.case.root_port)
                for number, unit in enumerate(host.units)
            ),
            memory_bytes=self.memory_bytes,
            incoming=incoming,
            prefix=self.bed.inside.get(name, ()),
        )
        return await stack.enter_async_context(running(self.environment.qemu, spec))

    def _start_devices(self, host: Host) -> None:
        first, *others = self.case.loads
        for load, unit in [(first, host), *((load, host.add_unit(load)) for load in others)]:
            if load == "net":
                self.bed.start_nic(unit, self.hub, *self.case.device_flags)
            elif load == "nvme" and not unit.function:
                self.bed.start_nvme(unit)
            elif not unit.function:
                self.bed.start_device(unit)
            self.bed.start_gateway(unit)

    async def migrate(
        self,
        source: Machine,
        way: str,
        *flags: str,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> Process:
        """From host `way[0]`, where `source` runs, to host `way[1]`. Returns the sender.

        `flags` are further options of `send`. Raises `TestbedError` unless both sides succeed.
        """
        a, b = (self.hosts[name] for name in way)

        def start() -> tuple[Process, Process]:
            receiver = self.bed.receive(b, on_event=on_event)
            return self.bed.send(a, b, *self.case.flags, *flags, on_event=on_event), receiver

        processes = await trio.to_thread.run_sync(start)
        with trio.move_on_after(MIGRATION_S):
            while any(process.running for process in processes):
                self.guest.look(source)
                await trio.sleep(LOOK_S)
        for process in processes:
            if await trio.to_thread.run_sync(process.wait, LOOK_S):
                raise TestbedError(f"the migration failed: {process.tail()}")
        self.guest.look(source)
        return processes[0]

    async def wait(self, machine: Machine, ready: Callable[[GuestReport], bool]) -> None:
        await self.guest.wait(machine, ready)

    async def wait_writes(self, machine: Machine, more: int) -> None:
        """Until the guest has written `more` times than now."""
        goal = self.guest.report.writes + more
        await self.guest.wait(machine, lambda report: report.writes >= goal)

    async def end(self, machine: Machine) -> None:
        """Ends the load; the guest then checks its file system and its log."""
        await machine.send_line("stop")
        await self.wait(machine, lambda report: report.ended)

    def consoles(self) -> dict[str, str]:
        """By host: the end of what the guest and its firmware wrote on the first serial line."""
        logs = {name: host.machine_folder / CONSOLE_LOG for name, host in self.hosts.items()}
        return {
            name: log.read_text(errors="replace")[-1000:]
            for name, log in logs.items()
            if log.exists()
        }
