"""The errors of the vfio-user room: who broke what."""

import os

from sync.errors import SyncError


def errno_text(number: int) -> str:
    """What an errno of an error reply means; the wire has 32 bits for it, C has 31."""
    return os.strerror(number) if number < 1 << 31 else f"error {number}"


class ProtocolError(SyncError):
    """The peer sent something that the protocol does not allow; its connection cannot be used."""


class Disconnected(SyncError):
    """The connection is gone: the peer left or this side closed it. Connect again."""


class VfioUserError(SyncError):
    """A request was refused; `errno` says why.

    A device raises it to have an error reply sent; a client gets it when such a reply arrives.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message or errno_text(errno))
        self.errno = errno
