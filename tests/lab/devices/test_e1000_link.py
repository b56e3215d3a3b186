"""The cable of the NIC, the hub that it leads to, and the NIC's process."""

import argparse
import os
import queue
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ferry.config import add_arguments, load
from lab.children import start_child
from lab.commands.nic import Options
from lab.devices.e1000.cable import MAX_FRAME_BYTES, SocketLink
from lab.devices.e1000.hub import Hub
from lab.devices.e1000.main import NicOptions, build
from lab.devices.errors import DeviceError
from lab.vfio_user.client import Client
from tests.listening import wait_until_listening

DEADLINE_S = 20
NIC = """
import sys
from lab.devices.e1000.main import NicOptions, run
run(NicOptions(socket_path=sys.argv[1], link_path=sys.argv[2]))
"""


def start_hub(path: Path) -> tuple[Hub, Callable[..., Any]]:
    hub = Hub(path)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()

    def stop() -> None:
        hub.close()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()

    return hub, stop


def plug(hub: Hub, path: Path, count: int) -> "list[Port]":
    """Ports that the hub knows of: what is sent earlier is lost."""
    ports = [Port(path) for _ in range(count)]
    while hub.n_ports < count:
        os.sched_yield()
    return ports


class Port:
    """A peer at the hub."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    def next(self) -> bytes:
        return self.socket.recv(1 << 17)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(path: Path) -> Iterator[Hub]:
    hub, stop = start_hub(path)
    yield hub
    stop()


@pytest.fixture
def link(path: Path) -> Iterator[tuple[SocketLink, queue.Queue[bytes]]]:
    """A link and what it received."""
    frames: queue.Queue[bytes] = queue.Queue()
    link = SocketLink(path)
    link.start(frames.put)
    yield link, frames
    link.close()


def meet(port: Port, frames: queue.Queue[bytes]) -> None:
    """Wait until the link is connected: frames for nobody are lost."""
    while True:
        port.send(b"are you there")
        try:
            assert frames.get(timeout=0.05) == b"are you there"
        except queue.Empty:
            continue
        return


def drain(frames: queue.Queue[bytes]) -> bytes:
    """Take what `meet` sent too often; the next frame is this one."""
    while (frame := frames.get(timeout=DEADLINE_S)) == b"are you there":
        continue
    return frame


def test_frames_reach_every_other_port(hub: Hub, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ports = plug(hub, path, 3)
    for number, port in enumerate(ports):
        port.send(b"from %d" % number)
        assert {other.next() for other in ports if other is not port} == {b"from %d" % number}
    ports[0].send(bytes(MAX_FRAME_BYTES + 1))
    ports[0].send(bytes(MAX_FRAME_BYTES))
    assert ports[1].next() == ports[2].next() == bytes(MAX_FRAME_BYTES)


def test_a_port_that_does_not_read_or_leaves_holds_nobody_up(hub: Hub, path: Path) -> None:
    talker, listener, deaf, gone = plug(hub, path, 4)
    gone.socket.close()
    for number in range(2000):
        talker.send(number.to_bytes(2, "big") * 500)
        assert listener.next()[:2] == number.to_bytes(2, "big")
    assert deaf.next()[:2] == b"\0\0"


def test_a_link_waits_for_its_peer_and_finds_it_again(
    path: Path, link: tuple[SocketLink, queue.Queue[bytes]]
) -> None:
    cable, frames = link
    cable.send(b"lost")
    for _ in range(2):
        _, stop = start_hub(path)
        port = Port(path)
        meet(port, frames)
        port.send(b"to the link")
        assert drain(frames) == b"to the link"
        cable.send(b"to the port")
        assert port.next() == b"to the port"
        stop()
        assert port.next() == b""


def test_a_peer_that_does_not_read_loses_frames_only(
    path: Path, link: tuple[SocketLink, queue.Queue[bytes]]
) -> None:
    cable, _ = link
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        peer, _ = listener.accept()
        peer.settimeout(DEADLINE_S)
        while not select.select([peer], [], [], 0.05)[0]:
            cable.send(b"first")
        for _ in range(400):
            cable.send(bytes(1500))
        assert len(peer.recv(2000)) in (1500, 5)
        peer.close()


def test_the_process_serves_until_it_is_told_to_stop(hub: Hub, path: Path, tmp_path: Path) -> None:
    socket_path = tmp_path / "nic"
    process = start_child(
        [sys.executable, "-c", NIC, str(socket_path), str(path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until_listening(socket_path, process)
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        client = Client(socket_path)
        assert client.region_read(7, 0, 4) == bytes.fromhex("86800e10")
        assert client.region_read(0, 0x5400, 6) == bytes.fromhex("525400123456")
        client.close()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, errors) == (0, "")
        assert not socket_path.exists()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "wrong",
    [{"mac": "52:54"}, {"mac": "01:00:5e:00:00:01"}, {"mac": "g0:00:00:00:00:00"}]
    + [{"logging_page_bytes": size} for size in (1000, 2048, 4 << 20)],
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(DeviceError):
        build(NicOptions(**{"socket_path": "a", "link_path": "b", **wrong}))


def test_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    parsed = parser.parse_args(["--socket", "a", "--link", "b", "--logging", "4K"])
    assert load(Options, "nic", parsed) == Options(socket="a", link="b", logging=4096)
