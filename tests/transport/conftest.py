"""What the tests of the link share: endpoints, and a sender and receiver that have greeted."""

import os
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import trio

from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.sender import Sender, SenderOptions, open_sender

PAGE = 4096


@dataclass
class LinkPair:
    """Both ends of a session in one process, and their memories."""

    sender: Sender
    receiver: Receiver
    source: npt.NDArray[np.uint8]
    target: npt.NDArray[np.uint8]


class RawZmtp:
    """ZMTP 3.0 by hand (rfc.zeromq.org/spec/23) on a TCP connection: what libzmq would never do."""

    GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    TIMEOUT_S = 20

    def connect(self, url: str) -> socket.socket:
        """A connection to `url` that has agreed on ZMTP as a DEALER without an identity."""
        connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        return self._agree(connection, b"DEALER")

    def accept(self, listener: socket.socket) -> socket.socket:
        """A connection from `listener` that has agreed on ZMTP as a ROUTER."""
        return self._agree(listener.accept()[0], b"ROUTER")

    def flood_until_shut(self, connection: socket.socket, limit_bytes: int = 512 << 20) -> int:
        """One message that never ends, in parts of 64 KiB; returns how much was taken."""
        part = b"\x03" + struct.pack(">Q", 65536) + bytes(65536)
        sent = 0
        with connection:
            try:
                while sent < limit_bytes:
                    connection.sendall(part)
                    sent += len(part)
            except ConnectionError:
                return sent
        raise AssertionError(f"took {sent} bytes of one message")

    def _agree(self, connection: socket.socket, socket_type: bytes) -> socket.socket:
        connection.settimeout(self.TIMEOUT_S)
        connection.sendall(self.GREETING)
        self._read(connection, len(self.GREETING))
        ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(socket_type)) + socket_type
        connection.sendall(b"\x04" + bytes([len(ready)]) + ready)
        # libzmq takes a message for a protocol error until it has sent its own READY.
        _flags, length = self._read(connection, 2)
        self._read(connection, length)
        return connection

    def _read(self, connection: socket.socket, n_bytes: int) -> bytes:
        data = b""
        while len(data) < n_bytes:
            piece = connection.recv(n_bytes - len(data))
            assert piece, "the connection ended during the handshake"
            data += piece
        return data


@pytest.fixture
def raw_zmtp() -> RawZmtp:
    """For peers that misuse ZMTP itself."""
    return RawZmtp()


PairFactory = Callable[..., AbstractAsyncContextManager[LinkPair]]


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a short name: the path of a UNIX socket has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="ferry") as folder:
        yield Path(folder)


@pytest.fixture(params=["tcp", "ipc"])
def bind_url(request: pytest.FixtureRequest, socket_folder: Path) -> str:
    """A URL to bind, of every kind there is."""
    return "tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{socket_folder}/link"


@pytest.fixture
def link_pair() -> PairFactory:
    """Opens a sender and a receiver that have greeted each other and attached zeroed memories.

    With `n_pages` 0 nothing is attached.
    """

    @asynccontextmanager
    async def open_pair(
        url: str = "tcp://127.0.0.1:*",
        n_pages: int = 0,
        sending: SenderOptions | None = None,
        receiving: ReceiverOptions | None = None,
        cache_bytes: int = 1 << 20,
    ) -> AsyncIterator[LinkPair]:
        source = np.zeros(n_pages * PAGE, np.uint8)
        target = np.zeros(n_pages * PAGE, np.uint8)
        async with open_receiver(url, receiving) as receiver, trio.open_nursery() as nursery:
            accepted = trio.Event()

            async def answer() -> None:
                await receiver.wait_hello()
                await receiver.accept(b"welcome")
                if n_pages:
                    receiver.attach_memory(target)
                accepted.set()

            nursery.start_soon(answer)
            async with open_sender(receiver.url, os.urandom(16), b"hello", sending) as sender:
                if n_pages:
                    sender.attach_memory(source, cache_bytes=cache_bytes)
                await accepted.wait()
                yield LinkPair(sender, receiver, source, target)

    return open_pair
