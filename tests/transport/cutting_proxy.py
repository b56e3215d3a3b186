"""A TCP proxy between two ends of a link, which cuts it, stops carrying, or lets nobody through."""

import random
from contextlib import suppress

import trio


class CuttingProxy:
    """Carries every connection to `port` of this host, until it is told otherwise."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._scopes: list[trio.CancelScope] = []
        self._silent: set[trio.CancelScope] = set()
        self._flow = trio.Event()
        self._flow.set()
        self.port = 0
        self.carried_bytes = 0
        self.connections = 0
        self.shut = False
        """Whether new connections are ended at once."""

    def to(self, port: int) -> None:
        """Carries what comes from now on to this port."""
        self._to = port

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        await trio.serve_listeners(self._carry, [listener], task_status=task_status)  # type: ignore[arg-type]

    def cut(self, which: random.Random | None = None) -> bool:
        """Ends all connections, or one at random of `which`; returns whether there was any."""
        scopes = list(self._scopes)
        if which is not None and scopes:
            scopes = [which.choice(scopes)]
        for scope in scopes:
            scope.cancel()
        return bool(scopes)

    def fall_silent(self) -> None:
        """The present connections carry nothing more, and nobody is told."""
        self._silent.update(self._scopes)

    async def _carry(self, near: trio.SocketStream) -> None:
        self.connections += 1
        if self.shut:
            await near.aclose()
            return
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            async with (
                near,
                await trio.open_tcp_stream("127.0.0.1", self._to) as far,
                trio.open_nursery() as nursery,
            ):
                scope = nursery.cancel_scope
                self._scopes.append(scope)
                try:
                    nursery.start_soon(self._copy, near, far, scope)
                    await self._copy(far, near, scope)
                finally:
                    self._scopes.remove(scope)
                    self._silent.discard(scope)

    async def _copy(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(65536):
                if scope in self._silent:
                    await trio.sleep_forever()
                await sink.send_all(data)
                self.carried_bytes += len(data)
        scope.cancel()
