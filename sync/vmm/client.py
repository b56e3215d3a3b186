"""A QMP connection over a UNIX socket, for trio. Owns the socket and nothing of the migration.

There is no background task: whoever waits first reads for everybody, and the others look again
after each piece that was read. A connection that ends is therefore noticed by the next call.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import trio
from trio.abc import AsyncResource

from sync.peer_process import peer_pid
from sync.vmm.errors import QmpProtocolError, VmmBusy, VmmError, VmmGone, VmmNotReady, VmmRefused
from sync.vmm.qmp import QmpCore, QmpEvent, QmpFailure, QmpReply

COMMAND_DEADLINE_S = 10.0
"""QEMU answers late while its big lock is held, e.g. by a vCPU that waits for its device."""
SEND_DEADLINE_S = 5.0
CONNECT_RETRY_S = 0.05
READ_BYTES = 1 << 16
EVENTS_KEPT = 256

T = TypeVar("T")


class QmpClient(AsyncResource):
    """Commands and events of one VMM. Any number of tasks may use it at once."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._core = QmpCore()
        self._reading = trio.Lock()
        self._writing = trio.Lock()
        self._replies: dict[int, QmpReply | QmpFailure] = {}
        self._abandoned: set[int] = set()
        self._events: deque[QmpEvent] = deque(maxlen=EVENTS_KEPT)
        self._greeted = False
        self._failure: VmmError | None = None
        self.version: dict[str, Any] = {}
        """The VMM's version as its greeting tells it."""
        self.events_seen = 0
        """How many events have arrived: the mark from which `wait_event` may start."""

    @classmethod
    async def connect(cls, path: str, *, deadline_s: float = 10.0) -> "QmpClient":
        """Connects to the socket `path`, which need not be there yet, and negotiates.

        A QMP socket serves one client at a time: while another one has it, no greeting comes.
        Raises `VmmGone` when the deadline passes, `VmmBusy` if that is why.
        """
        kind: type[VmmGone] = VmmBusy
        why = "it does not greet: another client has it"
        with trio.move_on_after(deadline_s):
            while True:
                try:
                    stream = await trio.open_unix_socket(path)
                except OSError as error:
                    kind, why = VmmGone, str(error)
                    await trio.sleep(CONNECT_RETRY_S)
                    continue
                kind, why = VmmBusy, "it does not greet: another client has it"
                client = cls(stream)
                try:
                    await client._negotiate()
                except VmmGone as error:
                    kind, why = VmmGone, str(error)
                    await client.aclose()
                    await trio.sleep(CONNECT_RETRY_S)
                    continue
                except BaseException:
                    await trio.aclose_forcefully(stream)
                    raise
                return client
        raise kind(f"no QMP at {path} after {deadline_s:g} s: {why}")

    @property
    def peer_pid(self) -> int:
        """The process that listens at the QMP socket; 0 if that is not known."""
        stream = self._stream
        return peer_pid(stream.socket) if isinstance(stream, trio.SocketStream) else 0

    async def aclose(self) -> None:
        if self._failure is None:
            self._failure = VmmGone("the QMP connection was closed here")
        await self._stream.aclose()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        deadline_s: float = COMMAND_DEADLINE_S,
    ) -> Any:
        """What the VMM returns for `command`.

        Raises `VmmRefused` for its error, `VmmGone` when the connection ends, `VmmNotReady` when
        no reply came in `deadline_s`, `QmpProtocolError` for nonsense.
        """
        request_id, data = self._command(command, arguments)
        reply: QmpReply | QmpFailure | None = None
        try:
            with trio.move_on_after(deadline_s):
                await self._send(data)
                reply = await self._until(lambda: self._replies.pop(request_id, None))
        finally:
            if reply is None and self._replies.pop(request_id, None) is None:
                self._abandoned.add(request_id)
        if reply is None:
            raise VmmNotReady(f"{command}: no reply from the VMM in {deadline_s:g} s")
        if isinstance(reply, QmpFailure):
            raise VmmRefused(command, reply.error_class, reply.description)
        return reply.result

    async def wait_event(self, *, since: int) -> None:
        """Returns as soon as an event has arrived that is not among the first `since` ones."""
        await self._until(lambda: True if self.events_seen > since else None)

    def last_event(self, name: str, *, since: int = 0) -> QmpEvent | None:
        """The latest event called `name` after the first `since` ones; the last 256 are kept."""
        fresh = min(self.events_seen - since, len(self._events))
        for event in list(self._events)[len(self._events) - fresh :][::-1]:
            if event.name == name:
                return event
        return None

    async def _negotiate(self) -> None:
        await self._until(lambda: True if self._greeted else None)
        await self.execute("qmp_capabilities", deadline_s=float("inf"))

    def _command(self, command: str, arguments: Mapping[str, Any] | None) -> tuple[int, bytes]:
        if self._failure is not None:
            raise self._failure
        return self._core.command(command, arguments)

    async def _send(self, data: bytes) -> None:
        async with self._writing:
            # Shielded, since a command that was sent by half would garble all later ones.
            with trio.move_on_after(SEND_DEADLINE_S, shield=True) as sending:
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise self._fail(VmmGone(f"the VMM's connection ended: {error}")) from error
            if sending.cancelled_caught:
                raise self._fail(VmmGone("the VMM does not read its commands"))

    async def _until(self, ready: Callable[[], T | None]) -> T:
        """Reads, or lets another task read, until `ready` returns something."""
        while True:
            # Before it waits for its turn, too: another task may have read it already, and read on.
            result = ready()
            if result is not None:
                return result
            async with self._reading:
                result = ready()
                if result is not None:
                    return result
                if self._failure is not None:
                    raise self._failure
                await self._read_once()

    async def _read_once(self) -> None:
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._fail(VmmGone(f"the VMM's connection ended: {error}")) from error
        if not data:
            raise self._fail(VmmGone("the VMM closed its connection"))
        self._core.feed(bytes(data))
        try:
            while (message := self._core.next_message()) is not None:
                if isinstance(message, QmpEvent):
                    self._events.append(message)
                    self.events_seen += 1
                elif isinstance(message, QmpReply | QmpFailure):
                    self._keep_reply(message)
                else:
                    self._greeted = True
                    self.version = message.version
        except QmpProtocolError as error:
            raise self._fail(error) from None

    def _keep_reply(self, reply: QmpReply | QmpFailure) -> None:
        if reply.request_id in self._abandoned:
            self._abandoned.discard(reply.request_id)
        else:
            self._replies[reply.request_id] = reply

    def _fail(self, error: VmmError) -> VmmError:
        if self._failure is None:
            self._failure = error
        return self._failure
