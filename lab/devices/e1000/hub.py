"""A hub for the cables of `cable`: each frame that comes in goes out at every other port.

Owns the ports. It learns no addresses, so that a NIC whose guest has moved to another port needs
not be learned again. A port that does not read loses frames, and holds nobody up.

`python -m lab.devices.e1000.hub PATH` is one that runs until SIGTERM or SIGINT.
"""

import contextlib
import logging
import os
import selectors
import signal
import socket
import sys
from pathlib import Path

from lab.devices.e1000.cable import MAX_FRAME_BYTES
from sync.vfio_user.sockets import file_identity, unlink_unix

logger = logging.getLogger(__name__)

MAX_PORTS = 64
_BUFFER_BYTES = 1 << 20
_FRAMES_AT_ONCE = 64


class Hub:
    """Listens at `path` (mode 0600). Raises `OSError` if it cannot."""

    def __init__(self, path: str | Path) -> None:
        self._listener = _listen(path)
        self._file = path, file_identity(path)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._ports: set[socket.socket] = set()

    @property
    def n_ports(self) -> int:
        """How many cables are plugged in."""
        return len(self._ports)

    def serve_forever(self) -> None:
        """Pass frames on until `close`."""
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._forward(key.fileobj)
        finally:
            self._selector.close()
            for each in (*self._ports, self._listener, self._woken, self._wake):
                each.close()
            unlink_unix(*self._file)

    def close(self) -> None:
        """End `serve_forever`. From any thread or a signal handler."""
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _accept(self) -> None:
        port, _ = self._listener.accept()
        if len(self._ports) >= MAX_PORTS:
            logger.warning("all %d ports are taken", MAX_PORTS)
            port.close()
            return
        port.setblocking(False)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._ports.add(port)
        self._selector.register(port, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        for _ in range(_FRAMES_AT_ONCE):
            try:
                frame = source.recv(MAX_FRAME_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:
                frame = b""
            if not frame:
                self._selector.unregister(source)
                self._ports.discard(source)
                source.close()
                return
            if len(frame) > MAX_FRAME_BYTES:
                continue
            for port in self._ports - {source}:
                # Full, or gone: its own turn will tell.
                with contextlib.suppress(OSError):
                    port.send(frame, socket.MSG_NOSIGNAL)


def _listen(path: str | Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # bind() gives the file the mode of the socket: no moment at which others can connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(MAX_PORTS)
    except BaseException:
        listener.close()
        raise
    return listener


def main() -> int:
    """The process: one argument, the path."""
    if len(sys.argv) != 2:
        print("usage: python -m lab.devices.e1000.hub PATH", file=sys.stderr)
        return 2
    hub = Hub(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _signal, _frame: hub.close())
    hub.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
