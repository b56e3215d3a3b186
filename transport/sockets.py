"""ZeroMQ sockets as this project wants them, and what watches over their connections.

Owns URLs, socket options, the mode of an `ipc` file, connection events, and the bound on what a
connection may keep in our memory. Knows no message.

Why a watch: ZMQ_MAXMSGSIZE bounds a part of a message and the high-water mark counts whole
messages, but nothing in libzmq (4.3) bounds the *number of parts*: a peer whose message never ends
fills the process's memory, unseen by the application. So the kernel's count of bytes that came in
on a connection (tcp(7), TCP_INFO) is compared with what we were given from it, and a connection
that has too much in between is shut down. An `ipc` endpoint has no such count; it is open to its
owner only.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

import zmq

from transport.buffers import give_back_message_memory
from transport.errors import EndpointError
from transport.records import MAX_CHANNEL_MESSAGE_BYTES, MAX_DATA_LANES, MAX_MESSAGE_BYTES
from transport.secret import CURVE_PART_BYTES, admit_by, prove_by

SEND_HIGH_WATER = 128
"""Messages that libzmq queues for a connection; credit keeps everything but pongs below it."""
RECEIVE_HIGH_WATER = 4
"""Messages that libzmq reads ahead on a connection; more wait in the kernel, then at the peer."""
HANDSHAKE_MS = 3000
"""How long a connection may take to speak ZMTP."""
RECONNECT_MS = 50
"""Pause between two attempts to connect."""
MAX_CONNECTIONS = MAX_DATA_LANES + 2 + 8
"""Of a bound socket: one session, and some room for connections that are being turned away."""
WATCH_S = 0.05
"""How often a watch looks at its connections: a flood gains this much time's worth of memory."""
_IO_THREADS = 2
"""Of libzmq: what two lanes send is copied from and to the kernel, and encrypted, at once."""
_LOOKS_AFTER = 20
"""In which libzmq may still be freeing what a connection kept that was ended for it."""

_TCP_INFO_BYTES_RECEIVED = struct.Struct("<128xQ")  # linux/tcp.h: tcpi_bytes_received, Linux 4.1
_INPUT_QUEUE_BYTES = struct.Struct("<i")
_SIOCINQ = 0x541B
_NO_LINGER = struct.pack("<ii", 1, 0)
_POLLIN = int(zmq.POLLIN)
_MONITOR_EVENT = struct.Struct("<Hi")
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Wakeup:
    """Wakes a thread that polls; safe to set from any thread, and to call once closed."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """For the poller."""
        return self._fd

    def set(self) -> None:
        """Make `fileno` readable."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Make `fileno` unreadable until the next `set`."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the descriptor back. Only once no other thread can call `set` any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def check_url(url: str, *, bind: bool) -> None:
    """Raise EndpointError unless `url` can be bound or connected to."""
    try:
        parts = urlsplit(url)
        port = parts.port if not parts.netloc.endswith(":*") else 0
    except ValueError as error:
        raise EndpointError(f"{url!r} is no endpoint: {error}") from None
    if parts.scheme == "ipc":
        if parts.netloc or not parts.path.startswith("/"):
            raise EndpointError(f"{url!r}: an ipc endpoint is ipc:// and an absolute path")
        return
    if parts.scheme != "tcp":
        raise EndpointError(f"{url!r}: an endpoint is tcp://host:port or ipc:///path")
    if parts.path or not parts.hostname or port is None:
        raise EndpointError(f"{url!r}: a tcp endpoint is tcp://host:port")
    if not bind and (port == 0 or parts.hostname == "*"):
        raise EndpointError(f"{url!r}: nobody can be reached at a wildcard")


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """What a session's sockets belong to."""
    return zmq.Context(_IO_THREADS)


def open_dealer(
    context: zmq.Context[zmq.Socket[bytes]], routing_id: bytes, secret: bytes | None
) -> zmq.Socket[bytes]:
    """A DEALER, not connected yet. `secret`: see `transport.secret`; None: there is none."""
    dealer = context.socket(zmq.DEALER)
    _set_options(dealer, encrypted=secret is not None)
    if secret is not None:
        prove_by(secret, dealer)
    dealer.set(zmq.ROUTING_ID, routing_id)
    dealer.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    return dealer


def connect(dealer: zmq.Socket[bytes], url: str) -> None:
    """Start connecting; goes on in the background until the socket is closed."""
    if url.startswith("tcp://["):
        dealer.set(zmq.IPV6, 1)
    try:
        dealer.connect(url)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot connect to {url}: {error}") from None


def open_router(context: zmq.Context[zmq.Socket[bytes]], secret: bytes | None) -> zmq.Socket[bytes]:
    """A ROUTER, not bound yet, that says so when it cannot send; `secret` as of `open_dealer`."""
    router = context.socket(zmq.ROUTER)
    _set_options(router, encrypted=secret is not None)
    if secret is not None:
        admit_by(secret, router)
    router.set(zmq.ROUTER_MANDATORY, 1)
    return router


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound endpoint."""

    url: str
    """With a wildcard port filled in."""
    path: Path | None
    """The file of an ipc endpoint."""
    inode: tuple[int, int] | None
    """Device and inode of that file."""

    def remove(self) -> None:
        """Remove the file, which libzmq leaves behind, unless it has become another's."""
        if self.path is not None and _inode(self.path) == self.inode:
            self.path.unlink(missing_ok=True)


def bind(router: zmq.Socket[bytes], url: str) -> Bound:
    """Bind; the file of an ipc endpoint gets mode 0600. Raises EndpointError.

    The file is created by this very call, so the umask is narrowed around it; a chmod afterwards
    would leave a moment in which anyone can connect. The umask belongs to the process: what other
    threads create in that moment is private, too, never more open.
    """
    path = Path(url.removeprefix("ipc://")) if url.startswith("ipc://") else None
    if url.startswith("tcp://["):
        router.set(zmq.IPV6, 1)
    if path is not None:
        _check_free(path)
    before = os.umask(0o177)
    try:
        router.bind(url)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot bind {url}: {error}") from None
    finally:
        os.umask(before)
    bound_url = bytes(router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
    return Bound(bound_url, path, None if path is None else _inode(path))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _check_free(path: Path) -> None:
    """libzmq removes whatever stands at the path of an ipc endpoint; only a dead socket may go."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise EndpointError(f"cannot bind {path}: {error}") from None
    if not stat.S_ISSOCK(mode):
        raise EndpointError(f"cannot bind {path}: there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise EndpointError(f"cannot bind {path}: another process listens there")


def receive(zsocket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """The next message, not copied; None: there is none.

    Asked for first, since an exception for each empty queue costs more than a message does.
    """
    if not int(zsocket.get(zmq.EVENTS)) & _POLLIN:
        return None
    try:
        return zsocket.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None


def _set_options(zsocket: zmq.Socket[bytes], *, encrypted: bool) -> None:
    zsocket.set(zmq.LINGER, 0)
    zsocket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + (CURVE_PART_BYTES if encrypted else 0))
    zsocket.set(zmq.SNDHWM, SEND_HIGH_WATER)
    zsocket.set(zmq.RCVHWM, RECEIVE_HIGH_WATER)
    zsocket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


class ConnectionEvent(Enum):
    """What happened to a connection."""

    READY = 1
    """ZMTP has been agreed on; the descriptor is not known here (-1)."""
    GONE = 2
    """It ended, by the peer or by us."""
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
        self._next_look = 0.0
        self._looks_after = 0
        encrypted = zsocket.get(zmq.MECHANISM) == zmq.CURVE
        self._more_bytes = CURVE_PART_BYTES if encrypted else 0
        """Of each part on the wire, beside its own and those of its frame."""
        self.monitor: zmq.Socket[bytes] = zsocket.get_monitor_socket(self._EVENTS)
        """To be polled."""
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
        if connection is not None:
            connection.stranger = False

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
            self._connections[fd] = _Connection(_name(copy))
            do_not_pace(copy)

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


def do_not_pace(connection: socket.socket) -> None:
    """Have a TCP connection within this machine, which has no bottleneck, send as fast as it can.

    BBR, where the system has it, would look for one, and pace what it sends by timers. Any user
    may have Reno (tcp(7), TCP_CONGESTION), and without loss it holds nothing back.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        if connection.getsockname()[0] == connection.getpeername()[0]:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    except OSError:
        return


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
