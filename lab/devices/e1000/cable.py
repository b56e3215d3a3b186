"""The cable of a NIC: frames over a UNIX socket that keeps message boundaries.

Owns the connection to whoever listens at a path (`hub`, or any other peer): made as soon as
there is somebody, and again after it was lost. Frames are without CRC, one in each message of a
SOCK_SEQPACKET socket. What a frame means is the NIC's business.

A frame for which there is no peer, or a peer that does not read, is lost, as on a cable.
"""

import logging
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 16384
"""The longest frame without its CRC that an 8254x handles, and a little more."""
RETRY_S = 0.2
SEND_PATIENCE_MS = 20
"""How long a frame waits for a peer that does not read: the driver's unmapping waits for it."""
_BUFFER_BYTES = 1 << 20


class Link(Protocol):
    """What a NIC needs of its cable."""

    def start(self, receive: Callable[[bytes], None]) -> None:
        """Give every frame that arrives to `receive`, in one thread; it may wait there."""

    def send(self, frame: bytes) -> None:
        """Send a frame, or lose it. From any thread."""

    def close(self) -> None:
        """Bring no frame any more."""


class SocketLink:
    """A link to the peer that listens at `path`."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self._socket: socket.socket | None = None
        self._is_stuck = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, receive: Callable[[bytes], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(receive,), name="link", daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        peer = self._socket
        if peer is None:
            return
        try:
            # Who did not read while one frame waited is not waited for with the next ones.
            if not self._is_stuck:
                self._is_stuck = not _is_writable(peer)
            peer.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self._is_stuck = False
        except (OSError, ValueError) as error:
            logger.debug("a frame is lost: %s", error)

    def close(self) -> None:
        self._closing.set()
        peer = self._socket
        if peer is not None:
            _shut_down(peer)
        if self._thread is not None:
            self._thread.join()

    def _run(self, receive: Callable[[bytes], None]) -> None:
        while not self._closing.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                try:
                    peer.connect(self._path)
                except OSError as error:
                    logger.debug("no link at %s: %s", self._path, error)
                else:
                    self._socket = peer
                    # A close() that came before this line did not see the socket.
                    if self._closing.is_set():
                        return
                    _receive_all(peer, receive)
                    self._socket = None
            self._closing.wait(RETRY_S)


def _is_writable(peer: socket.socket) -> bool:
    """Wait for a moment until the peer takes a frame. Raises `ValueError` if it is closed."""
    poller = select.poll()
    poller.register(peer, select.POLLOUT)
    return bool(poller.poll(SEND_PATIENCE_MS))


def _receive_all(peer: socket.socket, receive: Callable[[bytes], None]) -> None:
    try:
        # One byte more than a frame has: what is longer is not taken for one.
        while frame := peer.recv(MAX_FRAME_BYTES + 1):
            receive(frame)
    except OSError as error:
        logger.debug("the link is lost: %s", error)


def _shut_down(peer: socket.socket) -> None:
    try:
        peer.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("the link was closed already: %s", error)
