"""The errors of the vfio-user room: who broke what."""

import os

from sync.errors import SyncError


class ProtocolError(SyncError):
    """The peer sent something that the protocol does not allow; its connection cannot be used."""


class Disconnected(SyncError):
    """The connection is gone: the peer left or this side closed it. Connect again."""


class VfioUserError(SyncError):
    """A request was refused; `errno` says why.

    A device raises it to have an error reply sent; a client gets it when such a reply arrives.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message or os.strerror(errno))
        self.errno = errno
