"""One connection shared by several blocking threads: requests out, requests in, replies matched.

Owns a socket, its framer, the replies still expected and the requests not yet served. Knows
commands and ids, not bodies.

No thread is set apart for reading. Whoever waits for something reads, unless another thread does so
already; what it reads for others it leaves for them. So a reply usually arrives in the thread that
wants it, a request of the peer may cross a reply (the specification allows it), and a thread
that serves a request may make requests of its own or wait for threads that do.
"""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from errno import EAGAIN, EIO, ENOTSUP
from typing import Final

from sync.vfio_user.errors import Disconnected, ProtocolError, VfioUserError
from sync.vfio_user.framing import Framer, Message, close_fds, recv_into_framer, send_message
from sync.vfio_user.wire import FLAG_ERROR, FLAG_REPLY, FLAG_TYPE_MASK, Header, encode_message

BACKLOG_BYTES: Final = 32 << 20
"""Bound on requests that arrived while this side waited for a reply; a peer that posts more than
this without answering is not cooperating."""

_MESSAGE_COST_BYTES: Final = 256
_DESCRIPTOR_COST_BYTES: Final = 1 << 16
"""What a queued message and a queued descriptor count in the backlog beside the message's bytes."""

_ID_COUNT: Final = 1 << 16


class Channel:
    """A connected socket that speaks vfio-user in both directions.

    `max_message_bytes`, `max_fds`: limits for each message received.
    `serves`: whether someone calls `next_request`; otherwise requests are refused (ENOTSUP).
    Every blocking method raises `Disconnected` once the connection is gone and `ProtocolError` once
    the peer has broken the protocol. `shutdown` ends them all.
    """

    def __init__(
        self, sock: socket.socket, max_message_bytes: int, max_fds: int, *, serves: bool = True
    ) -> None:
        self._socket = sock
        self._framer = Framer(max_message_bytes, max_fds)
        self.serves = serves
        self._changed = threading.Condition(threading.Lock())
        self._sending = threading.Lock()
        self._reading = False
        self._failure: Disconnected | ProtocolError | None = None
        self._next_id = 0
        self._expected: dict[int, int] = {}
        self._replies: dict[int, Message] = {}
        self._backlog: deque[Message] = deque()
        self._backlog_bytes = 0
        self._deadline: float | None = None

    def limit_time(self, seconds: float | None) -> None:
        """Let everything read from now on arrive within `seconds` or end in `Disconnected`."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._socket.settimeout(seconds)

    def call(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Send a request and wait for its reply; the caller owns the reply's descriptors.

        Raises `VfioUserError` for an error reply (EIO if it gives no reason).
        """
        with self._changed:
            message_id = self._allocate_id()
            self._expected[message_id] = command
        self._send(encode_message(message_id, command, body), fds)
        reply = self._wait(lambda: self._replies.pop(message_id, None))
        if reply.header.flags & FLAG_ERROR:
            close_fds(reply.fds)
            raise VfioUserError(reply.header.error or EIO)
        return reply

    def post(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that gets no reply."""
        with self._changed:
            message_id = self._allocate_id()
        self._send(encode_message(message_id, command, body, no_reply=True), fds)

    def next_request(self) -> Message:
        """Wait for the peer's next request; the caller owns its descriptors."""
        return self._wait(self._take_request)

    def reply(self, request: Header, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Answer a request, unless it wants no reply."""
        if request.wants_reply:
            self._send(encode_message(request.message_id, request.command, body, reply=True), fds)

    def reply_error(self, request: Header, errno: int) -> None:
        """Refuse a request, unless it wants no reply."""
        if request.wants_reply:
            self._send(encode_message(request.message_id, request.command, reply=True, error=errno))

    def fail(self, failure: Disconnected | ProtocolError) -> None:
        """End the connection, and every wait on it, with this error (the first one counts)."""
        with self._changed:
            self._failure = self._failure or failure
        self.shutdown()

    def shutdown(self) -> None:
        """End the connection. Takes no lock: it may be called from a signal handler."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and release everything, once no other thread is inside."""
        self.fail(Disconnected("connection closed by this side"))
        with self._changed:
            while self._reading:
                self._changed.wait()
            self._framer.close()
            for message in (*self._backlog, *self._replies.values()):
                close_fds(message.fds)
            self._backlog.clear()
            self._replies.clear()
        with self._sending:
            self._socket.close()

    def _allocate_id(self) -> int:
        if len(self._expected) + len(self._replies) >= _ID_COUNT:
            raise VfioUserError(EAGAIN, "every message id is in use")
        while True:
            message_id = self._next_id
            self._next_id = (message_id + 1) % _ID_COUNT
            if message_id not in self._expected and message_id not in self._replies:
                return message_id

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        with self._sending:
            if self._failure is not None:
                raise _copy(self._failure)
            try:
                send_message(self._socket, data, fds)
            except OSError as error:
                # Part of the message may be out, so nothing can follow it.
                self.shutdown()
                raise Disconnected(f"connection lost while sending: {error}") from error

    def _wait(self, ready: Callable[[], Message | None]) -> Message:
        while True:
            with self._changed:
                while True:
                    found = ready()
                    if found is not None:
                        return found
                    if self._failure is not None:
                        raise _copy(self._failure)
                    if not self._reading:
                        break
                    self._changed.wait()
                self._reading = True
            self._read()

    def _read(self) -> None:
        """Read once, as the only thread that does, and hand out what came."""
        messages: list[Message] = []
        failure: Disconnected | ProtocolError | None = None
        try:
            if self._deadline is not None:
                self._socket.settimeout(max(self._deadline - time.monotonic(), 0.001))
            if not recv_into_framer(self._socket, self._framer):
                failure = Disconnected("the peer closed the connection")
            while (message := self._framer.next_message()) is not None:
                messages.append(message)
        except ProtocolError as error:
            failure = error
        except OSError as error:
            failure = Disconnected(f"connection lost: {error}")
        finally:
            with self._changed:
                self._reading = False
                refused = self._deliver(messages, failure)
                self._changed.notify_all()
        if self._failure is not None:
            self.shutdown()
        for header in refused:
            with contextlib.suppress(Disconnected):
                self.reply_error(header, ENOTSUP)

    def _deliver(
        self, messages: list[Message], failure: Disconnected | ProtocolError | None
    ) -> list[Header]:
        """Sort messages into replies and backlog; return the headers of requests to refuse."""
        refused = []
        for message in messages:
            header = message.header
            if self._failure is not None:
                close_fds(message.fds)
            elif header.flags & FLAG_TYPE_MASK == FLAG_REPLY:
                if self._expected.pop(header.message_id, None) == header.command:
                    self._replies[header.message_id] = message
                else:
                    close_fds(message.fds)
                    self._failure = ProtocolError(
                        f"reply {header.message_id} to command {header.command} was not asked for"
                    )
            elif self.serves:
                self._backlog.append(message)
                self._backlog_bytes += _cost_bytes(message)
                if self._backlog_bytes > BACKLOG_BYTES + self._framer.max_message_bytes:
                    self._failure = ProtocolError("too many requests while a reply is awaited")
            else:
                close_fds(message.fds)
                refused.append(header)
        self._failure = self._failure or failure
        return refused

    def _take_request(self) -> Message | None:
        if not self._backlog:
            return None
        message = self._backlog.popleft()
        self._backlog_bytes -= _cost_bytes(message)
        return message


def _cost_bytes(message: Message) -> int:
    return message.header.size + _MESSAGE_COST_BYTES + _DESCRIPTOR_COST_BYTES * len(message.fds)


def _copy(failure: Disconnected | ProtocolError) -> Disconnected | ProtocolError:
    """A fresh exception for each thread that gets the failure: tracebacks are not shared."""
    return type(failure)(*failure.args)
