"""A QEMU that follows a script: what it says is what QEMU 11.1 says, in its order and spelling."""

import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, '
    b'"package": "Debian 1:11.1.3"}, "capabilities": ["oob"]}}\r\n'
)
PARAMETERS = {"downtime-limit": 300, "max-bandwidth": 134217728}
ACTIVE = {
    "expected-downtime": 300,
    "status": "active",
    "setup-time": 5,
    "total-time": 1234,
    "ram": {
        "total": 554508288,
        "postcopy-requests": 0,
        "dirty-sync-count": 3,
        "multifd-bytes": 0,
        "pages-per-second": 32710,
        "downtime-bytes": 0,
        "page-size": 4096,
        "remaining": 1069056,
        "postcopy-bytes": 0,
        "mbps": 1073.2,
        "transferred": 98203465,
        "dirty-sync-missed-zero-copy": 0,
        "precopy-bytes": 98203465,
        "duplicate": 112345,
        "dirty-pages-rate": 812,
        "normal-bytes": 96301056,
        "normal": 23511,
    },
}


class FakeQemu:
    """States and answers of a VMM. `on[command]` runs before its answer and may change them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.run_state = "running"
        self.migration: dict[str, Any] = {}
        self.capabilities = ["xbzrle", "events", "pause-before-switchover", "multifd"]
        self.on_capabilities: set[str] = set()
        self.parameters: dict[str, Any] = dict(PARAMETERS)
        self.errors: dict[str, str] = {}
        self.silent: set[str] = set()
        self.on: dict[str, Callable[[], None]] = {}
        self.commands: list[str] = []
        self.arguments: dict[str, Any] = {}
        self._streams: list[trio.SocketStream] = []
        self._out: list[bytes] = []
        self._turn = trio.Semaphore(1)
        self._writing = trio.Lock()

    def event(self, name: str, seconds: int = 1700000000, **data: Any) -> None:
        """Says that something happened, before the next answer or greeting."""
        message: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": 250000},
            "event": name,
        }
        if data:
            message["data"] = data
        self._out.append(json.dumps(message).encode() + b"\r\n")

    def becomes(self, status: str, run_state: str | None = None, **more: Any) -> None:
        """The migration goes on to `status`."""
        self.migration = {**self.migration, "status": status, **more}
        self.event("MIGRATION", status=status)
        if run_state is not None:
            if run_state == "finish-migrate":
                self.event("STOP", seconds=1700000042)
            self.run_state = run_state

    async def send_events(self) -> None:
        for stream in self._streams:
            await self._write(stream)

    async def hang_up(self) -> None:
        for stream in self._streams:
            await stream.aclose()

    def query(self, name: str) -> Any:
        if name == "query-status":
            return {"status": self.run_state, "running": self.run_state == "running"}
        if name == "query-migrate":
            return self.migration
        if name == "query-migrate-capabilities":
            return [
                {"state": name in self.on_capabilities, "capability": name}
                for name in self.capabilities
            ]
        if name == "query-migrate-parameters":
            return self.parameters
        return {}

    def _set(self, name: str) -> None:
        if name == "migrate-set-parameters":
            self.parameters |= self.arguments[name]
        elif name == "migrate-set-capabilities":
            for row in self.arguments[name]["capabilities"]:
                change = self.on_capabilities.add if row["state"] else self.on_capabilities.discard
                change(row["capability"])

    async def serve(self, stream: trio.SocketStream) -> None:
        # One client at a time, as QEMU's monitor: the next one waits for its greeting.
        async with self._turn:
            self._streams = [stream]
            try:
                await self._write(stream, GREETING)
                await self._answer(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def _answer(self, stream: trio.SocketStream) -> None:
        buffer = b""
        async for data in stream:
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                request = json.loads(line)
                name = request["execute"]
                self.commands.append(name)
                self.arguments[name] = request.get("arguments")
                if name in self.silent:
                    continue
                reply: dict[str, Any] = {"return": {}, "id": request["id"]}
                if name in self.errors:
                    error = {"class": "GenericError", "desc": self.errors[name]}
                    reply = {"id": request["id"], "error": error}
                else:
                    self._set(name)
                    if name in self.on:
                        self.on[name]()
                    reply["return"] = self.query(name)
                await self._write(stream, json.dumps(reply).encode() + b"\r\n")

    async def _write(self, stream: trio.SocketStream, message: bytes = b"") -> None:
        """The events up to now, then `message`."""
        events, self._out = b"".join(self._out), []
        async with self._writing:
            await stream.send_all(events + message)


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    # Not tmp_path: the path of a UNIX socket has to be short.
    with tempfile.TemporaryDirectory(prefix="qmp-") as folder:
        yield Path(folder)


@pytest.fixture
def with_qemu(socket_folder: Path) -> Callable[..., None]:
    """Runs a test's coroutine beside a `FakeQemu`."""

    @asynccontextmanager
    async def served() -> AsyncIterator[FakeQemu]:
        path = str(socket_folder / "qmp")
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(path)
        listener.listen(4)
        qemu = FakeQemu(path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, qemu.serve, [trio.SocketListener(listener)])
            yield qemu
            nursery.cancel_scope.cancel()

    def run(body: Callable[[FakeQemu], Awaitable[None]]) -> None:
        async def main() -> None:
            with trio.fail_after(20):
                async with served() as qemu:
                    await body(qemu)

        trio.run(main)

    return run


@pytest.fixture
def active_migration() -> dict[str, Any]:
    """What QEMU's query-migrate returns in the middle of a migration."""
    copy: dict[str, Any] = json.loads(json.dumps(ACTIVE))
    return copy
