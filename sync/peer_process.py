"""The process at the other end of a UNIX socket (SO_PEERCRED of unix(7)), as far as it is known."""

import os
import signal
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_CREDENTIALS = struct.Struct("3i")


class _Socket(Protocol):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def peer_pid(sock: _Socket) -> int:
    """Who connected to, or listens at, the other end; 0 if it is not of our process namespace."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return 0
    pid: int = _CREDENTIALS.unpack(data)[0]
    return max(pid, 0)


def pid_namespace() -> int:
    """The namespace in which this process sees others (pid_namespaces(7)); 0 if it cannot tell."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


class PeerProcess:
    """A handle on the process at the other end of `sock`, for which no other one is ever taken
    (pidfd_open(2)). To be closed."""

    def __init__(self, sock: _Socket) -> None:
        self._descriptor = -1
        pid = peer_pid(sock)
        if pid and pid != os.getpid():
            with suppress(OSError):
                self._descriptor = os.pidfd_open(pid)

    def kill(self) -> None:
        """SIGKILL, which a stopped process heeds, too; nothing if it is gone, or this one."""
        if self._descriptor >= 0:
            with suppress(OSError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def close(self) -> None:
        """Gives the handle back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
