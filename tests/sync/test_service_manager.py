"""Readiness, watchdog and passed sockets, with a manager that this test plays."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sync import service_manager
from sync.service_manager import heartbeat, notify, open_device, passed_sockets

PATIENCE_S = 60.0
FIRST_PASSED = 900
"""A descriptor that is free, as the one behind it is, and that a process may have."""
AS_A_MANAGER = """
import os, sys
for number, passed in enumerate(sys.argv[1:3], 3):
    os.dup2(int(passed), number)
os.environ["LISTEN_PID"] = str(os.getpid())
words = ["gateway", "--device", "none", "--listen", sys.argv[3], "--control", sys.argv[4]]
os.execv(sys.executable, [sys.executable, "-m", "ferry.cli", *words])
"""
"""Starts a gateway with the sockets where sd_listen_fds(3) looks for them."""


@pytest.fixture
def manager(short_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(short_path / "notify"))
        sock.settimeout(PATIENCE_S)
        yield sock


def told(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().splitlines()


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"):
        monkeypatch.delenv(name, raising=False)
    notify("READY=1")
    heartbeat()(0.0)
    assert passed_sockets() == {}


def test_what_is_told_arrives(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    notify("READY=1\nSTATUS=x")
    assert told(manager) == ["READY=1", "STATUS=x"]


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0vfio-ferry-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@vfio-ferry-{os.getpid()}")
        notify("READY=1")
        assert told(sock) == ["READY=1"]


def test_a_manager_that_is_gone_is_no_reason_to_fail(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(short_path / "none"))
    notify("READY=1")


def test_the_watchdog_is_fed_twice_in_its_time(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    beat = heartbeat()
    for now in (10.0, 10.5, 10.9, 11.0, 11.1, 12.0):
        beat(now)
    assert [told(manager) for _ in range(3)] == [["WATCHDOG=1"]] * 3
    assert not select.select([manager], [], [], 0)[0]
    monkeypatch.setenv("WATCHDOG_PID", "1")
    heartbeat()(20.0)
    assert not select.select([manager], [], [], 0)[0]


@pytest.mark.parametrize("variables", [{"LISTEN_PID": "1", "LISTEN_FDS": "2"}, {"LISTEN_FDS": "x"}])
def test_sockets_of_others_are_left_alone(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert passed_sockets() == {}


def test_a_gateway_takes_its_sockets_from_the_manager_and_says_that_it_lives(
    manager: socket.socket, short_path: Path
) -> None:
    """The files stay when it ends: they are the manager's."""
    paths = [short_path / "vmm", short_path / "control"]
    environment = os.environ | {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": "200000",
        "LISTEN_FDS": "2",
    }
    with ExitStack() as held:
        listening = []
        for path in paths:
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(path))
            sock.listen()
            listening.append(sock.fileno())
        gateway = held.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", AS_A_MANAGER, *map(str, [*listening, *paths])],
                env=environment,
                pass_fds=listening,
                stderr=subprocess.DEVNULL,
            )
        )
        held.callback(gateway.kill)
        assert told(manager)[0] == "READY=1"
        assert told(manager) == ["WATCHDOG=1"]
        assert told(manager) == ["WATCHDOG=1"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(paths[1]))
        gateway.terminate()
        while (state := told(manager)) != ["STOPPING=1"]:
            assert state == ["WATCHDOG=1"]
        assert gateway.wait(PATIENCE_S) == 0
    assert all(path.exists() for path in paths)


def test_a_device_that_was_passed_is_used_as_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may be open once only, or by root only, is not opened again."""
    passed, file = FIRST_PASSED, FIRST_PASSED + 1
    for opened, number in (
        (os.open("/dev/zero", os.O_RDWR), passed),
        (os.memfd_create("no device"), file),
    ):
        os.dup2(opened, number)
        os.close(opened)
    monkeypatch.setattr(service_manager, "FIRST_DESCRIPTOR", passed)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setattr(service_manager, "_devices", {})
    assert passed_sockets() == {}
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened again"))
    found = open_device("/dev/zero")
    assert os.path.sameopenfile(found, passed) and not os.get_inheritable(found)
    assert os.read(found, 1) == b"\0"
    monkeypatch.undo()
    other = open_device("/dev/null")
    assert not os.path.sameopenfile(other, passed)
    for number in (passed, file, found, other):
        os.close(number)
