"""A ROUTER that several threads send by, while one of them receives.

Owns the lock without which no two threads may use a socket of libzmq, and the rule that comes with
its descriptor: that is readable only when something has *begun* to be there, and whoever uses the
socket takes that notice away. So the thread that receives polls the descriptor, not the socket, and
only after `receive` has found nothing; and a thread that sends tells it if messages are there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import zmq

from transport.sockets import Wakeup, Watch, receive

_POLLIN = int(zmq.POLLIN)


class SharedRouter:
    """See the module. Any thread may call `send` and `close`, one thread `receive`."""

    def __init__(self, router: zmq.Socket[bytes], arrived: Wakeup) -> None:
        """`router` raises if it cannot send (ROUTER_MANDATORY), and is ours to close; `arrived`
        is set if a message may be there of which `fd` says nothing."""
        self._router = router
        self._arrived = arrived
        self._lock = threading.Lock()
        self._closed = False
        self.fd = int(router.get(zmq.FD))
        """To be polled."""

    def receive(self) -> list[zmq.Frame] | None:
        """The next message, not copied; None: there is none."""
        with self._lock:
            return None if self._closed else receive(self._router)

    def send(self, parts: Sequence[bytes | memoryview], *, copy: bool = True) -> int:
        """Send without waiting. 0, or why nothing was sent: zmq.EAGAIN (the connection's queue is
        full), zmq.EHOSTUNREACH (there is no such connection, or the socket is closed)."""
        with self._lock:
            if self._closed:
                return zmq.EHOSTUNREACH
            try:
                self._router.send_multipart(parts, zmq.NOBLOCK, copy=copy)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
                return error.errno
            finally:
                if int(self._router.get(zmq.EVENTS)) & _POLLIN:
                    self._arrived.set()
        return 0

    def close(self, watch: Watch, linger_ms: int) -> None:
        """End the watch over it, and close; what was sent may take so long to go."""
        with self._lock:
            self._closed = True
            watch.close()
            self._router.close(linger=linger_ms)
