"""UNIX sockets in front of others, whose connections can be cut, go silent, or run late."""

import contextlib
import math
from pathlib import Path

import trio

from transport.wire.records import CONTROL_LANE

CHUNK_BYTES = 64 << 10
LATE_S = 0.3


class Proxy:
    """Carries connections from `path` to `behind` for as long as `serve` runs."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.path = path
        self._behind = behind
        self._scopes: set[trio.CancelScope] = set()
        self._closed = False
        self._silent = False

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(str(self.path))
            listening.listen()
            task_status.started()
            try:
                await trio.serve_listeners(self._carry, [trio.SocketListener(listening)])
            finally:
                self.path.unlink(missing_ok=True)

    def cut(self, *, for_good: bool) -> None:
        """Ends every connection; `for_good`: also those to come."""
        self._closed = for_good
        for scope in self._scopes:
            scope.cancel()

    def fall_silent(self) -> None:
        """From here on nothing gets through, and nobody is told."""
        self._silent = True

    async def _carry(self, near: trio.SocketStream) -> None:
        if self._closed:
            return
        with trio.CancelScope() as scope, contextlib.suppress(OSError, trio.BrokenResourceError):
            self._scopes.add(scope)
            async with (
                await trio.open_unix_socket(str(self._behind)) as far,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._carry_there, near, far, scope)
                nursery.start_soon(self._pump, far, near, scope)
        self._scopes.discard(scope)

    async def _carry_there(
        self, near: trio.SocketStream, far: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        """What comes from whoever has connected."""
        await self._pump(near, far, scope)

    async def _pump(
        self, come: trio.SocketStream, go: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await come.receive_some(CHUNK_BYTES):
                while self._silent:
                    await trio.sleep_forever()
                await go.send_all(data)
        scope.cancel()


class LinkProxy(Proxy):
    """In front of a `receive`, whose sender has a connection of its own for its records."""

    def __init__(self, path: Path, behind: Path) -> None:
        super().__init__(path, behind)
        self._records_are_late = False

    def delay_records(self) -> None:
        """From here on, what else was sent at the same time arrives first."""
        self._records_are_late = True

    async def _carry_there(
        self, near: trio.SocketStream, far: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        greeting = bytearray()
        with contextlib.suppress(trio.BrokenResourceError):
            # ZMTP 3.1: who greets tells its routing id, which begins with the lane's number.
            while (name := greeting.find(b"Identity")) < 0 or len(greeting) < name + 13:
                data = await near.receive_some(CHUNK_BYTES)
                if not data:
                    break
                greeting += data
                await far.send_all(data)
            has_records = greeting[name + 12 : name + 13] == bytes([CONTROL_LANE])
            while data := await near.receive_some(CHUNK_BYTES):
                while self._silent:
                    await trio.sleep_forever()
                if has_records and self._records_are_late:
                    await trio.sleep(LATE_S)
                await far.send_all(data)
        scope.cancel()


class LateProxy(Proxy):
    """Takes everything at once, and lets nothing through before `released` is set."""

    def __init__(self, path: Path, behind: Path) -> None:
        super().__init__(path, behind)
        self.held_bytes = 0
        self.released = trio.Event()

    async def _carry_there(
        self, near: trio.SocketStream, far: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        put, take = trio.open_memory_channel[bytes](math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_in, near, put)
            await self.released.wait()
            async for data in take:
                await far.send_all(data)
            await far.send_eof()

    async def _take_in(self, near: trio.SocketStream, put: trio.MemorySendChannel[bytes]) -> None:
        async with put:
            while data := await near.receive_some(CHUNK_BYTES):
                self.held_bytes += len(data)
                put.send_nowait(bytes(data))
