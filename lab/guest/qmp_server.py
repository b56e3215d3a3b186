"""The VMM's end of QMP: one client at a time, commands in, replies and events out.

Owns the sockets and the wire format; what the commands do is a table of functions. Runs in one
thread; `emit` and `wake` may be called from any. Source: QEMU's docs/interop/qmp-spec.rst.
"""

import json
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sync.vfio_user.sockets import listen_unix
from sync.vmm.errors import QmpProtocolError
from sync.vmm.qmp import JsonObject, LineSplitter

READ_BYTES = 1 << 16
MAX_OUTPUT_BYTES = 4 << 20
"""A client that does not read its replies is dropped when this much is waiting for it."""
GREETING = {
    "QMP": {
        "version": {
            "qemu": {"major": 0, "minor": 0, "micro": 0},
            "package": "vfio-ferry guest",
        },
        "capabilities": [],
    }
}

Command = Callable[[JsonObject], Any]


class CommandError(Exception):
    """A command failed; the client gets `error_class` and the message."""

    def __init__(self, description: str, error_class: str = "GenericError") -> None:
        super().__init__(description)
        self.error_class = error_class


class QmpServer:
    """Serves `commands` at the UNIX socket `path` (mode 0600) while `run` runs."""

    def __init__(self, path: str, commands: Mapping[str, Command]) -> None:
        self._path = path
        self._commands = commands
        self._listener = listen_unix(path)
        self._listener.setblocking(False)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events: deque[bytes] = deque()
        self._client: _Client | None = None
        self._open = threading.Event()

    def open(self) -> None:
        """Lets clients in; before, they wait in the queue of the socket."""
        self._open.set()
        self.wake()

    def emit(self, name: str, data: JsonObject) -> None:
        """Sends an event to the client, if there is one."""
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        event: JsonObject = {
            "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
            "event": name,
        }
        if data:
            event["data"] = data
        self._events.append(_line(event))
        self.wake()

    def wake(self) -> None:
        """Makes `step` return."""
        os.eventfd_write(self._wake_fd, 1)

    def step(self, timeout_s: float | None) -> None:
        """Waits for something to do, for `timeout_s` at most, and does it."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        client = self._client
        if client is not None:
            mask = select.POLLIN | (select.POLLOUT if client.output else 0)
            poll.register(client.socket, mask)
        elif self._open.is_set():
            poll.register(self._listener, select.POLLIN)
        for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000):
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)
            elif client is not None:
                self._serve(client)
            else:
                self._accept()
        self._send_events()

    def flush(self, timeout_s: float) -> None:
        """Sends what is waiting for the client, if it takes it in time."""
        self._send_events()
        deadline = time.monotonic() + timeout_s
        while (client := self._client) is not None and client.output:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([], [client.socket], [], left)[1]:
                return
            self._write(client)

    def close(self) -> None:
        """Drops the client and removes the socket."""
        if self._client is not None:
            self._client.socket.close()
            self._client = None
        self._listener.close()
        Path(self._path).unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._client = client = _Client(connection)
        self._answer(client, GREETING)

    def _serve(self, client: "_Client") -> None:
        try:
            data = client.socket.recv(READ_BYTES)
        except BlockingIOError:
            data = None
        except OSError:
            data = b""
        if data == b"":
            self._drop(client)
            return
        if data:
            client.lines.feed(data)
            try:
                while (request := client.lines.next_object()) is not None:
                    self._answer(client, self._execute(client, request))
            except QmpProtocolError:
                self._drop(client)
                return
        self._write(client)

    def _execute(self, client: "_Client", request: JsonObject) -> JsonObject:
        reply: JsonObject
        try:
            reply = {"return": self._dispatch(client, request)}
        except CommandError as error:
            reply = {"error": {"class": error.error_class, "desc": str(error)}}
        if "id" in request:
            reply["id"] = request["id"]
        return reply

    def _dispatch(self, client: "_Client", request: JsonObject) -> Any:
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise CommandError("QMP input lacks a member 'execute'")
        if name == "qmp_capabilities":
            if client.negotiated:
                raise CommandError("Capabilities negotiation is already complete")
            client.negotiated = True
            return {}
        if not client.negotiated:
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        command = self._commands.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        # What the command itself causes comes before its reply, as QEMU does it.
        result = command(arguments)
        self._send_events()
        return result

    def _send_events(self) -> None:
        while self._events:
            event = self._events.popleft()
            client = self._client
            if client is not None and client.negotiated:
                client.output += event
        if self._client is not None:
            self._write(self._client)

    def _answer(self, client: "_Client", message: JsonObject) -> None:
        client.output += _line(message)
        self._write(client)

    def _write(self, client: "_Client") -> None:
        if client is not self._client or not client.output:
            return
        try:
            sent = client.socket.send(client.output)
            del client.output[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.output) > MAX_OUTPUT_BYTES:
            self._drop(client)

    def _drop(self, client: "_Client") -> None:
        client.socket.close()
        client.output.clear()
        if self._client is client:
            self._client = None


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.lines = LineSplitter()
        self.output = bytearray()
        self.negotiated = False


def _line(message: JsonObject) -> bytes:
    return json.dumps(message).encode() + b"\r\n"
