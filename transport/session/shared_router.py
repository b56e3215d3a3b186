"""A ROUTER that several threads use: whoever has nothing else to do receives from it.

Owns the lock without which no two threads may use a socket of libzmq, and the rule that comes with
its descriptor: that is readable only when something has *begun* to be there, and whoever uses the
socket takes that notice away. So a thread polls the descriptor, not the socket, and only after it
has found nothing; one that has sent receives before it turns to anything else, and one that stops
before it has found nothing tells another to go on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import zmq

from transport.session.sockets import receive
from transport.session.watch import Watch


class SharedRouter:
    """See the module. For any thread."""

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        """`router` raises if it cannot send (ROUTER_MANDATORY), and is ours to close."""
        self._router = router
        self.lock = threading.RLock()
        """Every method takes it; held from receiving a message until it has been handed on, it
        keeps the order of messages."""
        self._closed = False
        self.fd = int(router.get(zmq.FD))
        """To be polled."""

    def receive(self) -> list[zmq.Frame] | None:
        """The next message, not copied; None: there is none."""
        with self.lock:
            return None if self._closed else receive(self._router)

    def send(self, parts: Sequence[bytes | memoryview], *, copy: bool = True) -> int:
        """Send without waiting. 0, or why nothing was sent: zmq.EAGAIN (the connection's queue is
        full), zmq.EHOSTUNREACH (there is no such connection, or the socket is closed)."""
        with self.lock:
            if self._closed:
                return zmq.EHOSTUNREACH
            try:
                self._router.send_multipart(parts, zmq.NOBLOCK, copy=copy)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
                return error.errno
        return 0

    def close(self, watch: Watch, linger_ms: int) -> None:
        """End the watch over it, and close; what was sent may take so long to go."""
        with self.lock:
            self._closed = True
            watch.close()
            self._router.close(linger=linger_ms)
