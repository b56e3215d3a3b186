"""One connection at the control socket: non-blocking, one request at a time.

Owned here: the socket, the request that is being worked on, and its reply until it is sent. While
one request is open no other is read, so a client that does not read its replies costs us one reply.
"""

import contextlib
import os
import socket
from array import array
from collections.abc import Callable, Sequence

from sync.gateway.control.wire import MAX_JSON_BYTES, ControlDecoder, ControlMessage, Fields, encode
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import ControlProtocolError
from sync.peer_process import PeerProcess

WRITE_DEADLINE_S = 10.0
"""A client that has not taken its reply by then is disconnected."""


class ControlPeer:
    """`role` is None until the client has said who it is. `on_reply` is told of each reply."""

    def __init__(self, sock: socket.socket, on_reply: Callable[["ControlPeer"], None]) -> None:
        sock.setblocking(False)
        self._on_reply = on_reply
        self._sock = sock
        self._process: PeerProcess | None = PeerProcess(sock)
        # No request carries descriptors: one that came anyway is an error, not a leak.
        self._decoder = ControlDecoder(max_descriptors=0)
        self._out = memoryview(b"")
        self._descriptors: Sequence[int] = ()
        self.role: ClientRole | None = None
        self.session = ""
        self.busy = False
        self.closed = False
        self.write_since: float | None = None
        """When sending the reply that is not sent yet was first tried."""

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._out)

    @property
    def wants_read(self) -> bool:
        return not self.busy and not self._out

    def receive(self) -> bool:
        """Reads once; False at the end of the stream. Raises `ControlProtocolError`."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                MAX_JSON_BYTES, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return True
        except OSError:
            return False
        descriptors = array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[: len(content) - len(content) % 4])
        self._decoder.feed(data, list(descriptors))
        if flags & socket.MSG_CTRUNC:
            raise ControlProtocolError("a request brings descriptors")
        return bool(data)

    def next_request(self) -> ControlMessage | None:
        """The next request, if none is being worked on."""
        if not self.wants_read:
            return None
        return self._decoder.next_message()

    def reply(self, fields: Fields, blob: bytes, descriptors: Sequence[int]) -> None:
        """Answers the open request; owns `descriptors`. Nothing is sent before `flush`."""
        self.busy = False
        if self.closed:
            _close_all(descriptors)
            return
        self._out = memoryview(encode(fields, blob))
        self._descriptors = descriptors
        self._on_reply(self)

    def flush(self, now: float) -> bool:
        """Sends what it can; False if the client is gone, or has not read for too long."""
        if self.write_since is None:
            self.write_since = now
        elif now - self.write_since > WRITE_DEADLINE_S:
            return False
        try:
            while self._out:
                if self._descriptors:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", self._descriptors))
                    sent = self._sock.sendmsg([self._out], [rights])
                    _close_all(self._descriptors)
                    self._descriptors = ()
                else:
                    sent = self._sock.send(self._out)
                self._out = self._out[sent:]
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.write_since = None
        return True

    def take_process(self) -> PeerProcess | None:
        """The client's process; the caller's from now on."""
        process, self._process = self._process, None
        return process

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):
                self._sock.close()
            self._decoder.close()
            if self._process is not None:
                self._process.close()
            _close_all(self._descriptors)
            self._descriptors = ()
            self._out = memoryview(b"")


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
