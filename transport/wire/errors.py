"""The errors that `transport` raises. A `FrameError` or `RecordError` is the peer's fault."""

from typing import ClassVar


class TransportError(Exception):
    """Moving pages or records between the hosts failed."""

    exit_name: ClassVar[str] = "internal"
    """The name of the exit code of a command that ends with it."""


class FrameError(TransportError):
    """A page frame is malformed, corrupted, replayed or out of order."""

    exit_name = "peer_protocol"


class RecordError(TransportError):
    """A control or tunnel message is malformed or breaks the protocol."""

    exit_name = "peer_protocol"


class EndpointError(TransportError):
    """The URL is not one that can be bound or connected to (`tcp://host:port`, `ipc:///path`)."""

    exit_name = "local"


class PeerUnreachable(TransportError):
    """Nobody answers at the peer's address."""

    exit_name = "unreachable"


class PeerLost(TransportError):
    """The peer answered once and is gone, or has been silent for too long."""

    exit_name = "peer_lost"


class PeerClosed(PeerLost):
    """The peer ended the session on purpose; `reason` is what it said, possibly empty."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the peer ended the session: {reason}" if reason else "the peer ended it")
        self.reason = reason


class PeerRefused(TransportError):
    """The peer answered the greeting with a refusal; `payload` is what it said."""

    exit_name = "refused"

    def __init__(self, payload: bytes) -> None:
        super().__init__("the peer refused the session")
        self.payload = payload


class VersionMismatch(TransportError):
    """The peer speaks another version of the transport protocol."""

    exit_name = "refused"


class LayoutMismatch(TransportError):
    """The two sides attached memories of different sizes."""

    exit_name = "refused"


class LinkFailed(TransportError):
    """A thread of this side failed; the cause is chained. A fault of ours, not of the peer."""

    exit_name = "internal"
