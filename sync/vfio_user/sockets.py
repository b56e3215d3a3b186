"""UNIX sockets that only their owner may use: listening."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

LISTEN_BACKLOG = 8


def listen_unix(path: str | Path) -> socket.socket:
    """Return a stream socket that listens at `path`, its file of mode 0600 from the beginning.

    A socket file that no one listens at any more is replaced. Raises OSError with that path
    (EADDRINUSE when someone does listen, or when the file is no socket).
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind() gives the file the mode of the socket: no moment at which others can connect.
        os.fchmod(listener.fileno(), 0o600)
        try:
            listener.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_abandoned(path):
                raise
            Path(path).unlink()
            listener.bind(str(path))
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        number, text = error.errno or errno.ENAMETOOLONG, error.strerror or str(error)
        raise OSError(number, text, str(path)) from error
    return listener


def unlink_unix(path: str | Path, identity: tuple[int, int]) -> None:
    """Remove the socket file at `path` if it is still the one with this (device, inode)."""
    with contextlib.suppress(FileNotFoundError):
        if file_identity(path) == identity:
            Path(path).unlink()


def file_identity(path: str | Path) -> tuple[int, int]:
    """Return (device, inode) of the file at `path`."""
    status = Path(path).lstat()
    return status.st_dev, status.st_ino


def _is_abandoned(path: str | Path) -> bool:
    if not stat.S_ISSOCK(Path(path).lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
