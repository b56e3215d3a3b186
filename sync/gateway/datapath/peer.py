"""One vfio-user connection of the gateway: non-blocking, messages in, messages out.

Owned here: the socket, what could not be sent yet, and the descriptors on their way out. A chunk
that holds nothing but whole messages is handed on in place, without a copy: the latency of a
register access hangs on it. Everything else goes through the framer.

A connection ends when the kernel says that it has ended, not for want of memory or descriptors.
"""

import errno
import os
import socket
from array import array
from collections import deque
from collections.abc import Callable, Sequence

from sync.vfio_user.errors import Disconnected, ProtocolError
from sync.vfio_user.framing import MESSAGE_FDS_LIMIT, Framer, close_fds
from sync.vfio_user.protocol import FLAG_ERROR, FLAG_TYPE_MASK, HEADER, HEADER_BYTES

SHORT_OF = frozenset(
    {errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS, errno.EINTR}
)
"""Errnos that say nothing about the connection: later the same call may go well."""
MAX_BACKLOG_BYTES = 64 << 20
"""A peer that has this much unread is cut off: it does not read what it asked for."""

LOST = -1
"""In place of the descriptors that did not arrive."""
_RIGHTS_BYTES = socket.CMSG_SPACE(4 * MESSAGE_FDS_LIMIT)

Chunk = tuple[bytes | bytearray | memoryview, Sequence[int]]
"""Bytes of a stream, and the descriptors that come with them."""
Handler = Callable[[int, int, int, int, memoryview, list[int]], None]
"""(message id, command, flags, errno or 0, the whole message, descriptors).

The errno is that of an error reply, or EMFILE: the message had descriptors that we could not take.
The message may be changed in place and sent on; it is void after the next `receive`. The handler
owns the descriptors.
"""


class Peer:
    """`handler` takes every message that `receive` finds, in order."""

    local = None
    """It is another process's."""

    def __init__(self, sock: socket.socket, max_message_bytes: int, handler: Handler) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.handler = handler
        self._max_message_bytes = max_message_bytes
        self._framer = Framer(max_message_bytes, MESSAGE_FDS_LIMIT)
        self._buffer = self._framer.receive_buffer
        self._buffers = [self._buffer]
        self._out: list[Chunk] = []
        self._backlog: deque[tuple[memoryview, Sequence[int]]] = deque()
        self.backlog_bytes = 0
        self.short = False
        """Whether the system was short of something for the backlog. Set to False, it is tried."""

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> None:
        """Reads once and hands on what is complete.

        Raises `Disconnected` at the end of the stream, `ProtocolError` for what is no message, and
        whatever the handler raises.
        """
        try:
            received, ancillary, flags, _ = self._sock.recvmsg_into(
                self._buffers, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            if not self._wants_again(error):
                raise Disconnected(f"the connection broke: {error.strerror}") from error
            return
        if received == 0:
            raise Disconnected("the connection was closed")
        if ancillary or flags & socket.MSG_CTRUNC or self._framer.mid_message:
            self._receive_slowly(received, ancillary, bool(flags & socket.MSG_CTRUNC))
            return
        buffer = self._buffer
        position = 0
        while received - position >= HEADER_BYTES:
            message_id, command, size, message_flags, number = HEADER.unpack_from(buffer, position)
            end = position + size
            if (
                size < HEADER_BYTES
                or size > self._max_message_bytes
                or message_flags & FLAG_TYPE_MASK > 1
            ):
                raise ProtocolError(f"a message of {size} bytes with flags {message_flags:#x}")
            if end > received:
                break
            self.handler(
                message_id,
                command,
                message_flags,
                _errno(message_flags, number),
                buffer[position:end],
                [],
            )
            position = end
        if position < received:
            self._framer.feed(buffer[position:received])

    def _receive_slowly(
        self, received: int, ancillary: list[tuple[int, int, bytes]], cut: bool
    ) -> None:
        descriptors = array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        if cut:
            # We have no room for as many: the kernel passes fewer than the buffer takes.
            descriptors.append(LOST)
        self._framer.feed(self._buffer[:received], descriptors)
        self.deliver()

    def deliver(self) -> None:
        """Hands on what has arrived. Raises as `receive` does."""
        framer = self._framer
        while (message := framer.next_message()) is not None:
            header = message.header
            number = _errno(header.flags, header.error)
            if LOST in message.fds:
                close_fds(message.fds)
                number = number or errno.EMFILE
            self.handler(
                header.message_id,
                header.command,
                header.flags,
                number,
                memoryview(bytearray(header.pack() + message.body)),
                message.fds,
            )

    def send(
        self, message: bytes | bytearray | memoryview, descriptors: Sequence[int] = ()
    ) -> None:
        """Takes a message to be sent by the next `flush`; owns `descriptors`."""
        self._out.append((message, descriptors))

    def flush(self) -> None:
        """Sends what it can and keeps a copy of the rest. Raises `Disconnected`."""
        out = self._out
        if not out:
            return
        if len(out) == 1 and not self._backlog:
            message, descriptors = out[0]
            if not descriptors:
                out.clear()
                try:
                    sent = self._sock.send(message)
                except OSError as error:
                    if not self._wants_again(error):
                        raise Disconnected(f"the connection broke: {error.strerror}") from error
                    sent = 0
                if sent < len(message):
                    self._keep(message[sent:], ())
                return
        plain: list[bytes | bytearray | memoryview] = []
        for message, descriptors in out:
            if descriptors:
                if plain:
                    self._keep(b"".join(plain), ())
                    plain = []
                self._keep(message, descriptors)
            else:
                plain.append(message)
        if plain:
            self._keep(b"".join(plain), ())
        out.clear()
        self.drain()

    def drain(self) -> None:
        """Sends the backlog as far as the socket takes it. Raises `Disconnected`."""
        backlog = self._backlog
        while backlog:
            message, descriptors = backlog[0]
            try:
                if descriptors:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))
                    sent = self._sock.sendmsg([message], [rights])
                    _close_all(descriptors)
                else:
                    sent = self._sock.send(message)
            except OSError as error:
                if not self._wants_again(error):
                    raise Disconnected(f"the connection broke: {error.strerror}") from error
                return
            self.backlog_bytes -= sent
            if sent == len(message):
                backlog.popleft()
            else:
                backlog[0] = (message[sent:], ())

    # --- handing on to another process ---

    def unread(self) -> list[Chunk]:
        """What was read and is no whole message yet."""
        data, descriptors = self._framer.unread
        return [(data, descriptors)] if data else []

    def unsent(self) -> list[Chunk]:
        return [*self._backlog, *self._out]

    def take(self, arrived: Sequence[Chunk], leaving: Sequence[Chunk]) -> None:
        """Goes on where another one stood; owns the descriptors. Nothing happens before `deliver`
        and `drain`."""
        for data, descriptors in arrived:
            self._framer.feed(data, descriptors)
        for data, descriptors in leaving:
            self._keep(data, descriptors)

    @property
    def wants_write(self) -> bool:
        """Whether `drain` is to be called when the socket takes more."""
        return self.backlog_bytes > 0 and not self.short

    def _wants_again(self, error: OSError) -> bool:
        self.short = error.errno in SHORT_OF
        return self.short or isinstance(error, BlockingIOError)

    def close(self) -> None:
        """Closes the socket and every descriptor that is on its way."""
        self._sock.close()
        for _, descriptors in (*self._out, *self._backlog):
            _close_all(descriptors)
        self._out.clear()
        self._backlog.clear()
        self.backlog_bytes = 0
        self._framer.close()

    def _keep(self, message: bytes | bytearray | memoryview, descriptors: Sequence[int]) -> None:
        self._backlog.append((memoryview(bytes(message)), descriptors))
        self.backlog_bytes += len(message)
        if self.backlog_bytes > MAX_BACKLOG_BYTES:
            raise Disconnected("the other side does not read")


def _errno(flags: int, error: int) -> int:
    if flags & FLAG_ERROR:
        # The specification allows an error reply without a number.
        return error or 5
    return 0


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
