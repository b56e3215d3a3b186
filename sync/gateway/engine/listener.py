"""A listening UNIX socket of the gateway: for its own user alone, and never over a live one."""

import contextlib
import errno
import socket
from pathlib import Path

from sync.gateway.errors import SocketInUse
from sync.vfio_user.sockets import LISTEN_BACKLOG, file_identity, listen_unix, unlink_unix


class Listener:
    """Listens at `path` (mode 0600), non-blocking; the file of a process that was killed is
    replaced.

    Raises `SocketInUse` if somebody listens there, or if the file is no socket; OSError if the path
    cannot be used.
    """

    def __init__(
        self,
        path: Path,
        passed: socket.socket | None = None,
        identity: tuple[int, int] | None = None,
    ) -> None:
        """`passed`: a socket that listens there already, whose file is somebody else's, or the one
        of `identity` (device, inode)."""
        self._path = path
        try:
            self._sock = passed or listen_unix(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise SocketInUse(
                f"{path} is in use by another process, or is no socket: stop that process or "
                "choose another path"
            ) from error
        self._sock.setblocking(False)
        self.identity = identity if passed else file_identity(path)

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, or None. Raises OSError for want of descriptors or memory."""
        try:
            return self._sock.accept()[0]
        except (BlockingIOError, ConnectionError):
            return None

    def answer_for(self) -> None:
        """Whoever connects from here on sees this process as the other end (SO_PEERCRED), whichever
        made the socket."""
        with contextlib.suppress(OSError):
            self._sock.listen(LISTEN_BACKLOG)

    def let_go(self) -> None:
        """The file is another process's."""
        self.identity = None

    def close(self) -> None:
        """Stops listening and removes the file, if it is ours, and still the same."""
        self._sock.close()
        if self.identity is None:
            return
        with contextlib.suppress(OSError):
            unlink_unix(self._path, self.identity)
