"""Connection events of a ZeroMQ socket, and the bound on what a connection may keep in memory.

ZMQ_MAXMSGSIZE bounds a part of a message and the high-water mark counts whole messages, but nothing
in libzmq (4.3) bounds the *number of parts*: a peer whose message never ends fills the process's
memory, unseen by the application. So the kernel's count of bytes that came in on a connection
(tcp(7), TCP_INFO) is compared with what we were given from it, and a connection that has too much
in between is shut down. An `ipc` endpoint has no such count; it is open to its owner only.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import zmq

from transport.session.message_memory import give_back_message_memory
from transport.session.secret import CURVE_PART_BYTES
from transport.session.sockets import MAX_CONNECTIONS, RECEIVE_HIGH_WATER, receive
from transport.wire.records import MAX_CHANNEL_MESSAGE_BYTES

_LOOKS_AFTER = 20
"""Looks after a connection was ended in which libzmq may still be freeing what it kept for it."""
_TCP_INFO_BYTES_RECEIVED = struct.Struct("<128xQ")  # linux/tcp.h: tcpi_bytes_received, Linux 4.1
_INPUT_QUEUE_BYTES = struct.Struct("<i")
_SIOCINQ = 0x541B
_NO_LINGER = struct.pack("<ii", 1, 0)
_MONITOR_EVENT = struct.Struct("<Hi")
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

WATCH_S = 0.05
"""How often a watch looks at its connections: a flood gains this much time's worth of memory."""


class ConnectionEvent(Enum):
    """What happened to a connection."""

    READY = 1
    """ZMTP has been agreed on; the descriptor is not known here (-1)."""
    GONE = 2
    """The connection ended, by the peer or by us."""
    UNSUITED = 3
    """Its ends did not agree on ZMTP, or on the secret; the descriptor is not known here (-1)."""


@dataclass(slots=True)
class _Connection:
    """One connection of a watched socket."""

    name: tuple[object, object]
    """Local and peer address: tells whether the descriptor still means this connection."""
    stranger: bool = True
    """Whether nobody has vouched for it."""
    given_bytes: int = 0
    """What we were given from it, as it counts on the wire."""


class Watch:
    """Connection events of one socket, and the bound on what each connection keeps in our memory.

    For the thread that owns the socket. Make it before the socket is bound or connected.
    """

    _EVENTS = (
        zmq.EVENT_ACCEPTED
        | zmq.EVENT_CONNECTED
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | _HANDSHAKE_FAILED
        | zmq.EVENT_DISCONNECTED
        | zmq.EVENT_CLOSED
    )

    def __init__(self, zsocket: zmq.Socket[bytes]) -> None:
        self._socket = zsocket
        self._limit_bytes = 0
        self._connections: dict[int, _Connection] = {}
        self._vouched: set[int] = set()
        """Descriptors of connections whose opening has not been heard of yet."""
        self._next_look = 0.0
        self._looks_after = 0
        encrypted = zsocket.get(zmq.MECHANISM) == zmq.CURVE
        self._more_bytes = CURVE_PART_BYTES if encrypted else 0
        """Of each part on the wire, beside its own and those of its frame."""
        self.monitor: zmq.Socket[bytes] = zsocket.get_monitor_socket(self._EVENTS)
        """Readable when `events` has something; to be polled."""
        self.expect(MAX_CHANNEL_MESSAGE_BYTES)

    def expect(self, message_bytes: int) -> None:
        """Messages may be this long: a connection may keep a few more than libzmq reads ahead."""
        self._limit_bytes = (RECEIVE_HIGH_WATER + 2) * max(message_bytes, MAX_CHANNEL_MESSAGE_BYTES)

    def events(self) -> Iterator[tuple[ConnectionEvent, int]]:
        """What has happened since, with the connection's descriptor."""
        while (message := receive(self.monitor)) is not None:
            kind, value = _MONITOR_EVENT.unpack(message[0].bytes)
            if kind in (zmq.EVENT_ACCEPTED, zmq.EVENT_CONNECTED):
                self._opened(value)
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                yield ConnectionEvent.READY, -1
            elif kind & _HANDSHAKE_FAILED:
                yield ConnectionEvent.UNSUITED, -1
            elif kind in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                known = self._connections.pop(value, None)
                self._vouched.discard(value)
                if known is not None or kind == zmq.EVENT_DISCONNECTED:
                    yield ConnectionEvent.GONE, value

    def given(self, parts: Sequence[zmq.Frame]) -> int:
        """Account for a message that was received (without the routing id); returns its descriptor.

        -1 if libzmq does not know it.
        """
        try:
            fd = int(parts[0].get(zmq.SRCFD)) if parts else -1
        except zmq.ZMQError:
            return -1
        connection = self._connections.get(fd)
        if connection is not None:
            # ZMTP 3.1: one byte of flags and one or eight of length before each part.
            lengths = [len(part) + self._more_bytes for part in parts]
            connection.given_bytes += sum(n + (2 if n < 256 else 9) for n in lengths)
        return fd

    def vouch(self, fd: int) -> None:
        """This connection belongs to the session: it is not ended to make room."""
        connection = self._connections.get(fd)
        if connection is None:
            self._vouched.add(fd)
        else:
            connection.stranger = False

    def drop_vouched(self) -> None:
        """Shut down the connections of the session: its link is lost."""
        for fd, connection in list(self._connections.items()):
            if not connection.stranger:
                with _duplicate(fd) as copy:
                    if copy is not None and _name(copy) == connection.name:
                        _shut_down(copy)
        self._vouched.clear()

    def enforce(self) -> int:
        """Shut down the connections that keep too much, and give back what they kept; returns how
        many are shut down.

        To be called at least every `WATCH_S`, when nothing is left to do: a look takes some ten
        system calls for each connection. More often costs nothing.
        """
        now = time.monotonic()
        if now < self._next_look:
            return 0
        self._next_look = now + WATCH_S
        if self._looks_after:
            self._looks_after -= 1
            give_back_message_memory()
        ended = 0
        for fd, connection in list(self._connections.items()):
            with _duplicate(fd) as copy:
                if copy is None or _name(copy) != connection.name:
                    continue
                if _came_in(copy) - connection.given_bytes > self._limit_bytes:
                    ended += 1
                    _shut_down(copy)
        if ended:
            self._looks_after = _LOOKS_AFTER
        return ended

    def close(self) -> None:
        """Stop watching; before the socket is closed."""
        self._socket.disable_monitor()
        self.monitor.close(linger=0)

    def _opened(self, fd: int) -> None:
        with _duplicate(fd) as copy:
            if copy is None:
                return
            self._connections.pop(fd, None)
            if len(self._connections) >= MAX_CONNECTIONS:
                self._make_room()
            self._connections[fd] = _Connection(_name(copy), stranger=fd not in self._vouched)
            self._vouched.discard(fd)

    def _make_room(self) -> None:
        """End the stranger that has been here longest: it had the most time to greet."""
        for fd, connection in self._connections.items():
            if connection.stranger:
                with _duplicate(fd) as copy:
                    if copy is not None and _name(copy) == connection.name:
                        _shut_down(copy)
                del self._connections[fd]
                return


class _duplicate:
    """A socket object of our own on a descriptor of libzmq's; None if there is none any more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._copy: socket.socket | None = None

    def __enter__(self) -> socket.socket | None:
        try:
            self._copy = socket.socket(fileno=os.dup(self._fd))
        except OSError:
            return None
        return self._copy

    def __exit__(self, *_: object) -> None:
        if self._copy is not None:
            self._copy.close()


def _name(connection: socket.socket) -> tuple[object, object]:
    try:
        return connection.getsockname(), connection.getpeername()
    except OSError:
        return None, None


def _came_in(connection: socket.socket) -> int:
    """Bytes that libzmq has read from a TCP connection; 0 where that cannot be known."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        waiting = fcntl.ioctl(connection, _SIOCINQ, bytes(_INPUT_QUEUE_BYTES.size))
    except OSError:
        return 0
    if len(info) < _TCP_INFO_BYTES_RECEIVED.size:
        return 0
    received: int = _TCP_INFO_BYTES_RECEIVED.unpack_from(info)[0]
    return received - int(_INPUT_QUEUE_BYTES.unpack(waiting)[0])


def _shut_down(connection: socket.socket) -> None:
    """libzmq then sees the end of the connection and frees what it holds of it.

    Without lingering, so that the peer is told by a reset instead of a window that stays closed.
    """
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
