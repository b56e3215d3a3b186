"""From a stream of bytes and descriptors to messages, sans-IO, and two helpers for sockets.

Owns descriptors between their arrival and the message that carries them. Knows headers, not bodies.

Descriptors (SCM_RIGHTS) come with a chunk of the stream. A sender attaches them to the first byte
of a message, and the kernel ends a read behind the buffer that carried some; so they belong to the
message that holds the chunk's last byte.
"""

import array
import contextlib
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.wire import HEADER_BYTES, Header

RECEIVE_BUFFER_BYTES: Final = 1 << 18
"""Above what a UNIX socket holds by default (208 KiB), so that one read empties it."""

MESSAGE_FDS_LIMIT: Final = 253
"""SCM_MAX_FD: the kernel passes no more than this with one message."""


class Message(NamedTuple):
    """One message; whoever takes it owns the descriptors."""

    header: Header
    body: bytes
    fds: list[int]


class Framer:
    """Cuts the stream of one connection into messages.

    `max_message_bytes` bounds a message, header included; memory grows with the bytes that have
    arrived, never with the length that a header announces. `max_fds` bounds the descriptors of one
    message. After a `ProtocolError` the stream is lost: the same error comes again.
    """

    def __init__(self, max_message_bytes: int, max_fds: int = 1) -> None:
        self.max_message_bytes = max_message_bytes
        self.max_fds = min(max_fds, MESSAGE_FDS_LIMIT)
        self.receive_buffer = memoryview(bytearray(RECEIVE_BUFFER_BYTES))
        self._ready: deque[Message] = deque()
        self._partial = bytearray()
        self._header: Header | None = None
        self._fds: list[int] = []
        self._error: ProtocolError | None = None

    @property
    def mid_message(self) -> bool:
        """Whether the stream stands inside a message."""
        return bool(self._partial)

    def feed(self, data: bytes | bytearray | memoryview, fds: Iterable[int] = ()) -> None:
        """Take a chunk of the stream and the descriptors that came with it, and own those."""
        fresh = list(fds)
        view = memoryview(data)
        position = 0
        try:
            while self._error is None and position < len(view):
                position = self._take(view, position, fresh)
        except ProtocolError as error:
            self._error = error
        if fresh:
            # Only a stream that is lost, or a chunk without bytes, leaves some over.
            close_fds(fresh)
        if len(self._fds) > self.max_fds and self._error is None:
            self._error = _too_many_fds(self.max_fds)

    def _take(self, view: memoryview, position: int, fresh: list[int]) -> int:
        """Use up bytes of at most one message; return the new position."""
        if not self._partial and len(view) - position >= HEADER_BYTES:
            header = Header.unpack(view[position:], max_message_bytes=self.max_message_bytes)
            end = position + header.size
            if end <= len(view):
                body = bytes(view[position + HEADER_BYTES : end])
                self._finish(header, body, fresh if end == len(view) else [])
                return end
            self._header = header
        wanted = self._header.size if self._header else HEADER_BYTES
        end = min(len(view), position + wanted - len(self._partial))
        self._partial += view[position:end]
        if self._header is None and len(self._partial) == HEADER_BYTES:
            self._header = Header.unpack(self._partial, max_message_bytes=self.max_message_bytes)
        if end == len(view):
            self._fds += fresh
            fresh.clear()
        if self._header is not None and len(self._partial) == self._header.size:
            header, body = self._header, bytes(memoryview(self._partial)[HEADER_BYTES:])
            self._partial = bytearray()
            self._header = None
            self._finish(header, body, [])
        return end

    def _finish(self, header: Header, body: bytes, fresh: list[int]) -> None:
        fds = self._fds + fresh
        fresh.clear()
        self._fds = []
        self._ready.append(Message(header, body, fds))
        if len(fds) > self.max_fds:
            close_fds(self._ready.pop().fds)
            raise _too_many_fds(self.max_fds)

    def next_message(self) -> Message | None:
        """Return the next message, or None until more has been fed.

        Raises `ProtocolError` where the stream turns into something that is no message.
        """
        if self._ready:
            return self._ready.popleft()
        if self._error is not None:
            raise self._error
        return None

    def fail(self, error: ProtocolError) -> None:
        """Let the stream end in `error` behind the messages that are complete."""
        self._error = self._error or error

    @property
    def unread(self) -> tuple[bytes, list[int]]:
        """The beginning of the message inside which the stream stands, and its descriptors, which
        stay the framer's."""
        return bytes(self._partial), list(self._fds)

    def close(self) -> None:
        """Close every descriptor that no one has taken. Can be called more than once."""
        close_fds(self._fds)
        while self._ready:
            close_fds(self._ready.popleft().fds)


def _too_many_fds(limit: int) -> ProtocolError:
    return ProtocolError(f"message with more than {limit} descriptors")


def close_fds(fds: list[int]) -> None:
    """Close these descriptors and empty the list."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


def recv_into_framer(sock: socket.socket, framer: Framer) -> bool:
    """Read once from `sock` into `framer`; False when the peer has closed the connection.

    Raises what the socket raises (BlockingIOError when it is non-blocking and empty). An end of the
    stream inside a message, and descriptors beyond the limit, are a `ProtocolError` of the framer.
    """
    room = socket.CMSG_SPACE(framer.max_fds * 4)
    received, ancillary, flags, _ = sock.recvmsg_into(
        [framer.receive_buffer], room, socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % 4
            fds.extend(array.array("i", data[:whole]))
    framer.feed(framer.receive_buffer[:received], fds)
    if flags & socket.MSG_CTRUNC:
        framer.fail(_too_many_fds(framer.max_fds))
    if not received and framer.mid_message:
        framer.fail(ProtocolError("connection ended inside a message"))
    return received > 0


def send_message(
    sock: socket.socket, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()
) -> int:
    """Send one encoded message with its descriptors on the first byte; return the bytes taken.

    A blocking socket takes all of it. A non-blocking one may take less, even 0: the caller sends
    the rest later, with the descriptors only if nothing was taken.
    """
    try:
        if fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            sent = sock.sendmsg([data], [rights], socket.MSG_NOSIGNAL)
        else:
            sent = sock.send(data, socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return 0
    if sent == len(data):
        return sent
    view = memoryview(data)
    with contextlib.suppress(BlockingIOError):
        while sent < len(data):
            sent += sock.send(view[sent:], socket.MSG_NOSIGNAL)
    return sent
