"""A real guest that is moved while it runs from one QEMU to another: by us, or by QEMU alone.

Owns the two machines and what is seen of them from outside, the same way whoever moves them: when
the guest stood still (QEMU's own events STOP and RESUME, by one clock), how much of its work it
does, and what all processes of a side take of the processors; the guest's own threads do not count.
Moved by us the guest has a pass-through device, which QEMU alone could not move. The guest and its
work are `perf.workloads.writers`'.
"""

import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from ferry.nurseries import alongside
from lab.qemu.environment import Environment
from lab.qemu.initramfs import build_initramfs, write_initramfs
from lab.qemu.machine import CONTROL, Machine, MachineSpec, VfioUserDevice, running
from lab.qemu.report import ReportReader
from lab.qemu.two_hosts import QemuHost
from lab.testbed import Host, Process, Setup, Testbed
from perf.baselines import DEADLINE_S
from perf.baselines.qemu import Setting, listen_address, set_up, to
from perf.child import cpu_seconds_of
from perf.errors import BenchmarkFailed
from perf.links import Link
from perf.workloads import writers
from sync.vmm.client import QmpClient
from sync.vmm.errors import VmmError

BOOT_S = 120.0
POLL_S = 0.01
DEVICE = ("--logging", "4096")
SLOT = 4


@dataclass(frozen=True)
class Guest:
    """What is moved."""

    environment: Environment
    content: Path
    """The image that its memory is filled from."""
    memory_bytes: int
    writer: str
    set_mib: int


@dataclass(frozen=True)
class Terms:
    """How it is moved, the same for everybody."""

    downtime_limit_ms: int
    settle_s: float
    """The guest's work is watched for so long before it is moved."""
    deadline_s: float = DEADLINE_S
    """Whoever is not done by then does not come to an end."""


@dataclass(frozen=True)
class Move:
    """What was seen of one move."""

    command_s: float
    """From the command to the guest running at the target."""
    migration_s: float
    """From the source's QEMU beginning to migrate to the guest running at the target."""
    wire_bytes: int
    """What the moving programs say that they sent."""
    downtime_ms: float
    work: float
    """The guest's work while it was moved and ran, of that before; 1 if it does not work."""
    source_cpu_s: float
    target_cpu_s: float
    lanes_share: float | None = None
    """Of our bytes: those of pages."""
    send_bytes: int | None = None
    """The most memory that `send` had of its own."""

    @property
    def cpu_s(self) -> float:
        return self.source_cpu_s + self.target_cpu_s


async def move(guest: Guest, setting: Setting | None, link: Link, terms: Terms) -> Move | None:
    """Boots `guest` and moves it over `link`: by QEMU with that setting, or by us. None: it did not
    come to an end by the deadline. Raises `BenchmarkFailed`."""
    with (
        tempfile.TemporaryDirectory(prefix="ferry-bench-") as name,
        Testbed(Path(name), Setup(device=DEVICE)) as bed,
    ):
        image = bed.folder / "initramfs"
        scripts = {writers.NAME: writers.SCRIPT}
        write_initramfs(image, build_initramfs(guest.environment, workloads=scripts))
        bed.inside = {"a": link.source_prefix, "b": link.target_prefix}
        bed.hosts = {name: QemuHost(name, host.folder) for name, host in bed.hosts.items()}
        has_device = setting is None
        async with AsyncExitStack() as stack:
            a, b = [
                await stack.enter_async_context(_side(bed, host, guest, image, has_device))
                for host in bed.hosts.values()
            ]
            watched = Watched(a, b)
            async with alongside(watched.run):
                await watched.wait_loaded()
                await trio.sleep(terms.settle_s)
                found = None
                with trio.move_on_after(terms.deadline_s):
                    if setting is None:
                        found = await _by_us(bed, watched, link, terms)
                    else:
                        found = await _by_qemu(watched, setting, link, terms, bed.folder)
    return found


@dataclass
class Side:
    """One of the two machines, and everything of that host that takes part."""

    host: Host
    machine: Machine
    control: QmpClient
    processors: list[int]
    """The threads that run the guest."""
    helpers: list[Process] = field(default_factory=list)
    cpu_s_of: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """Notes what the processes have taken so far: one that ends cannot be asked any more."""
        for pid in (self.machine.pid, *(each.pid for each in self.helpers)):
            with suppress(OSError):
                self.cpu_s_of[pid] = cpu_seconds_of(pid)
        with suppress(OSError):
            for thread in self.processors:
                path = Path(f"/proc/{self.machine.pid}/task/{thread}/schedstat")
                self.cpu_s_of[-thread] = -int(path.read_text().split()[0]) / 1e9

    @property
    def cpu_s(self) -> float:
        return sum(self.cpu_s_of.values())


class Watched:
    """Both sides as they are seen while `run` runs."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        self._reader = ReportReader()
        self._stages = set[str]()
        self._pieces: list[float] = []
        """When each piece of the guest's work was seen."""
        self.send_bytes = 0

    async def run(self) -> None:
        while True:
            for side in (self.a, self.b):
                side.look()
                for event in self._reader.feed(side.machine.read_report()):
                    self._stages.add(event.name)
                    if event.name == "work":
                        self._pieces.append(time.time())
            for process in self.a.helpers:
                if process.name.startswith("send"):
                    self.send_bytes = max(self.send_bytes, _own_bytes(process.pid))
            await trio.sleep(POLL_S)

    async def wait_loaded(self) -> None:
        with trio.move_on_after(BOOT_S):
            while "load" not in self._stages:
                if "error" in self._stages:
                    raise BenchmarkFailed("the guest cannot begin its work")
                await trio.sleep(POLL_S)
            return
        raise BenchmarkFailed(f"the guest does not begin within {BOOT_S:g} s")

    async def seen(
        self,
        begin: Callable[[], Awaitable[None]],
        ended: Callable[[], Awaitable[None]],
        terms: Terms,
    ) -> dict[str, Any]:
        """`begin`s, waits until `ended` and the guest runs at the target; all that `Move` has but
        the bytes."""
        marks = self.a.control.events_seen, self.b.control.events_seen
        for side in (self.a, self.b):
            side.look()
        spent = self.a.cpu_s, self.b.cpu_s
        began = time.time()
        await begin()
        resumed = await _event(self.b.control, "RESUME", marks[1])
        completed = await _event(self.a.control, "MIGRATION", marks[0], status="completed")
        stopped = await _event(self.a.control, "STOP", marks[0])
        took_ms = (await self.a.control.execute("query-migrate"))["total-time"]
        await ended()
        during = self._rate(began, stopped)
        before = self._rate(began - terms.settle_s, began)
        return {
            "command_s": resumed - began,
            "migration_s": resumed - completed + took_ms / 1e3,
            "downtime_ms": (resumed - stopped) * 1e3,
            "work": during / before if before else 1.0,
            "source_cpu_s": self.a.cpu_s - spent[0],
            "target_cpu_s": self.b.cpu_s - spent[1],
        }

    def _rate(self, begin: float, end: float) -> float:
        return sum(begin <= at < end for at in self._pieces) / max(end - begin, POLL_S)


@asynccontextmanager
async def _side(
    bed: Testbed, host: Host, guest: Guest, image: Path, has_device: bool
) -> AsyncIterator[Side]:
    incoming = host.name == "b"
    if has_device:
        await trio.to_thread.run_sync(bed.start_device, host)
        await trio.to_thread.run_sync(bed.start_gateway, host)
    spec = MachineSpec(
        host.qmp_socket.parent,
        guest.environment.kernel,
        image,
        f"ferry.workload={writers.NAME} ferry.writer={guest.writer} ferry.set={guest.set_mib}",
        (VfioUserDevice(host.gateway_socket, SLOT),) if has_device else (),
        memory_bytes=guest.memory_bytes,
        incoming=incoming,
        content=guest.content,
        prefix=bed.inside[host.name],
    )
    async with (
        running(guest.environment.qemu, spec) as machine,
        await QmpClient.connect(str(spec.folder / CONTROL)) as control,
    ):
        threads = [each["thread-id"] for each in await control.execute("query-cpus-fast")]
        helpers = [each for each in (host.device, host.gateway) if each is not None]
        yield Side(host, machine, control, threads, helpers)


async def _by_qemu(
    watched: Watched, setting: Setting, link: Link, terms: Terms, folder: Path
) -> Move:
    a, b = watched.a.control, watched.b.control
    for qmp in (a, b):
        await set_up(qmp, setting)
        events = [{"capability": "events", "state": True}]
        await qmp.execute("migrate-set-capabilities", {"capabilities": events})
    await a.execute("migrate-set-parameters", {"downtime-limit": terms.downtime_limit_ms})
    await b.execute("migrate-incoming", to(listen_address(link, folder)))
    bound = (await b.execute("query-migrate"))["socket-address"][0]
    await b.execute("cont")  # as soon as it has arrived

    async def begin() -> None:
        await a.execute("migrate", to(bound))

    try:
        seen = await watched.seen(begin, trio.lowlevel.checkpoint, terms)
    except VmmError as error:
        raise BenchmarkFailed(f"QEMU: {error}") from error
    found = await a.execute("query-migrate")
    return Move(wire_bytes=found["ram"]["transferred"], **seen)


async def _by_us(bed: Testbed, watched: Watched, link: Link, terms: Terms) -> Move:
    a, b = bed.hosts["a"], bed.hosts["b"]
    listen = ("--listen", f"ipc://{link.sockets / 'link'}" if link.sockets else _free_port(link))
    receiver = await trio.to_thread.run_sync(lambda: bed.receive(b, "--insecure", *listen))
    watched.b.helpers.append(receiver)
    url = receiver.wait_event("listening")["url"]
    senders: list[Process] = []

    async def begin() -> None:
        limit = ("--downtime-limit", terms.downtime_limit_ms)
        senders.append(bed.send(a, b, "--insecure", "--to", url, *limit))
        watched.a.helpers.append(senders[0])

    async def ended() -> None:
        for process in (senders[0], receiver):
            await trio.to_thread.run_sync(process.wait, terms.deadline_s, abandon_on_cancel=True)

    async with alongside(lambda: _fail_with(senders, receiver)):
        seen = await watched.seen(begin, ended, terms)
    wire = senders[0].wait_event("report")["wire_bytes"]
    return Move(
        wire_bytes=sum(wire.values()),
        lanes_share=wire["pages"] / sum(wire.values()),
        send_bytes=watched.send_bytes,
        **seen,
    )


async def _fail_with(senders: list[Process], receiver: Process) -> None:
    """Raises `BenchmarkFailed` as soon as one of the commands has failed."""
    while True:
        for process in (*senders, receiver):
            if not process.running and process.wait(0):
                raise BenchmarkFailed(f"the migration failed: {process.tail()}")
        await trio.sleep(POLL_S)


def _free_port(link: Link) -> str:
    return f"tcp://{link.target_address}:0"


def _own_bytes(pid: int) -> int:
    """What a process has of memory that no other one shares and no file backs."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


async def _event(qmp: QmpClient, name: str, since: int, **data: Any) -> float:
    """When QEMU says that it was, once it was. Raises `BenchmarkFailed` if its migration fails."""
    while True:
        seen = qmp.events_seen
        event = qmp.last_event(name, since=since)
        if event is not None and data.items() <= event.data.items():
            return event.timestamp
        migration = qmp.last_event("MIGRATION", since=since)
        if migration is not None and migration.data.get("status") == "failed":
            raise BenchmarkFailed("the migration failed, QEMU says")
        await qmp.wait_event(since=seen)
