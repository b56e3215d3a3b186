"""ZeroMQ sockets as this project wants them.

Owns URLs, socket options and the mode of an `ipc` file. Knows no message.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import zmq

from transport.session.secret import CURVE_PART_BYTES, Secret, admit_by, prove_by
from transport.wire.errors import EndpointError
from transport.wire.records import MAX_DATA_LANES, MAX_MESSAGE_BYTES

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
_IO_THREADS = 2
"""Of libzmq: what two lanes send is copied from and to the kernel, and encrypted, at once."""

_POLLIN = int(zmq.POLLIN)


class Wakeup:
    """Wakes a thread that polls; safe to set from any thread, and to call once closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Held while the descriptor is written to or closed: its number may be somebody else's as
        soon as it is closed."""
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor, for a poller."""
        return self._fd

    def set(self) -> None:
        """Make `fileno` readable."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Make `fileno` unreadable until the next `set`."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the descriptor back. Only once no thread polls it any more."""
        with self._lock:
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


def listening_url(url: str) -> str:
    """`url` with an address in place of a host's name, of which ZeroMQ knows IPv4 addresses only.

    Blocks, and raises, as `addresses_of` does.
    """
    parts = urlsplit(url)
    host = parts.hostname
    if parts.scheme != "tcp" or host is None or host == "*" or _is_address(host):
        return url
    if host in (name for _, name in socket.if_nameindex()):
        return url  # to bind there, which libzmq can
    return at_address(url, addresses_of(host)[0])


def addresses_of(host: str) -> list[str]:
    """The addresses of a host, those of IPv4 first. Blocks: names may be asked of a server. Raises
    `EndpointError` for a name that nobody knows."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise EndpointError(f"there is no host {host!r} ({reason})") from None
    return [str(row[4][0]) for row in sorted(found, key=lambda row: row[0] != socket.AF_INET)]


def at_address(url: str, address: str) -> str:
    """A `tcp` URL with `address` in place of its host."""
    port = urlsplit(url).netloc.rpartition(":")[2]
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _is_address(host: str) -> bool:
    """Whether `host` is a number already; one with a zone (`fe80::1%eth0`) is."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """The ZeroMQ context of one session's sockets."""
    return zmq.Context(_IO_THREADS)


def open_dealer(
    context: zmq.Context[zmq.Socket[bytes]], routing_id: bytes, secret: Secret | None
) -> zmq.Socket[bytes]:
    """A DEALER, not connected yet. Without a `secret` nothing is encrypted."""
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


def open_router(
    context: zmq.Context[zmq.Socket[bytes]], secret: Secret | None
) -> zmq.Socket[bytes]:
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
    """The URL, a wildcard port filled in."""
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
