"""Another process takes the gateway's place, or fails to, while its VMM goes on."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.children import start_child
from lab.vfio_user.client import Client
from lab.vfio_user.server import Server
from sync.gateway.control.blocking import BlockingClient, upgrade
from sync.gateway.control.requests import (
    Mediate,
    Memory,
    Passthrough,
    PrepareDevice,
    Status,
    SwitchDevice,
)
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.loop import Gateway, GatewayOptions
from sync.gateway.errors import GatewayError, UpgradeFailed
from sync.peer_process import peer_pid
from sync.vfio_user.protocol import DmaMap, IrqSet, SetIrqs
from tests.sync.gateway.conftest import ServedDevice
from tests.sync.gateway.raw_peers import PAGE, connect_raw, new_ram

WAIT_S = 30.0
PROGRAM = """#!{python}
import os, signal, sys, time
from pathlib import Path
import sync.gateway.engine.loop as loop
import sync.gateway.engine.succession as succession
from sync.gateway.main import GatewayOptions, run
succession.HAND_ON_S = 1.5
heir = succession.ENVIRONMENT in os.environ

def at(owner, name, do):
    before = getattr(owner, name)
    def instead(*arguments, **options):
        do()
        return before(*arguments, **options)
    if heir:
        setattr(owner, name, instead)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_old():
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.001)

def hang():
    time.sleep(1000)

{more}
folder = Path(sys.argv[1])
run(GatewayOptions(folder / "vmm", folder / "device", folder / "control", json=True))
"""
GOOD = ""


def full(version: str, told: str) -> Any:
    """Left to `make test-full`: another step than those that stay."""
    return pytest.param(version, told, marks=pytest.mark.full)


class Bed:
    """A gateway as a process whose program can be changed, a device and a VMM in this one."""

    def __init__(self, folder: Path, first: str = GOOD, *, v2: bool = False) -> None:
        self.folder = folder
        self.program = folder / "vfio-ferry"
        self.control = str(folder / "control")
        self.install(first)
        self._log = (folder / "log").open("wb")
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(folder / "manager"))
        self.manager.settimeout(WAIT_S)
        self.process = start_child(
            [str(self.program), str(folder)],
            stdout=self._log,
            env=os.environ | {"NOTIFY_SOCKET": str(folder / "manager")},
        )
        self.device = ServedDevice(v2=v2)
        self._server = Server(folder / "device", self.device)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.wait("device-connected")
        self.vmm = Client(folder / "vmm", timeout_s=WAIT_S)
        self.ram = new_ram(4)
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.vmm.dma_map(DmaMap(3, 0, 0x10000, 4 * PAGE), self.ram)
        assign = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 1, 1)
        self.vmm.set_irqs(assign, [self.event])

    def install(self, more: str) -> None:
        """The version that the next upgrade starts."""
        new = self.program.with_suffix(".new")
        new.write_text(PROGRAM.format(python=sys.executable, more=more))
        new.chmod(0o700)
        new.rename(self.program)

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "log").read_text().splitlines()
        return [each for line in lines if (each := json.loads(line))["event"] == name]

    def wait(self, name: str, count: int = 1) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while len(self.events(name)) < count:
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.01)
        return self.events(name)[-1]

    def pid(self) -> int:
        """Of whoever listens."""
        with connect_raw(Path(self.control)) as sock:
            return peer_pid(sock)

    def check(self, data: bytes = b"data") -> None:
        """The VMM's connection, its memory and its interrupts are there and right."""
        self.vmm.region_write(0, 0, data)
        assert self.vmm.region_read(0, 0, 4) == data
        self.vmm.region_write(0, 8, data[::-1], posted=True)
        assert self.vmm.region_read(0, 8, 4) == data[::-1]
        assert self.device.dma is not None
        with BlockingClient(self.control, WAIT_S, ClientRole.SOURCE) as gateway:
            gateway.call(Mediate("message", PAGE, True))
            self.device.dma.write(0x11000, data)
            assert os.pread(self.ram, 4, PAGE) == data
            gateway.call(Passthrough())
        with BlockingClient(self.control, WAIT_S) as gateway:
            assert gateway.call(Memory(0)).total == 1
            info = gateway.call(Status())
        assert (info.state, info.owner) == ("passthrough", "owned")
        assert info.vmm.pid == os.getpid()

    def close(self) -> None:
        self.vmm.close()
        with contextlib.suppress(OSError, ProcessLookupError):
            os.kill(self.pid(), signal.SIGTERM)
        self.process.kill()
        self.process.wait()
        self._server.close()
        self._thread.join(WAIT_S)
        os.close(self.ram)
        os.close(self.event)
        self._log.close()
        self.manager.close()


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    yield made
    made.close()


def test_i9_the_gateway_is_replaced_again_and_again_under_load(bed: Bed) -> None:
    """Registers are written and read by two threads meanwhile, and each read is right."""
    stop = threading.Event()
    counts, errors = [0, 0], list[BaseException]()

    def load(number: int) -> None:
        try:
            while not stop.is_set():
                counts[number] += 1
                data = counts[number].to_bytes(4, "little")
                offset = 0x40 + 8 * number
                bed.vmm.region_write(0, offset, data, posted=counts[number] % 3 == 0)
                assert bed.vmm.region_read(0, offset, 4) == data
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    before, pids = bed.pid(), set[int]()
    for _ in range(4):
        at = list(counts)
        pids.add(upgrade(bed.control, WAIT_S).pid)
        deadline = time.monotonic() + WAIT_S
        while any(now <= then + 20 for now, then in zip(counts, at, strict=True)):
            assert time.monotonic() < deadline and not errors, errors
            time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert not errors
    assert len(pids) == 4 and bed.pid() in pids
    assert bed.process.pid == before and bed.process.wait(WAIT_S) == 0, "the old one ends well"
    bed.check()
    assert not bed.events("vmm-lost") and not bed.events("device-lost")
    assert len(bed.events("took-over")) == 4


def test_sigusr2_asks_for_it_too(bed: Bed) -> None:
    """And a service manager hears which process it is from then on."""
    os.kill(bed.process.pid, signal.SIGUSR2)
    bed.wait("took-over")
    assert bed.process.wait(WAIT_S) == 0
    bed.check()
    ready = "READY=1\nSTATUS=listening"
    told = [bed.manager.recv(100).decode() for _ in range(3)]
    assert told[0] == ready and sorted(told[1:]) == [f"MAINPID={bed.pid()}", ready]


@pytest.mark.parametrize(
    ("version", "told"),
    [
        full("sys.exit(7)", "exit code 7"),
        full("succession.STATE_VERSION = 99 if heir else 1", "version [99]"),
        full("at(succession, 'from_bytes', lambda: sys.exit(7))", "before it was ready"),
        full("at(succession, 'from_bytes', hang)", "before it was ready"),
        full("sys.argv[1] += '/../' + Path(sys.argv[1]).name if heir else ''", "--control is"),
        ("at(loop.Gateway, '_inherit', die)", "signal SIGKILL"),
        full("at(loop.Gateway, '_inherit', lambda: 1 / 0)", "refuses: division by zero"),
        full("at(succession.Predecessor, 'ready', die)", "before it was ready"),
        ("at(succession.Predecessor, 'running', die)", "before it served"),
        ("at(succession.Predecessor, 'running', hang)", "before it served"),
    ],
)
def test_i9_a_new_process_that_fails_at_any_step_leaves_the_old_one_as_it_was(
    bed: Bed, version: str, told: str
) -> None:
    bed.install(version)
    with pytest.raises(UpgradeFailed) as refused:
        upgrade(bed.control, WAIT_S)
    assert told in str(refused.value)
    assert bed.pid() == bed.process.pid
    bed.check(b"kept")
    bed.install(GOOD)
    assert upgrade(bed.control, WAIT_S).pid == bed.pid()
    bed.check(b"gone")


@pytest.mark.parametrize(
    "version",
    [
        "at(loop.Gateway, '_inherit', kill_old)",
        pytest.param("at(succession.Predecessor, 'ready', kill_old)", marks=pytest.mark.full),
        pytest.param("at(succession.Predecessor, 'running', kill_old)", marks=pytest.mark.full),
    ],
)
def test_i9_the_new_process_goes_on_if_the_old_one_dies_meanwhile(bed: Bed, version: str) -> None:
    bed.install(version)
    with contextlib.suppress(GatewayError, OSError):
        upgrade(bed.control, WAIT_S)
    bed.wait("took-over")
    assert bed.process.wait(WAIT_S) in (0, -signal.SIGKILL)
    assert bed.pid() != bed.process.pid
    bed.check()


@pytest.mark.full
def test_i9_a_new_process_that_hangs_at_its_start_is_ended(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "loop.START_S = 1.0")
    bed.install("hang()")
    with pytest.raises(UpgradeFailed, match="did not answer in time"):
        upgrade(bed.control, WAIT_S)
    bed.check()
    bed.close()


def test_i9_a_new_process_that_has_just_begun_is_not_ended(tmp_path: Path) -> None:
    """The old one has given up waiting for it, and looks once more while nothing can happen."""
    late = """
answer = succession.Heir._answer
def miss(heir, did):
    if did != "served":
        return answer(heir, did)
    while not list(filter(lambda line: "took-over" in line, open(folder / "log"))):
        time.sleep(0.01)
    raise succession.UpgradeFailed("too late")
succession.Heir._answer = miss
"""
    bed = Bed(tmp_path, late)
    assert upgrade(bed.control, WAIT_S).pid == bed.pid()
    assert bed.process.wait(WAIT_S) == 0
    bed.check()
    bed.close()


def test_a_new_process_without_a_state_ends_with_the_old_one(bed: Bed, tmp_path: Path) -> None:
    bed.install(
        "(Path(sys.argv[1]) / 'heir').write_text(str(os.getpid())) if heir else 0\n"
        "at(succession.Predecessor, 'inherit', kill_old)"
    )
    with pytest.raises((GatewayError, OSError)):
        upgrade(bed.control, WAIT_S)
    heir = int((tmp_path / "heir").read_text())
    deadline = time.monotonic() + WAIT_S
    while Path(f"/proc/{heir}").exists() and "Z" not in Path(f"/proc/{heir}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_i7_it_is_refused_while_a_migration_runs(bed: Bed) -> None:
    with BlockingClient(bed.control, WAIT_S, ClientRole.SOURCE, "s") as gateway:
        gateway.call(Mediate("message", PAGE, True))
        with pytest.raises(UpgradeFailed, match="a migration is under way"):
            upgrade(bed.control, WAIT_S)
        gateway.call(Passthrough())
    bed.check()


@pytest.mark.parametrize(
    ("function", "command", "words"),
    [
        ("/d", ("false",), "moves by its queues, stays with it"),
        ("", ("/nowhere/vfio-ferry",), "No such file or directory: '/nowhere/vfio-ferry'"),
        ("", (), "run it below an init"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path,
    function: str,
    command: tuple[str, ...],
    words: str,
    open_fds: Callable[[], int],
) -> None:
    options = GatewayOptions(
        *(tmp_path / "vmm", tmp_path / "device", tmp_path / "control"),
        host_function=function,
        command=command,
    )
    before = open_fds()
    gateway, told = Gateway(options, lambda *_, **__: None), list[object]()
    gateway._hand_on(told.append)
    assert len(told) == 1 and isinstance(told[0], UpgradeFailed) and words in str(told[0])
    gateway.close()
    assert open_fds() == before


def test_a_gateway_without_a_device_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "vfio-ferry").write_text(PROGRAM.format(python=sys.executable, more=GOOD))
    (tmp_path / "vfio-ferry").chmod(0o700)
    process = start_child([str(tmp_path / "vfio-ferry"), str(tmp_path)], stdout=subprocess.PIPE)
    assert b"listening" in process.stdout.readline()
    pid = upgrade(str(tmp_path / "control"), WAIT_S).pid
    device = ServedDevice()
    server = Server(tmp_path / "device", device)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    vmm = Client(tmp_path / "vmm", timeout_s=WAIT_S)
    assert vmm.region_read(0, 0, 4) == bytes(4)
    vmm.close()
    os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert not (tmp_path / "vmm").exists(), "the last one removes the sockets"
    server.close()
    thread.join(WAIT_S)


OTHER_DEVICE = """
if heir:
    before = GatewayOptions
    def GatewayOptions(vmm, device, control, **more):
        return before(vmm, device.with_name({name!r}), control, **more)
"""


def test_a_gateway_whose_device_was_replaced_goes_on_with_it_whatever_its_command_says(
    tmp_path: Path,
) -> None:
    """The command may have been changed to the new device, as it should be, or not yet."""
    bed = Bed(tmp_path, v2=True)
    device = ServedDevice(v2=True)
    server = Server(bed.folder / "new", device)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with BlockingClient(bed.control, WAIT_S, ClientRole.SOURCE) as gateway:
        gateway.call(PrepareDevice(str(bed.folder / "new")))
        gateway.call(SwitchDevice())
    bed.device = device
    bed.check(b"here")

    def places() -> tuple[str, str]:
        with BlockingClient(bed.control, WAIT_S) as gateway:
            info = gateway.call(Status())
        return Path(info.device_path).name, Path(info.device_option).name

    assert places() == ("new", "device")
    upgrade(bed.control, WAIT_S)
    bed.check(b"more")
    assert places() == ("new", "device")
    bed.install(OTHER_DEVICE.format(name="other"))
    with pytest.raises(UpgradeFailed, match=r"--device is .*other in its command, and was .*new"):
        upgrade(bed.control, WAIT_S)
    bed.install(OTHER_DEVICE.format(name="new"))
    upgrade(bed.control, WAIT_S)
    bed.check(b"then")
    assert places() == ("new", "new")
    bed.close()
    server.close()
    thread.join(WAIT_S)


def test_the_records_and_their_lock_outlive_it(bed: Bed) -> None:
    with BlockingClient(bed.control, WAIT_S, ClientRole.SOURCE, "s-1") as gateway:
        gateway.call(Mediate("message", PAGE, True))
        gateway.call(Passthrough())
    upgrade(bed.control, WAIT_S)
    with BlockingClient(bed.control, WAIT_S) as gateway:
        assert gateway.info.sessions == {"s-1": "kept"}
    command = [sys.executable, str(bed.program), str(bed.folder)]
    second = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=WAIT_S)
    assert "in use" in second.stderr
