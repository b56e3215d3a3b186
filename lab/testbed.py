"""Two hosts on one machine, made of the real processes: for the demo, the tests and `perf`.

Each side has a guest and one or more devices, each behind its gateway. Disks of both sides serve
the same image, as two hosts with shared storage do; NICs have their cables in one hub. `send` and
`receive` are started for each migration. Nothing here looks into a process: it starts them with
the options that a user would give, reads the events that they print, and talks to the guests by
QMP.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, Self

import trio

from ferry.errors import FerryError
from lab.children import start_child
from lab.guest.control import guest_report, verify_guest
from sync.gateway.control.blocking import upgrade
from sync.vmm.driver import Vmm

START_S = 150.0
"""A process that has not opened its socket by then will not, though it compiles its kernels."""
POLL_S, LONGEST_POLL_S = 0.02, 0.5


class TestbedError(FerryError):
    """A process of the testbed did not do what it was started for."""

    __test__ = False


class Child(Protocol):
    """A process that was started: this much of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int) -> None: ...


class Start(Protocol):
    """Runs a command of vfio-ferry in a process, which writes to a pipe and to `stderr`; its
    session is its own. `prefix` is a command that runs another one."""

    def __call__(
        self, arguments: Sequence[str], stderr: IO[bytes], prefix: Sequence[str]
    ) -> Child: ...


def start_command(arguments: Sequence[str], stderr: IO[bytes], prefix: Sequence[str]) -> Child:
    """As a user does."""
    return start_child(
        [sys.executable, "-m", "ferry.cli", *arguments],
        prefix=prefix,
        stdout=subprocess.PIPE,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class Process:
    """A command of vfio-ferry, started for real. Its JSON events are collected as they come."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        on_event: Callable[..., None] | None,
        inside: Sequence[str] = (),
        start: Start = start_command,
    ) -> None:
        self.name = name
        self.log = log
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._heir = 0
        self._on_event = on_event
        with log.open("ab") as stderr:
            self._popen = start(arguments, stderr, inside)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "text", "text": line.decode(errors="replace").rstrip()}
            with self._news:
                self.events.append(event)
                self._news.notify_all()
            if self._on_event is not None:
                self._on_event(event)
        with self._news:
            self._news.notify_all()

    @property
    def pid(self) -> int:
        return self._heir or self._popen.pid

    @property
    def running(self) -> bool:
        return _alive(self._heir) if self._heir else self._popen.poll() is None

    def follow(self, pid: int) -> None:
        """Process `pid` has taken the place of this one, which ends (`gateway --upgrade`)."""
        self._heir = pid
        self._popen.wait(START_S)

    def wait_event(
        self,
        name: str,
        timeout_s: float = START_S,
        where: Callable[[dict[str, Any]], bool] = lambda _: True,
        **values: Any,
    ) -> dict[str, Any]:
        """The first event of this name with these values that `where` takes. Raises `TestbedError`
        when the process ends or the time passes without it."""

        def found() -> dict[str, Any] | None:
            for event in self.events:
                if event.get("event") == name and values.items() <= event.items() and where(event):
                    return event
            return None

        with self._news:
            self._news.wait_for(lambda: found() or not self._reader.is_alive(), timeout_s)
            event = found()
        if event is None:
            raise TestbedError(f"{self.name} did not report {name} {values}; {self.tail()}")
        return event

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Raises `TestbedError` when it does not end in time."""
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TestbedError(f"{self.name} does not end; {self.tail()}") from None
        self._reader.join()
        return code

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._heir:
                os.kill(self._heir, number)
            else:
                self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and gone. Raises `TestbedError` if it is not in time."""
        self.signal(signal.SIGKILL)
        self._popen.wait()
        deadline = time.monotonic() + START_S
        while self.running:  # an heir is no child, which could be waited for
            if time.monotonic() > deadline:
                raise TestbedError(f"{self.name} does not end, though killed")
            time.sleep(POLL_S)

    def resume(self) -> None:
        """Lets a stopped process go on."""
        self.signal(signal.SIGCONT)

    def wait_stopped(self, timeout_s: float = START_S) -> None:
        """Until the process has stopped itself (`--break-at`)."""
        stat = Path(f"/proc/{self._popen.pid}/stat")
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(POLL_S)
                break
            if stat.read_text().rsplit(")", 1)[1].split()[0] == "T":
                return
        raise TestbedError(f"{self.name} did not stop itself; {self.tail()}")

    def wait_socket(self, path: Path, timeout_s: float = START_S) -> None:
        """Until somebody listens at `path`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(path))
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(POLL_S)
                break
        raise TestbedError(f"{self.name} does not listen at {path}; {self.tail()}")

    def tail(self) -> str:
        """What it said last, for an error message."""
        said = self.log.read_text(errors="replace").splitlines()[-8:]
        last = [json.dumps(event) for event in self.events[-3:]]
        code = self._popen.poll()
        return f"exit code {code}; last events {last}; stderr {said}"


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the two hosts are made of. `device`, `gateway` and `guest` are flags of those
    commands."""

    device: tuple[str, ...] = ()
    gateway: tuple[str, ...] = ()
    guest: tuple[str, ...] = ()
    disk: str = "virtio-blk"
    """What the first device of a host is: `virtio-blk` or `nvme`."""
    image_bytes: int = 64 << 20
    start: Start = start_command


@dataclass
class Unit:
    """A device and its gateway. The processes are None while they are not started."""

    name: str
    folder: Path
    device: Process | None = None
    gateway: Process | None = None
    device_name: str = "device.sock"
    """Of the device's socket, in `folder`."""
    function: str = ""
    """PCI address of a function of this machine that is the device; empty: a process is."""

    @property
    def device_socket(self) -> Path:
        return self.folder / self.device_name

    @property
    def gateway_socket(self) -> Path:
        return self.folder / "gateway.sock"

    @property
    def control_socket(self) -> Path:
        return self.folder / "control.sock"


@dataclass
class Host(Unit):
    """One side, and its first device."""

    guest: Process | None = None
    extra: list[Process] = field(default_factory=list)
    others: list[Unit] = field(default_factory=list)
    """Further devices, in the same order on both sides."""

    @property
    def units(self) -> list[Unit]:
        """All devices, in the order in which both commands are told of them."""
        return [self, *self.others]

    def add_unit(self, name: str) -> Unit:
        """One more device, in a folder of its own."""
        unit = Unit(f"{name} {self.name}", self.folder / name)
        unit.folder.mkdir(mode=0o700)
        self.others.append(unit)
        return unit

    def disk_bytes(self) -> int:
        """What its first device has moved from and to the disk so far."""
        assert self.device is not None
        lines = Path(f"/proc/{self.device.pid}/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return int(counts["rchar"]) + int(counts["wchar"])

    @property
    def control_flags(self) -> list[object]:
        """How `send` and `receive` are told of the gateways."""
        return [word for unit in self.units for word in ("--gateway", unit.control_socket)]

    @property
    def qmp_socket(self) -> Path:
        return self.folder / "qmp.sock"


class Testbed:
    """`with Testbed(folder, setup) as bed:`; every process it started is dead afterwards."""

    __test__ = False

    def __init__(self, folder: Path, setup: Setup) -> None:
        self.folder = folder
        self.setup = setup
        self.image = folder / "disk.img"
        self.processes: list[Process] = []
        self.inside: dict[str, Sequence[str]] = {}
        """By the last word of a process's name, as a host's is: a command that it is started by."""
        self.hosts = {name: Host(name, folder / name) for name in ("a", "b")}
        for host in self.hosts.values():
            host.folder.mkdir(mode=0o700, parents=True)
        with self.image.open("wb") as image:
            image.truncate(setup.image_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.running:
                process.signal(signal.SIGCONT)
                process.kill()

    def start(
        self,
        name: str,
        *arguments: object,
        on_event: Callable[..., None] | None = None,
    ) -> Process:
        """Starts a command; its log is `NAME.log` in the testbed's folder."""
        log = self.folder / f"{name.replace(' ', '-')}.log"
        words = [str(word) for word in arguments]
        inside = self.inside.get(name.split()[-1], ())
        process = Process(name, words, log, on_event, inside, self.setup.start)
        self.processes.append(process)
        return process

    def start_device(self, unit: Unit) -> Process:
        """A disk."""
        return self._start_device(unit, "device", "--image", self.image, *self.setup.device)

    def start_nvme(self, unit: Unit) -> Process:
        """An NVMe controller whose namespace is the disk."""
        return self._start_device(unit, "nvme", "--image", self.image)

    def start_nic(self, unit: Unit, link: Path, *flags: str) -> Process:
        """A NIC with its cable in the hub that listens at `link`."""
        return self._start_device(unit, "nic", "--link", link, *flags)

    def _start_device(self, unit: Unit, command: str, *flags: object) -> Process:
        words = (command, "--socket", unit.device_socket, *flags)
        unit.device = self.start(f"device {unit.name}", *words)
        unit.device.wait_socket(unit.device_socket)
        return unit.device

    def start_gateway(self, unit: Unit) -> Process:
        device = f"vfio:{unit.function}" if unit.function else unit.device_socket
        unit.gateway = self.start(
            f"gateway {unit.name}",
            *("gateway", "--listen", unit.gateway_socket, "--device", device),
            *("--control", unit.control_socket, "--json", *self.setup.gateway),
        )
        unit.gateway.wait_socket(unit.control_socket)
        return unit.gateway

    def upgrade_gateway(self, unit: Unit) -> None:
        """Raises what `upgrade` does; then the gateway that was goes on."""
        assert unit.gateway is not None
        unit.gateway.follow(upgrade(str(unit.control_socket), START_S).pid)

    def replace_device(self, unit: Unit, name: str, *flags: str) -> Process:
        """`vfio-ferry replace`, ended: by a disk whose socket is `name`. The old one is ended then,
        else the new one."""
        new = Unit(f"{name} {unit.name}", unit.folder, device_name=name)
        self.start_device(new)
        command = self.start(
            f"replace {unit.name}",
            *("replace", "--gateway", unit.control_socket, "--device", new.device_socket),
            *("--json", *flags),
        )
        replaced = command.wait(START_S) == 0
        old = unit.device if replaced else new.device
        if replaced:
            unit.device, unit.device_name = new.device, name
        assert old is not None
        old.kill()
        return command

    def start_guest(self, host: Host, *, incoming: bool) -> Process:
        host.guest = self.start(
            f"guest {host.name}",
            *("guest", "--device", host.gateway_socket, "--qmp", host.qmp_socket),
            *self.setup.guest,
            *(["--incoming"] if incoming else []),
        )
        self.wait_status(host, "inmigrate" if incoming else "running")
        return host.guest

    def start_host(self, host: Host, *, incoming: bool) -> None:
        if not host.function:
            (self.start_nvme if self.setup.disk == "nvme" else self.start_device)(host)
        self.start_gateway(host)
        self.start_guest(host, incoming=incoming)

    def receive(self, host: Host, *flags: object, **keywords: Any) -> Process:
        """Starts `receive` on `host`, and waits until it listens."""
        process = self.start(
            f"receive {host.name}",
            *("receive", "--listen", f"ipc://{host.folder}/link.sock", "--json"),
            *(*host.control_flags, "--qmp", host.qmp_socket, *flags),
            **keywords,
        )
        process.wait_event("listening")
        return process

    def send(self, source: Host, target: Host, *flags: object, **keywords: Any) -> Process:
        return self.start(
            f"send {source.name}",
            *("send", "--to", f"ipc://{target.folder}/link.sock", "--json"),
            *(*source.control_flags, "--qmp", source.qmp_socket, *flags),
            **keywords,
        )

    # --- the guests, by QMP ---

    def status(self, host: Host) -> str:
        async def ask() -> str:
            async with await Vmm.connect(str(host.qmp_socket), deadline_s=START_S) as vmm:
                return await vmm.run_state()

        return trio.run(ask)

    def execute(self, host: Host, command: str) -> None:
        """A QMP command to the guest's VMM, by hand."""

        async def ask() -> None:
            async with await Vmm.connect(str(host.qmp_socket), deadline_s=START_S) as vmm:
                await vmm.execute(command)

        trio.run(ask)

    def wait_status(self, host: Host, wanted: str, timeout_s: float = START_S) -> None:
        async def wait() -> None:
            state = ""
            while state != wanted:
                # A connection for each question: a gateway may need the VMM to itself meanwhile.
                async with await Vmm.connect(str(host.qmp_socket), deadline_s=timeout_s) as vmm:
                    state = await vmm.run_state()
                await trio.sleep(POLL_S)

        self._within(timeout_s, wait, f"guest {host.name} is not {wanted}")

    def report(self, host: Host) -> dict[str, Any]:
        """The workload's statistics."""

        async def ask() -> dict[str, Any]:
            async with await Vmm.connect(str(host.qmp_socket), deadline_s=START_S) as vmm:
                return await guest_report(vmm)

        return trio.run(ask)

    def wait_operations(self, host: Host, more: int, timeout_s: float = START_S) -> dict[str, Any]:
        """Until the guest has done `more` operations than now; its report then."""
        report: dict[str, Any] = {}

        async def wait() -> None:
            nonlocal report
            async with await Vmm.connect(str(host.qmp_socket), deadline_s=timeout_s) as vmm:
                report = await guest_report(vmm)
                goal = report["operations"] + more
                pause_s = POLL_S
                while report["operations"] < goal:
                    await trio.sleep(pause_s)
                    # Who is asked all the time does little else, on a processor that is emulated.
                    pause_s = min(2 * pause_s, LONGEST_POLL_S)
                    report = await guest_report(vmm)

        self._within(timeout_s, wait, f"guest {host.name} does no {more} operations")
        return report

    def wait_disk(self, host: Host, more: int, timeout_s: float = START_S) -> None:
        """Until the guest's device has moved `more` bytes than now. Asks no QMP server: `send` may
        be its one client."""
        goal = host.disk_bytes() + more
        deadline = time.monotonic() + timeout_s
        while host.disk_bytes() < goal:
            if time.monotonic() > deadline:
                raise TestbedError(f"guest {host.name} does not move {more} bytes")
            time.sleep(POLL_S)

    def verify(self, host: Host, timeout_s: float = 60.0) -> dict[str, Any]:
        """Reads back every block that the guest ever wrote; its report afterwards."""
        report: dict[str, Any] = {}

        async def ask() -> None:
            nonlocal report
            async with await Vmm.connect(str(host.qmp_socket), deadline_s=START_S) as vmm:
                report = await verify_guest(vmm)

        self._within(timeout_s, ask, f"guest {host.name} does not finish verifying")
        return report

    def _within(self, timeout_s: float, work: Callable[..., Any], what: str) -> None:
        async def limited() -> None:
            with trio.fail_after(timeout_s):
                await work()

        try:
            trio.run(limited)
        except trio.TooSlowError:
            tails = "; ".join(f"{p.name}: {p.tail()}" for p in self.processes)
            raise TestbedError(f"{what} after {timeout_s:g} s; {tails}") from None
