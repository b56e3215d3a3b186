"""A VMM without a guest in it: RAM, a connection to the gateway, and QMP by a script.

What it says is what QEMU says, and so is the order of its stream: all of its RAM as it was when the
migration began, then what the processors have written. It does not see what the device writes, and
all of the stream comes as late as it can: over what the product has brought already.
"""

import mmap
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from lab.vfio_user.client import Client
from sync.vfio_user.protocol import Disconnected, DmaMap, VfioUserError
from tests.sync.vmm.conftest import FakeQemu

PAGE_BYTES = 4096
RAM_AT = 0x100000
RAM_BYTES = 64 * PAGE_BYTES
CPU_BYTES = RAM_BYTES // 2
"""The device writes behind these."""
CONNECT_S = 10.0
RETRY_S = 0.01


class Vmm(FakeQemu):
    """`incoming`: it waits for a guest. Else one runs in it. `on_run` is called when one begins to.

    Making it and connecting it blocks; `serve_qmp` is what answers at its QMP socket.
    """

    def __init__(
        self, folder: Path, gateway: Path, on_run: Callable[[], None], *, incoming: bool
    ) -> None:
        self.alive = False
        self._on_run = on_run
        super().__init__(str(folder / "qmp.sock"))
        Path(self.path).unlink(missing_ok=True)
        self._gateway = gateway
        self._run_state = "inmigrate" if incoming else "running"
        self._descriptor = os.memfd_create("ram")
        os.ftruncate(self._descriptor, RAM_BYTES)
        self.ram = mmap.mmap(self._descriptor, RAM_BYTES)
        self.device: Client
        self._life = trio.CancelScope()
        self._nursery: trio.Nursery
        self._switch_over = trio.Event()
        self._cut = trio.CancelScope()
        self.on = {
            "migrate": self._migrate,
            "migrate-incoming": self._migrate_incoming,
            "migrate-set-parameters": self._set_parameters,
            "migrate-continue": self._continue_migration,
            "migrate_cancel": self._cancel_migration,
            "cont": self._continue,
            "quit": self.die,
        }
        self.connect()
        self.alive = True

    @property
    def run_state(self) -> str:
        return self._run_state

    @run_state.setter
    def run_state(self, state: str) -> None:
        self._run_state = state
        if self.runs:
            self._on_run()

    @property
    def runs(self) -> bool:
        """Whether a guest runs in it."""
        return self.alive and self.run_state == "running"

    def connect(self) -> None:
        """To the gateway, as after the start."""
        self.device = self.connected(self._gateway)

    def connected(self, gateway: Path) -> Client:
        """A connection over which all of the guest's memory is shared. A gateway turns away who
        comes before it has seen the end of the last one."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                device = Client(gateway, timeout_s=CONNECT_S)
                break
            except (Disconnected, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)
        device.dma_map(DmaMap(3, 0, RAM_AT, RAM_BYTES), self._descriptor)
        return device

    def die(self) -> None:
        """As if killed: at once, from any state."""
        if not self.alive:
            return
        self.alive = False
        os.close(self._descriptor)
        self._life.cancel()
        self.device.close()
        for stream in self._streams:
            stream.socket.close()

    def write_register(self, offset: int, value: int) -> None:
        """The guest's driver writes; without a device nothing comes of it."""
        with suppress(VfioUserError, Disconnected):
            self.device.region_write(0, offset, value.to_bytes(4, "little"))

    async def serve_qmp(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serves QMP until it dies."""
        with self._life:
            listener = trio.socket.socket(socket.AF_UNIX)
            await listener.bind(self.path)
            listener.listen(4)
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.serve_listeners(self.serve, [trio.SocketListener(listener)])

    # --- the script ---

    def event(self, name: str, seconds: int = 0, **data: Any) -> None:
        """Says what happens when it happens: the pause of a guest is measured by it."""
        super().event(name, int(time.time()), **data)

    def query(self, name: str) -> Any:
        return [] if name == "qom-list" else super().query(name)

    def _migrate(self) -> None:
        self._switch_over, self._cut = trio.Event(), trio.CancelScope()
        self.migration = {"status": "active", "ram": {"dirty-sync-count": 2, "remaining": 0}}
        self.event("MIGRATION", status="active")
        path = self.arguments["migrate"]["uri"].removeprefix("unix:")
        self._nursery.start_soon(self._send_ram, path, self.ram[:])

    async def _send_ram(self, path: str, first_pass: bytes) -> None:
        with self._cut:
            try:
                async with await trio.open_unix_socket(path) as stream:
                    await self._switch_over.wait()
                    await stream.send_all(first_pass + self.ram[:CPU_BYTES])
                self.becomes("completed", "postmigrate")
            except (trio.BrokenResourceError, OSError):
                self.becomes("failed", "running")
            await self._tell()

    async def _tell(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.send_events()

    def _set_parameters(self) -> None:
        allowed = self.arguments["migrate-set-parameters"].get("downtime-limit", 0) > 0
        if allowed and self.migration.get("status") == "active":
            self.becomes("pre-switchover", "finish-migrate")

    def _continue_migration(self) -> None:
        self.becomes("device")
        self._switch_over.set()

    def _cancel_migration(self) -> None:
        self._cut.cancel()
        self.becomes("cancelled", "running")

    def _continue(self) -> None:
        self.run_state = "running"

    def _migrate_incoming(self) -> None:
        path = self.arguments["migrate-incoming"]["uri"].removeprefix("unix:")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        self._nursery.start_soon(self._load_ram, trio.socket.from_stdlib_socket(listener))

    async def _load_ram(self, listener: trio.socket.SocketType) -> None:
        with listener:
            connection, _ = await listener.accept()
        loaded = b""
        async with trio.SocketStream(connection) as stream:
            with suppress(trio.BrokenResourceError):
                async for data in stream:
                    loaded += data
        if len(loaded) == RAM_BYTES + CPU_BYTES:
            self.ram[:] = loaded[:RAM_BYTES]
            self.ram[:CPU_BYTES] = loaded[RAM_BYTES:]
            self.becomes("completed", "paused")
            await self._tell()
        else:
            self.die()  # as QEMU does
