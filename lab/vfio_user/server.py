"""The server: a UNIX socket at which one client at a time finds a device.

What a client may ask for is the business of `session`, what comes of it that of the `Device`.
Source: vfio-user specification, "Socket", "Client Disconnection", "Backend Program Conventions".
"""

import contextlib
import socket
from pathlib import Path
from typing import Final

from lab.vfio_user.device import Device
from lab.vfio_user.dma import DmaPort
from lab.vfio_user.session import Session
from sync.vfio_user.protocol import Capabilities, TwinSocket
from sync.vfio_user.sockets import file_identity, listen_unix, unlink_unix

__all__ = ["SERVER_CAPABILITIES", "Device", "DmaPort", "Server"]

SERVER_CAPABILITIES: Final = Capabilities(
    max_msg_fds=16, twin_socket=TwinSocket(supported=True), write_multiple=True
)


class Server:
    """Serves `device` to one client after the other.

    `endpoint`: path of the socket file to make (mode 0600), or descriptor of a UNIX socket, which
    the server then owns: listening, or connected to its only client.
    Raises OSError if that does not work.
    """

    def __init__(
        self,
        endpoint: str | Path | int,
        device: Device,
        *,
        capabilities: Capabilities = SERVER_CAPABILITIES,
    ) -> None:
        self._device = device
        self._capabilities = capabilities
        self._file: tuple[str | Path, tuple[int, int]] | None = None
        if isinstance(endpoint, int):
            self._socket = socket.socket(fileno=endpoint)
        else:
            self._socket = listen_unix(endpoint)
            self._file = endpoint, file_identity(endpoint)
        self._session: Session | None = None
        self._serving = False
        self._closing = False

    def serve_forever(self) -> None:
        """Serve until `close`, or until the only client of a connected descriptor has gone."""
        self._serving = True
        try:
            if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                while not self._closing:
                    client, _ = self._socket.accept()
                    self._serve(client)
            else:
                self._serve(self._socket)
        except OSError:
            if not self._closing:
                raise
        finally:
            self._release()

    def close(self) -> None:
        """Stop serving; `serve_forever` returns once the client is disconnected.

        May be called from any thread and from a signal handler: it takes no lock.
        """
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        session = self._session
        if session is not None:
            session.shutdown()
        if not self._serving:
            self._release()

    def _serve(self, client: socket.socket) -> None:
        session = Session(client, self._device, self._capabilities)
        self._session = session
        # A close() that came before this line did not see the session.
        if self._closing:
            session.shutdown()
        session.run()
        self._session = None

    def _release(self) -> None:
        self._socket.close()
        if self._file is not None:
            unlink_unix(*self._file)
            self._file = None
