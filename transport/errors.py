"""The errors that `transport` raises. A `FrameError` or `RecordError` is the peer's fault."""


class TransportError(Exception):
    """Moving pages or records between the hosts failed."""


class FrameError(TransportError):
    """A page frame is malformed, corrupted, replayed or out of order."""


class RecordError(TransportError):
    """A control or tunnel message is malformed or breaks the protocol."""


class PeerUnreachable(TransportError):
    """Nobody answers at the peer's address."""


class PeerLost(TransportError):
    """The peer answered once and is gone, or has been silent for too long."""


class PeerRefused(TransportError):
    """The peer answered the greeting with a refusal; `payload` is what it said."""

    def __init__(self, payload: bytes) -> None:
        super().__init__("the peer refused the session")
        self.payload = payload


class VersionMismatch(TransportError):
    """The peer speaks another version of the transport protocol."""
