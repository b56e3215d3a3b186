"""What the vfio-user tests share: a small device that keeps a record, a server in a thread, and a
raw socket that speaks no protocol of its own."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.vfio_user.server import Device, DmaPort, Server
from sync.vfio_user.protocol import (
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Feature,
    IrqInfo,
    RegionInfo,
    SetIrqs,
    Version,
    VfioUserError,
)

WAIT_S = 10.0


class RecordingDevice(Device):
    """Region 0: 4 KiB of registers; 1: read-only; 2: mappable, sparse; others empty. Interrupt type
    2 has 4 vectors. Owns every descriptor it is given until the client goes."""

    def __init__(self) -> None:
        self.registers = bytearray(4096)
        self.events: list[object] = []
        self.fds: list[int] = []
        self.refuse: dict[str, int] = {}
        self.feature_data = b""
        self.stream = b""
        self.received = b""
        self.dma: DmaPort | None = None
        self.mapped_fd = os.memfd_create("bar2")
        self.on_write: Callable[[int, bytes], None] | None = None
        self.on_unmap: Callable[[], None] | None = None
        self.here = threading.Event()
        self.gone = threading.Event()

    def _note(self, name: str, *details: object) -> None:
        if name in self.refuse:
            raise VfioUserError(self.refuse[name])
        self.events.append((name, *details))

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(3, 9, 5)

    def region_info(self, index: int) -> RegionInfo:
        if index == 0:
            return RegionInfo(index, 3, len(self.registers))
        if index == 1:
            return RegionInfo(index, 1, 4096)
        if index == 2:
            return RegionInfo(index, 7, 1 << 16)
        return RegionInfo(index, 0, 0)

    def region_fd(self, index: int) -> int | None:
        return self.mapped_fd

    def irq_info(self, index: int) -> IrqInfo:
        return IrqInfo(index, 1, 4 if index == 2 else 0)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._note("read", region, offset, count)
        return bytes(self.registers[offset : offset + count]) if region == 0 else bytes(count)

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self._note("write", region, offset, data)
        if region == 0:
            self.registers[offset : offset + len(data)] = data
        if self.on_write is not None:
            self.on_write(offset, data)

    def set_irqs(self, request: SetIrqs, fds: list[int]) -> None:
        self._note("irqs", request, len(fds))
        self.fds += fds

    def dma_map(self, region: DmaMap, fd: int | None) -> None:
        self._note("map", region, fd is not None)
        if fd is not None:
            self.fds.append(fd)

    def dma_unmap(self, request: DmaUnmap) -> None:
        self._note("unmap", request)
        if self.on_unmap is not None:
            self.on_unmap()

    def reset(self) -> None:
        self._note("reset")

    def feature(self, request: Feature) -> bytes:
        self._note("feature", request)
        return self.feature_data

    def migration_read(self, size: int) -> bytes:
        part, self.stream = self.stream[:size], self.stream[size:]
        return part

    def migration_write(self, data: bytes) -> None:
        self.received += data

    def attached(self, dma: DmaPort) -> None:
        self.dma = dma
        self.gone.clear()
        self.here.set()

    def detached(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
        self.here.clear()
        self.gone.set()


class RawPeer:
    """Sends bytes and descriptors as they are; reads whole messages."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(str(path))

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
        self.socket.sendmsg([data], [rights] if fds else [])

    def request(
        self, command: int, body: bytes = b"", *, flags: int = 0, fds: tuple[int, ...] = ()
    ) -> None:
        self.send(struct.pack("<HHIII", 77, command, 16 + len(body), flags, 0) + body, fds)

    def reply(self) -> tuple[int, int, int, bytes]:
        """Return (command, flags, errno, body) of the next message."""
        message_id, command, size, flags, errno = struct.unpack("<HHIII", self.exactly(16))
        assert message_id == 77 or not flags & 1
        return command, flags, errno, self.exactly(size - 16)

    def ask(self, command: int, body: bytes = b"", **options: object) -> tuple[int, bytes]:
        """Return (errno, body) of the reply to a request."""
        self.request(command, body, **options)  # type: ignore[arg-type]
        answered, flags, errno, content = self.reply()
        assert answered == command
        assert flags == (0x21 if errno else 0x01)
        return errno, content

    def greet(self) -> None:
        assert self.ask(Command.VERSION, Version().pack())[0] == 0

    def at_end(self) -> bool:
        """Whether the server closes the connection."""
        with contextlib.suppress(ConnectionError):
            return self.socket.recv(1) == b""
        return True

    def close(self) -> None:
        self.socket.close()

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, "connection ended"
            data += part
        return data


@pytest.fixture
def device() -> Iterator[RecordingDevice]:
    device = RecordingDevice()
    yield device
    os.close(device.mapped_fd)


@pytest.fixture
def served(device: RecordingDevice, tmp_path: Path) -> Iterator[Path]:
    """Path of the socket at which `device` is served."""
    path = tmp_path / "device.sock"
    server = Server(path, device)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield path
    server.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.fixture
def connect_raw(served: Path) -> Iterator[Callable[[], RawPeer]]:
    """A function that connects a raw peer, which is closed at the end."""
    peers: list[RawPeer] = []

    def connect() -> RawPeer:
        peers.append(RawPeer(served))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()
