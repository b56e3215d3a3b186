"""Clients that come, misbehave and go: the server closes their connection, releases everything and
takes the next one."""

import os
import signal
import socket
import stat
import struct
import threading
from collections.abc import Callable
from errno import EINVAL
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lab.vfio_user.server as server_module
import lab.vfio_user.session as session_module
from lab.vfio_user.client import Client
from lab.vfio_user.server import Server
from lab.vfio_user.session import Session
from sync.vfio_user.protocol import (
    Capabilities,
    Command,
    Disconnected,
    DmaMap,
    IrqSet,
    SetIrqs,
    Version,
)

WAIT_S = 10.0


def header(command: int, size: int, flags: int = 0) -> bytes:
    return struct.pack("<HHIII", 1, command, size, flags, 0)


BROKEN_STREAMS = [
    header(9, 15),
    header(9, 0),
    header(9, 2 << 20),
    header(9, (1 << 32) - 1),
    header(9, 16, 2),
    header(9, 16, 1),
    header(9, 16, 0x21),
    header(9, 20, 0x21),
]


@pytest.mark.parametrize("stream", BROKEN_STREAMS)
def test_i9_a_broken_stream_ends_its_connection_and_no_other(
    connect_raw: Callable[[], Any], device: Any, stream: bytes
) -> None:
    first = connect_raw()
    first.greet()
    assert first.ask(Command.DMA_MAP, DmaMap(3, 0, 0, 4096).pack(), fds=(0,))[0] == 0
    first.send(stream)
    assert first.at_end()
    assert device.gone.wait(WAIT_S)
    first.close()
    second = connect_raw()
    second.greet()
    assert second.ask(Command.DMA_MAP, DmaMap(3, 0, 0, 4096).pack())[0] == 0


def test_too_many_descriptors(connect_raw: Callable[[], Any], open_fds: Callable[[], int]) -> None:
    before = open_fds()
    peer = connect_raw()
    peer.greet()
    peer.request(Command.DEVICE_RESET, fds=(0,) * 100)
    assert peer.at_end()
    peer.close()
    connect_raw().greet()
    assert open_fds() <= before + 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        struct.pack("<HH", 1, 0),
        struct.pack("<HH", 0, 0) + b"no json\0",
        Version(capabilities=Capabilities(pgsizes=65536)).pack(),
    ],
)
def test_a_version_that_does_not_fit_is_refused_and_the_connection_closed(
    connect_raw: Callable[[], Any], body: bytes
) -> None:
    peer = connect_raw()
    assert peer.ask(Command.VERSION, body, fds=(0,)) == (EINVAL, b"")
    assert peer.at_end()
    connect_raw().greet()


def test_nothing_comes_before_the_version(connect_raw: Callable[[], Any], device: Any) -> None:
    peer = connect_raw()
    assert peer.ask(Command.DEVICE_RESET) == (EINVAL, b"")
    assert peer.at_end()
    assert device.events == []


def test_the_version_agreed_on(connect_raw: Callable[[], Any]) -> None:
    peer = connect_raw()
    proposal = Version(0, 7, Capabilities(8, 65536, 100, 4096 | 65536)).pack()
    errno, body = peer.ask(Command.VERSION, proposal)
    assert errno == 0
    agreed = Version.unpack(body)
    assert (agreed.major, agreed.minor) == (0, 1)
    assert agreed.capabilities == Capabilities(16, 65536, 100, 4096)
    peer.close()
    older = connect_raw()
    assert Version.unpack(older.ask(Command.VERSION, struct.pack("<HH", 0, 0))[1]).minor == 0


def test_i9_a_client_that_says_nothing_does_not_keep_the_next_one_out(
    connect_raw: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "NEGOTIATION_TIMEOUT_S", 0.05)
    silent, halting = connect_raw(), connect_raw()
    halting.send(header(1, 100))
    connect_raw().greet()
    assert silent.at_end()
    assert halting.at_end()


@given(st.binary(max_size=200), st.booleans())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_i9_whatever_a_client_sends_the_next_one_is_served(
    served: Path, garbage: bytes, greet: bool
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(served))
        if greet:
            version = Version().pack()
            peer.send(header(1, 16 + len(version)) + version)
        peer.send(garbage)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(65536):
            pass
    with Client(served) as client:
        assert client.device_info().num_regions == 9


def test_i9_random_bodies_in_good_frames_are_answered(served: Path, device: Any) -> None:
    @given(st.sampled_from(list(Command)[1:]), st.binary(max_size=64))
    @settings(max_examples=300, deadline=None)
    def ask(command: int, body: bytes) -> None:
        peer.send(header(command, 16 + len(body)) + body)
        reply = peer.recv(1 << 20)
        assert struct.unpack_from("<HH", reply) == (1, command)

    device.feature_data = bytes(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(served))
        version = Version().pack()
        peer.send(header(1, 16 + len(version)) + version)
        peer.recv(65536)
        ask()


def test_descriptors_of_a_client_are_gone_with_it(
    served: Path, device: Any, open_fds: Callable[[], int]
) -> None:
    eventfd = os.eventfd(0)
    before = open_fds()
    for _ in range(3):
        with Client(
            served, on_dma_read=lambda address, count: bytes(count), on_dma_write=lambda *_: None
        ) as client:
            client.dma_map(DmaMap(3, 0, 0, 4096), eventfd)
            trigger = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
            client.set_irqs(SetIrqs(trigger, 2, 0, 4), [eventfd] * 4)
            _, fd = client.region_mapping(2)
            assert fd is not None
            os.close(fd)
        assert device.gone.wait(WAIT_S)
        device.gone.clear()
    with Client(served) as client:
        client.device_info()
    assert device.gone.wait(WAIT_S)
    assert open_fds() <= before + 1
    os.close(eventfd)


def test_the_device_learns_that_a_client_has_gone_and_keeps_its_state(
    served: Path, device: Any
) -> None:
    with Client(served) as client:
        client.region_write(0, 0, b"kept")
    assert device.gone.wait(WAIT_S)
    with Client(served) as client:
        assert client.region_read(0, 0, 4) == b"kept"
        assert device.here.is_set()


def test_requests_sent_before_the_end_are_still_executed(
    connect_raw: Callable[[], Any], device: Any
) -> None:
    peer = connect_raw()
    peer.greet()
    for value in range(5):
        body = struct.pack("<QII", 0, 0, 1) + bytes([value])
        peer.send(header(Command.REGION_WRITE, 16 + len(body), 0x10) + body)
    peer.close()
    assert device.gone.wait(WAIT_S)
    assert device.registers[0] == 4


def test_the_socket_file(device: Any, tmp_path: Path) -> None:
    path = tmp_path / "private.sock"
    server = Server(path, device)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OSError, match="in use"):
        Server(path, device)
    server.close()
    assert not path.exists()
    server.close()

    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    Server(path, device).close()
    assert not path.exists()
    path.write_text("no socket")
    with pytest.raises(OSError, match="in use"):
        Server(path, device)
    assert path.read_text() == "no socket"


def test_a_socket_file_that_someone_else_has_made_since_stays(device: Any, tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    server = Server(path, device)
    path.unlink()
    successor = Server(path, device)
    server.close()
    assert path.exists()
    successor.close()


@pytest.mark.parametrize("busy", [False, True])
def test_closing_ends_serving(
    device: Any, tmp_path: Path, open_fds: Callable[[], int], busy: bool
) -> None:
    before = open_fds()
    path = tmp_path / "device.sock"
    server = Server(path, device)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client = Client(path) if busy else None
    server.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert not path.exists()
    if client is not None:
        client.close()
        assert device.gone.is_set()
    server.serve_forever()
    assert open_fds() == before


def test_closing_between_accepting_a_client_and_serving_it(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "device.sock"
    server = Server(path, device)

    def make_session(*arguments: Any) -> Session:
        server.close()
        return Session(*arguments)

    monkeypatch.setattr(server_module, "Session", make_session)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.raises(Disconnected):
        Client(path)
    thread.join(2)
    assert not thread.is_alive()
    assert not device.here.is_set()


@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_handler_may_close_the_server(device: Any, tmp_path: Path, busy: bool) -> None:
    path = tmp_path / "device.sock"
    server = Server(path, device)
    main_thread = threading.get_ident()

    def interrupt() -> None:
        client = Client(path)
        if not busy:
            client.close()
            assert device.gone.wait(WAIT_S)
        signal.pthread_kill(main_thread, signal.SIGUSR1)
        if busy:
            with pytest.raises(Disconnected):
                client.reset()
            client.close()

    previous = signal.signal(signal.SIGUSR1, lambda *_: server.close())
    thread = threading.Thread(target=interrupt, daemon=True)
    try:
        thread.start()
        server.serve_forever()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    thread.join(WAIT_S)
    assert not path.exists()


def test_serving_a_descriptor(device: Any, tmp_path: Path, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=Server(theirs.detach(), device).serve_forever, daemon=True)
    thread.start()
    version = Version().pack()
    ours.send(header(1, 16 + len(version)) + version)
    assert ours.recv(65536)
    ours.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()

    path = tmp_path / "listening.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    server = Server(listener.detach(), device)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for _ in range(2):
        with Client(path) as client:
            assert client.device_info().num_irqs == 5
    server.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert open_fds() == before
