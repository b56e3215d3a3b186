"""The client: every request through a real server, and servers that lie."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from errno import EAGAIN, EINVAL, EIO, ENOTSUP
from pathlib import Path
from typing import Any

import pytest

from lab.vfio_user.access import DmaAccess
from lab.vfio_user.client import Client
from lab.vfio_user.server import Server
from sync.vfio_user.protocol import (
    Capabilities,
    Command,
    DeviceInfo,
    Disconnected,
    DmaMap,
    DmaUnmap,
    Feature,
    IrqInfo,
    IrqSet,
    MigData,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    SetIrqs,
    TwinSocket,
    Version,
    VfioUserError,
    WriteMultiReply,
    encode_message,
)

WAIT_S = 10.0


def noting(seen: list[tuple[int, int]]) -> Callable[[int, int], bytes]:
    """Answers nothing, and notes what was asked for."""

    def read(address: int, count: int) -> bytes:
        seen.append((address, count))
        return b""

    return read


@pytest.fixture
def client(served: Path) -> Iterator[Client]:
    with Client(served) as client:
        yield client


def test_every_request(client: Client, device: Any) -> None:
    assert client.server_capabilities.max_msg_fds == 16
    assert client.device_info() == DeviceInfo(3, 9, 5)
    assert client.region_info(0) == RegionInfo(0, 3, 4096)
    assert client.region_info(2) == device.region_info(2)
    assert client.irq_info(2).count == 4
    client.region_write(0, 16, b"abcd")
    client.region_write(0, 20, b"efgh", posted=True)
    assert client.region_read(0, 16, 8) == b"abcdefgh"
    assert client.region_read(0, 0, 0) == b""
    client.region_write(0, 0, b"")
    writes = [RegionAccess(0, 0, 1, b"x"), RegionAccess(1, 0, 1, b"y")]
    assert client.write_multi(writes) == 2
    assert client.write_multi(writes, posted=True) == 2
    assert client.write_multi([*writes, RegionAccess(0, 1, 1, b"z")]) == 2
    client.reset()
    client.dma_map(DmaMap(3, 0, 0, 4096))
    client.dma_unmap(DmaUnmap(0, 0, 4096))
    device.stream = b"state"
    assert client.mig_read(100) == b"state"
    client.mig_write(b"loaded")
    assert device.received == b"loaded"
    with pytest.raises(VfioUserError) as refusal:
        client.region_read(1, 4096, 1)
    assert refusal.value.errno == EINVAL


def test_region_mapping_brings_the_descriptor(client: Client, device: Any) -> None:
    os.pwrite(device.mapped_fd, b"shared", 0)
    _, fd = client.region_mapping(2)
    assert fd is not None
    assert os.pread(fd, 6, 0) == b"shared"
    os.close(fd)
    assert client.region_mapping(0) == (RegionInfo(0, 3, 4096), None)


def test_a_feature_larger_than_asked_for_is_asked_for_again(client: Client, device: Any) -> None:
    device.feature_data = bytes(range(200))
    assert client.feature(Feature.get(1, 8)).data == device.feature_data
    assert [event[1].argsz for event in device.events] == [16, 208]
    assert client.feature(Feature.set(2, b"12345678")).flags == 2 | 1 << 17


def test_interrupts_are_split_by_what_the_server_takes(device: Any, tmp_path: Path) -> None:
    server = Server(tmp_path / "few.sock", device, capabilities=Capabilities(max_msg_fds=3))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    eventfd = os.eventfd(0)
    trigger = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
    with Client(tmp_path / "few.sock") as client:
        client.set_irqs(SetIrqs(trigger, 2, 0, 4), [eventfd] * 4)
        client.set_irqs(SetIrqs(trigger, 2, 1, 2))
        with pytest.raises(ValueError, match="descriptors"):
            client.set_irqs(SetIrqs(trigger, 2, 0, 4), [eventfd])
        with pytest.raises(ValueError, match="REGION_WRITE_MULTI"):
            client.write_multi([])
        assert device.events == [
            ("irqs", SetIrqs(trigger, 2, 0, 3), 3),
            ("irqs", SetIrqs(trigger, 2, 3, 1), 1),
            ("irqs", SetIrqs(trigger, 2, 1, 2), 0),
        ]
    os.close(eventfd)
    server.close()
    thread.join(WAIT_S)


@pytest.mark.parametrize("own", [4096, 1 << 21])
def test_transfers_keep_to_what_both_sides_take(served: Path, own: int) -> None:
    with Client(served, capabilities=Capabilities(max_data_xfer_size=own)) as client:
        limit = min(own, 1 << 20)
        assert client.max_transfer_bytes == limit
        for too_much in (
            lambda: client.region_read(0, 0, limit + 1),
            lambda: client.region_write(0, 0, bytes(limit + 1)),
            lambda: client.mig_read(limit + 1),
            lambda: client.mig_write(bytes(limit + 1)),
        ):
            with pytest.raises(ValueError, match="transfer"):
                too_much()
        client.mig_write(bytes(limit))


def test_callbacks_that_fail_refuse_the_access(served: Path, device: Any) -> None:
    def read(address: int, count: int) -> bytes:
        if address == 0:
            raise VfioUserError(EAGAIN)
        return b"wrong length"

    with Client(served, on_dma_read=read) as client:
        client.dma_map(DmaMap(3, 0, 0, 8192))
        refused: list[tuple[Callable[[], object], int]] = [
            (lambda: device.dma.read(0, 1), EAGAIN),
            (lambda: device.dma.read(4096, 1), EIO),
            (lambda: device.dma.write(0, b"x"), ENOTSUP),
        ]
        for access, errno in refused:
            with pytest.raises(VfioUserError) as refusal:
                access()
            assert refusal.value.errno == errno


def test_without_callbacks_dma_is_refused_even_inside_a_request(
    client: Client, device: Any
) -> None:
    errors = []

    def dma(offset: int, data: bytes) -> None:
        with pytest.raises(VfioUserError) as refusal:
            device.dma.read(0, 4)
        errors.append(refusal.value.errno)

    device.on_write = dma
    client.dma_map(DmaMap(3, 0, 0, 4096))
    client.region_write(0, 0, b"x")
    assert errors == [ENOTSUP]


def test_closing_ends_a_request_that_waits(served: Path, device: Any) -> None:
    inside, release = threading.Event(), threading.Event()

    def block(offset: int, data: bytes) -> None:
        inside.set()
        release.wait(WAIT_S)

    device.on_write = block
    client = Client(served)
    outcome: list[object] = []

    def write() -> None:
        try:
            client.region_write(0, 0, b"x")
        except Disconnected as error:
            outcome.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert inside.wait(WAIT_S)
    client.close()
    client.close()
    thread.join(WAIT_S)
    release.set()
    assert len(outcome) == 1
    with pytest.raises(Disconnected):
        client.reset()


class LyingServer:
    """Answers the version, then each request with the next of the bodies (or streams) given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = Version().pack()
        self.fds: list[int] = []
        self.flags = 1
        self.bodies: list[bytes] = []
        self.stream: bytes | None = None
        self.received = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        peer, _ = self._listener.accept()
        with peer, contextlib.suppress(ConnectionError):
            self._answer(peer, self.version, self.fds)
            for body in self.bodies:
                self._answer(peer, body, [])
            if self.stream is not None:
                peer.recv(1 << 20)
                peer.send(self.stream)
                self.received = peer.recv(1 << 20)

    def _answer(self, peer: socket.socket, body: bytes, fds: list[int]) -> None:
        request = peer.recv(1 << 20)
        reply = request[:4] + struct.pack("<III", 16 + len(body), self.flags, 0) + body
        socket.send_fds(peer, [reply], fds)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[LyingServer]:
    server = LyingServer(tmp_path / "liar.sock")
    yield server
    server.close()


@pytest.mark.parametrize(
    "version",
    [
        b"",
        struct.pack("<HH", 1, 0),
        struct.pack("<HH", 0, 2),
        struct.pack("<HH", 0, 0) + b"rubbish\0",
        Version(capabilities=Capabilities(twin_socket=TwinSocket(True, 1))).pack(),
        Version(capabilities=Capabilities(twin_socket=TwinSocket(True))).pack(),
        Version(capabilities=Capabilities(twin_socket=TwinSocket(True, 0))).pack(),
    ],
)
def test_i9_a_version_that_cannot_be(
    liar: LyingServer, open_fds: Callable[[], int], version: bytes
) -> None:
    """A twin socket that does not come, or is no socket, among them."""
    liar.version, liar.fds = version, [0]
    before = open_fds()
    with pytest.raises(ProtocolError):
        Client(liar.path, on_dma_read=lambda address, count: bytes(count))
    liar.close()
    assert open_fds() <= before


def test_a_twin_socket_that_was_not_asked_for(liar: LyingServer) -> None:
    left, right = socket.socketpair()
    with left, right:
        liar.version = Version(capabilities=Capabilities(twin_socket=TwinSocket(True, 0))).pack()
        liar.fds = [right.fileno()]
        with pytest.raises(ProtocolError):
            Client(liar.path)


WRONG_REPLIES: list[tuple[Callable[[Client], object], bytes]] = [
    (lambda c: c.region_read(0, 0, 4), RegionAccess(0, 0, 3, b"abc").pack()),
    (lambda c: c.region_read(0, 0, 4), RegionAccess(0, 0, 4).pack()),
    (lambda c: c.region_read(0, 0, 4), RegionAccess(0, 1, 4, b"abcd").pack()),
    (lambda c: c.region_read(0, 0, 4), RegionAccess(4, 0, 4, b"abcd").pack()),
    (lambda c: c.region_read(0, 0, 4), b""),
    (lambda c: c.region_write(0, 0, b"x"), RegionAccess(0, 0, 2).pack()),
    (lambda c: c.reset(), b"x"),
    (lambda c: c.dma_map(DmaMap(3, 0, 0, 4096)), b"x"),
    (lambda c: c.dma_unmap(DmaUnmap(0, 0, 4096)), b""),
    (lambda c: c.device_info(), bytes(16)),
    (lambda c: c.irq_info(0), bytes(3)),
    (lambda c: c.region_info(0), RegionInfo(1, 3, 4096).pack()),
    (lambda c: c.irq_info(0), IrqInfo(1, 1, 1).pack()),
    (lambda c: c.region_info(0), struct.pack("<IIIIQQ", 1 << 31, 8, 0, 0, 0, 0)),
    (lambda c: c.mig_read(4), MigData(5, b"abcde").pack()),
    (lambda c: c.mig_read(4), MigData(4).pack()),
    (lambda c: c.write_multi([RegionAccess(0, 0, 1, b"x")]), WriteMultiReply(2).pack()),
    (lambda c: c.feature(Feature.get(1, 8)), Feature.get(2, 8).pack()),
]


@pytest.mark.parametrize(("ask", "body"), WRONG_REPLIES)
def test_i9_a_reply_that_answers_something_else(
    liar: LyingServer, ask: Callable[[Client], object], body: bytes
) -> None:
    liar.version = Version(capabilities=Capabilities(write_multiple=True)).pack()
    liar.bodies = [body]
    with Client(liar.path) as client:
        with pytest.raises(ProtocolError):
            ask(client)
        with pytest.raises((ProtocolError, Disconnected)):
            client.reset()


def test_a_reply_that_stays_too_long_is_not_asked_for_for_ever(liar: LyingServer) -> None:
    liar.bodies = [struct.pack("<IIIIQQ", 72, 11, 0, 0, 4096, 0)] * 3
    with Client(liar.path) as client, pytest.raises(ProtocolError):
        client.region_info(0)


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack("<HHIII", 9, 13, 16, 1, 0),
        struct.pack("<HHIII", 1, 12, 16, 1, 0),
        struct.pack("<HHIII", 1, 13, 8, 1, 0),
        struct.pack("<HHIII", 1, 13, 1 << 30, 1, 0),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_i9_a_stream_that_is_none(liar: LyingServer, stream: bytes) -> None:
    liar.stream = stream
    with Client(liar.path) as client, pytest.raises(ProtocolError):
        client.reset()


def test_a_server_that_goes_away(liar: LyingServer) -> None:
    with Client(liar.path) as client, pytest.raises(Disconnected):
        client.reset()


def test_i9_dma_requests_that_cannot_be(liar: LyingServer) -> None:
    """They are refused one by one, over the twin socket here."""
    seen: list[tuple[int, int]] = []
    ours, theirs = socket.socketpair()
    liar.version = Version(capabilities=Capabilities(twin_socket=TwinSocket(True, 0))).pack()
    liar.fds = [theirs.fileno()]
    liar.stream = b""
    with (
        ours,
        Client(liar.path, on_dma_read=noting(seen)) as client,
    ):
        theirs.close()
        ours.settimeout(WAIT_S)
        for command, body, errno in [
            (Command.DMA_READ, b"", EINVAL),
            (Command.DMA_READ, DmaAccess(0, 4, b"abcd").pack(), EINVAL),
            (Command.DMA_READ, DmaAccess(0, 1 << 40).pack(), EINVAL),
            (Command.DMA_READ, struct.pack("<QQ", (1 << 64) - 1, 2), EINVAL),
            (Command.DMA_WRITE, DmaAccess(0, 4).pack(), EINVAL),
            (Command.DMA_WRITE, DmaAccess(0, 1, b"x").pack(), ENOTSUP),
            (Command.REGION_READ, RegionAccess(0, 0, 1).pack(), ENOTSUP),
        ]:
            ours.send(struct.pack("<HHIII", 3, command, 16 + len(body), 0, 0) + body)
            assert ours.recv(100) == struct.pack("<HHIII", 3, command, 16, 0x21, errno)
        assert seen == []
        ours.close()
        with pytest.raises(Disconnected):
            client.reset()


def test_with_a_twin_socket_nothing_is_served_on_the_main_one(liar: LyingServer) -> None:
    ours, theirs = socket.socketpair()
    liar.version = Version(capabilities=Capabilities(twin_socket=TwinSocket(True, 0))).pack()
    liar.fds = [theirs.fileno()]
    liar.stream = encode_message(7, Command.DMA_READ, DmaAccess(0, 4).pack())
    reads: list[tuple[int, int]] = []
    with ours, theirs:
        client = Client(liar.path, on_dma_read=noting(reads))
        with client, pytest.raises(Disconnected):
            client.reset()
    assert liar.received == encode_message(7, Command.DMA_READ, reply=True, error=ENOTSUP)
    assert reads == []


def test_a_server_that_does_not_answer_in_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen(1)
        with pytest.raises(Disconnected):
            Client(tmp_path / "mute.sock", timeout_s=0.05)


def test_no_server(tmp_path: Path, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    with pytest.raises(FileNotFoundError):
        Client(tmp_path / "nobody.sock")
    assert open_fds() == before
