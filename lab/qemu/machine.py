"""One QEMU process with vfio-user-pci devices: its arguments, its start and its end.

Owns the process and a QMP connection of its own, so that the socket `qmp` stays free for whoever
migrates the guest. Migrates nothing. The folder of a machine holds:

    qmp            QMP for `vfio-ferry send --qmp` and `receive --qmp`
    control        QMP for this file
    console.log    the guest's first serial line: firmware, kernel, init
    report.log     the guest's second serial line, as `report.py` reads it
    report         a socket to that line: `stop` ends the load
    qemu.log       what QEMU itself prints
"""

import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from ferry.doctor.qemu_program import Qemu
from lab.children import start_child
from lab.qemu.errors import MachineError
from lab.qemu.report import GuestReport, ReportReader
from sync.vmm.client import QmpClient
from sync.vmm.errors import VmmError

QMP = "qmp"
CONTROL = "control"
CONSOLE_LOG = "console.log"
REPORT = "report"
REPORT_LOG = "report.log"
QEMU_LOG = "qemu.log"

MAX_SOCKET_PATH_BYTES = 107
"""sun_path of unix(7) has 108 bytes with the NUL."""
START_DEADLINE_S = 30.0
QUIT_DEADLINE_S = 5.0
POLL_S = 0.02
"""How often a log is looked at."""
LOG_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class VfioUserDevice:
    """A device that a gateway or a device process serves at `socket`."""

    socket: Path
    slot: int
    """PCI device number on the root bus, 1 to 30: the device's own or its root port's."""
    root_port: bool = False
    """Behind a PCIe root port instead of on the root bus."""


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine. The source and the target of a migration differ in folder, sockets and
    `incoming` alone."""

    folder: Path
    kernel: Path
    initramfs: Path
    command_line: str = ""
    """Appended to the kernel's, e.g. `pci=nomsi ferry.workload=disk`."""
    devices: tuple[VfioUserDevice, ...] = ()
    memory_bytes: int = 256 << 20
    processors: int = 1
    incoming: bool = False
    """The target: paused, waiting for `migrate-incoming`."""
    content: Path | None = None
    """An image that QEMU serves by itself, as a disk that can only be read."""
    prefix: Sequence[str] = ()
    """QEMU's command is put behind these words."""


def arguments(spec: MachineSpec) -> list[str]:
    """QEMU's arguments. Raises `MachineError` for a path that no socket can have."""
    folder = spec.folder
    for path in (folder / QMP, folder / CONTROL, folder / REPORT):
        _check_socket_path(path)
    kernel_command_line = f"console=ttyS0 panic=-1 {spec.command_line}".strip()
    result = [
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "max"),
        *("-smp", str(spec.processors), "-m", f"{spec.memory_bytes}B"),
        *("-object", f"memory-backend-memfd,id=ram,size={spec.memory_bytes},share=on"),
        *("-kernel", str(spec.kernel), "-initrd", str(spec.initramfs)),
        *("-append", kernel_command_line),
        *_serial("console", file=folder / CONSOLE_LOG),
        *_serial(REPORT, socket=folder / REPORT, log=folder / REPORT_LOG),
        *_qmp(QMP, folder),
        *_qmp(CONTROL, folder),
    ]
    for device in spec.devices:
        result += _device(device)
    if spec.content is not None:
        result += ["-drive", f"if=virtio,format=raw,readonly=on,file={_escaped(spec.content)}"]
    if spec.incoming:
        result += ["-S", "-incoming", "defer"]
    return result


class Machine:
    """A running QEMU."""

    def __init__(self, spec: MachineSpec, process: "subprocess.Popen[bytes]") -> None:
        self.spec = spec
        self._process = process
        self._report_read_bytes = 0

    @property
    def qmp(self) -> Path:
        """The socket for whoever migrates this machine."""
        return self.spec.folder / QMP

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while QEMU runs."""
        return self._process.poll()

    def read_report(self) -> bytes:
        """What the guest has written on its second serial line since the last call."""
        with suppress(FileNotFoundError), (self.spec.folder / REPORT_LOG).open("rb") as file:
            file.seek(self._report_read_bytes)
            data = file.read()
            self._report_read_bytes += len(data)
            return data
        return b""

    def tail(self, log: str = QEMU_LOG) -> str:
        """The end of one of the logs, for a message."""
        with suppress(OSError):
            return (self.spec.folder / log).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    async def send_line(self, line: str) -> None:
        """Writes `line` on the guest's second serial line. Raises `MachineError`."""
        try:
            async with await trio.open_unix_socket(str(self.spec.folder / REPORT)) as stream:
                await stream.send_all(line.encode() + b"\n")
        except (OSError, trio.BrokenResourceError) as error:
            raise MachineError(f"cannot write to the guest: {error}") from error

    async def wait_ended(self) -> int:
        """QEMU's return code, once it has ended by itself."""
        if (code := self.returncode) is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
            code = self._process.wait()
        return code

    async def quit(self) -> None:
        """Ends QEMU: asked first, then killed. Does nothing when it has ended already."""
        with trio.move_on_after(QUIT_DEADLINE_S), suppress(VmmError):
            client = await QmpClient.connect(
                str(self.spec.folder / CONTROL), deadline_s=QUIT_DEADLINE_S
            )
            async with client:
                await client.execute("quit")
            await self.wait_ended()
        if self.returncode is None:
            self._process.kill()
            await self.wait_ended()

    async def wait_qmp(self) -> None:
        """Returns once QEMU answers; the guest runs then, or waits for `migrate-incoming`.

        Raises `MachineError` with QEMU's own words when it ends instead.
        """
        failure: VmmError | None = None
        async with trio.open_nursery() as nursery:

            async def give_up_when_ended() -> None:
                await self.wait_ended()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up_when_ended)
            try:
                client = await QmpClient.connect(
                    str(self.spec.folder / CONTROL), deadline_s=START_DEADLINE_S
                )
                await client.aclose()
            except VmmError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if self.returncode is not None:
            raise MachineError(f"QEMU ended with {self.returncode}: {self.tail().strip()}")
        if failure is not None:
            raise MachineError(f"QEMU does not get ready: {failure}; {self.tail()}")


@asynccontextmanager
async def running(qemu: Qemu, spec: MachineSpec) -> AsyncIterator[Machine]:
    """A machine that answers on QMP; ended when the block is left.

    The sockets of its devices have to be served already. Raises `MachineError`.
    """
    command = [str(qemu.program), *arguments(spec)]
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
        with (spec.folder / QEMU_LOG).open("wb") as log:
            process = start_child(
                command,
                prefix=spec.prefix,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    except OSError as error:
        raise MachineError(f"cannot start {qemu.program}: {error}") from error
    machine = Machine(spec, process)
    try:
        await machine.wait_qmp()
        yield machine
    finally:
        with trio.CancelScope(shield=True):
            await machine.quit()


class Guest:
    """A guest as it reports itself, wherever it runs."""

    def __init__(self) -> None:
        self.report = GuestReport()
        self.longest_silence_s = 0.0
        """The longest time between two beats, by the host's clock: as exact as `look` is called
        often."""
        self._reader = ReportReader()
        self._last_beat: float | None = None

    def look(self, machine: Machine) -> None:
        """Takes in what the guest wrote on `machine`. Raises `GuestReportError`."""
        for event in self._reader.feed(machine.read_report()):
            self.report.add(event)
            if event.name == "beat":
                now = trio.current_time()
                if self._last_beat is not None:
                    self.longest_silence_s = max(self.longest_silence_s, now - self._last_beat)
                self._last_beat = now

    async def wait(self, machine: Machine, ready: Callable[[GuestReport], bool]) -> None:
        """Follows the guest on `machine` until `ready`. The caller sets the deadline.

        Raises `MachineError` when QEMU ends first, `GuestReportError` for a malformed report.
        """
        while True:
            ended = machine.returncode is not None
            self.look(machine)
            if ready(self.report):
                return
            if ended:
                raise MachineError(
                    f"QEMU ended with {machine.returncode} and the guest was not done: "
                    f"{machine.tail()} {machine.tail(CONSOLE_LOG)}"
                )
            await trio.sleep(POLL_S)


def _device(device: VfioUserDevice) -> list[str]:
    _check_socket_path(device.socket)
    if not 1 <= device.slot <= 30:
        raise MachineError(f"PCI slot {device.slot} is not from 1 to 30")
    address = f"0x{device.slot:x}"
    properties: dict[str, object] = {
        "driver": "vfio-user-pci",
        "id": f"device{device.slot}",
        "socket": {"type": "unix", "path": str(device.socket)},
    }
    if not device.root_port:
        return ["-device", json.dumps(properties | {"bus": "pcie.0", "addr": address})]
    port = f"port{device.slot}"
    return [
        *("-device", f"pcie-root-port,id={port},bus=pcie.0,addr={address},chassis={device.slot}"),
        *("-device", json.dumps(properties | {"bus": port})),
    ]


def _serial(name: str, *, file: Path | None = None, **socket: Path) -> list[str]:
    if file:
        chardev = f"file,id={name},path={_escaped(file)}"
    else:
        path, log = _escaped(socket["socket"]), _escaped(socket["log"])
        chardev = f"socket,id={name},path={path},server=on,wait=off,logfile={log}"
    return ["-chardev", chardev, "-serial", f"chardev:{name}"]


def _qmp(name: str, folder: Path) -> list[str]:
    return ["-qmp", f"unix:{_escaped(folder / name)},server=on,wait=off"]


def _escaped(path: Path) -> str:
    """In QEMU's options a comma is written twice."""
    return str(path).replace(",", ",,")


def _check_socket_path(path: Path) -> None:
    if len(str(path).encode()) > MAX_SOCKET_PATH_BYTES:
        raise MachineError(f"{path} is longer than the path of a socket may be; use another folder")
