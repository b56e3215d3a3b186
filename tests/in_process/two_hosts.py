"""Two hosts in one process: real gateways, `send` and `receive`; model devices and VMMs.

The gateways and devices run in threads, everything else in one trio loop. To kill `send` or
`receive` is to cancel it: it then does nothing but close what it holds. The others lose their
sockets at once.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio

from ferry.commands import resolve
from ferry.commands.receive import receive
from ferry.commands.send import send
from ferry.errors import Exit
from ferry.exit_codes import exit_code_of
from ferry.migration import receive_options, send_options
from ferry.migration.stop_request import StopRequest
from ferry.progress import Reporter
from sync.gateway.engine.core import Limits
from sync.gateway.engine.custody import CustodyState, Owner
from tests.in_process.device import DOORBELL, NUMBER, PROFILE, ModelDevice
from tests.in_process.vmm import CPU_BYTES, PAGE_BYTES, RAM_AT, RAM_BYTES, Vmm
from tests.sync.gateway.conftest import House

PEER_TIMEOUT_S = 3.0
RESUME_WINDOW_S = 0.5
"""A peer that was killed is waited for so long, as a lost link is."""
CONNECT_TIMEOUT_S = 5.0
DOWNTIME_MS = 5000
"""A guest may stand still for ten times as long before it is taken back: no test is that slow."""
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Method:
    """How register state and dirty pages move."""

    registers: Literal["v2", "replay"]
    dirty: Literal["logging", "message", "scan"]

    def __str__(self) -> str:
        return f"{self.registers}-{self.dirty}"


METHODS = [
    Method("v2", "logging"),
    Method("v2", "message"),
    Method("v2", "scan"),
    Method("replay", "logging"),
    Method("replay", "message"),
    Method("replay", "scan"),
]


class Command(Reporter):
    """`send` or `receive` while it runs, and what it told. `code` is None if it was killed."""

    def __init__(self, role: str, on_phase: Callable[[str], None]) -> None:
        self._on_phase = on_phase
        self._life = trio.CancelScope()
        self.role = role
        self.stop = StopRequest()
        self.settled = trio.Event()
        """It waits for its peer, or has ended."""
        self.code: Exit | None = None
        self.phases: list[str] = []
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, /, **values: Any) -> None:
        self.events.append({"event": name, **values})
        if name == "phase":
            self.phases.append(values["phase"])
            self._on_phase(values["phase"])
            if values["phase"] == "listening":
                self.settled.set()

    async def run(self, command: Callable[..., Awaitable[Exit]], options: object) -> None:
        with self._life:
            try:
                self.code = await command(options, self, self.stop)
            except Exception as error:  # as ferry.cli does
                self.code = exit_code_of(error)
        self.settled.set()

    def kill(self) -> None:
        """It stops where it is; its descriptors are closed."""
        self._life.cancel()


class Host:
    """A gateway, the device behind it, and the VMM before it."""

    def __init__(
        self, folder: Path, method: Method, on_run: Callable[[], None], *, incoming: bool
    ) -> None:
        folder.mkdir()
        self._on_run = on_run
        self._folder = folder
        self.device = ModelDevice(v2=method.registers == "v2", logging=method.dirty == "logging")
        self._house = House(folder, Limits())
        self._server = self._house.serve(self.device)
        self._killed: set[str] = set()
        self.vmm = self._new_vmm(incoming=incoming)

    def _new_vmm(self, *, incoming: bool) -> Vmm:
        return Vmm(self._folder, self._house.vmm_path, self._on_run, incoming=incoming)

    @property
    def flags(self) -> dict[str, Any]:
        """What tells a command of this host."""
        return {"gateway": (str(self._house.control_path),), "qmp": self.vmm.path}

    @property
    def record(self) -> tuple[CustodyState, Owner]:
        custody = self._house.gateway.core.custody
        return custody.state, custody.owner

    def kill(self, what: str) -> None:
        self._killed.add(what)
        if what == "guest":
            self.vmm.die()
        elif what == "device":
            self._house.end_device(self._server)
        else:
            self._house.end()

    def revive(self) -> None:
        """Starts a killed device or gateway again, as a service manager would; the VMM connects
        anew, if it lives."""
        if "device" in self._killed:
            self._server = self._house.serve(self.device)
        if "gateway" in self._killed:
            self._house.open()
        if self._killed and self.vmm.alive:
            self.vmm.connect()
        self._killed.clear()

    def renew_vmm(self) -> None:
        """A new VMM, which waits for a guest, in place of one that is dead."""
        self.revive()
        self.vmm = self._new_vmm(incoming=True)

    def close(self) -> None:
        self.vmm.die()
        self._house.close()


class TwoHosts:
    """Host a with a guest, host b waiting for it; see `two_hosts`.

    The guest writes a register and its device a page whenever `send` enters a phase, so that there
    is always something that has not been moved.
    """

    host: type[Host] = Host

    def __init__(self, folder: Path, method: Method, nursery: trio.Nursery) -> None:
        self._folder = folder
        self._method = method
        self._nursery = nursery
        self._profile = folder / "model.toml"
        self._profile.write_text(PROFILE)
        self._n_migrations = 0
        self._writes = 0
        self.ran_twice = False
        """Whether the guest has run on both hosts at any moment."""
        self.a = self.host(folder / "a", method, self._look, incoming=False)
        self.b = self.host(folder / "b", method, self._look, incoming=True)

    def _look(self) -> None:
        self.ran_twice |= self.a.vmm.runs and self.b.vmm.runs

    def other(self, host: Host) -> Host:
        return self.b if host is self.a else self.a

    async def migrate(
        self,
        source: Host,
        on_phase: Callable[[str, Command, Command], None] = lambda *_: None,
        *,
        check: bool = False,
    ) -> tuple[Command, Command]:
        """`send` and `receive` to their ends. `on_phase` is called when either enters a phase.
        Nobody looks whether the devices interrupt their guest: these never do."""
        target = self.other(source)
        self._n_migrations += 1
        url = f"ipc://{self._folder}/{self._n_migrations}.sock"
        common: dict[str, Any] = {
            "profile": (str(self._profile),),
            "peer_timeout": PEER_TIMEOUT_S,
            "resume_window": RESUME_WINDOW_S,
        }
        to_send = send_options.Options(
            **source.flags,
            **common,
            to=url,
            registers=self._method.registers,
            dirty=self._method.dirty,
            lanes=1,
            connect_timeout=CONNECT_TIMEOUT_S,
            downtime_limit=DOWNTIME_MS,
            check=check,
        )
        to_receive = receive_options.Options(
            **target.flags, **common, listen=url, wait=DEADLINE_S, watch_device=0
        )

        def entered(phase: str) -> None:
            if sender.phases and sender.phases[-1] == phase:
                self._be_busy(source)
            on_phase(phase, sender, receiver)

        sender, receiver = Command("send", entered), Command("receive", entered)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver.run, receive, to_receive)
            await receiver.settled.wait()
            await sender.run(send, to_send)
            if check or receiver.phases[-1:] == ["listening"]:
                receiver.stop.ask("there will be nobody else")
        return sender, receiver

    def _be_busy(self, source: Host) -> None:
        if source.vmm.runs:
            self._writes += 1
            source.vmm.write_register(NUMBER, self._writes)
            source.vmm.write_register(DOORBELL, self._writes)
            page = self._writes % ((RAM_BYTES - CPU_BYTES) // PAGE_BYTES)
            data = self._writes.to_bytes(4, "little")
            source.device.dma_write(RAM_AT + CPU_BYTES + page * PAGE_BYTES, data)

    async def resolve(
        self, host: Host, role: str, verdict: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """What `resolve` tells in the end, with its exit code as `code`."""
        options = resolve.Options(**host.flags, role=role, verdict=verdict, **more)
        command = Command("resolve", lambda _: None)
        await command.run(lambda options, told, _: resolve.resolve(options, told), options)
        return {**(command.events or [{}])[-1], "code": command.code}

    async def revive(self, host: Host) -> None:
        await trio.to_thread.run_sync(host.revive)

    async def renew_vmm(self, host: Host) -> None:
        host.kill("guest")
        await trio.to_thread.run_sync(host.renew_vmm)
        await self._nursery.start(host.vmm.serve_qmp)

    def close(self) -> None:
        self.a.close()
        self.b.close()


@asynccontextmanager
async def two_hosts(
    folder: Path, method: Method, kind: type[TwoHosts] = TwoHosts
) -> AsyncIterator[TwoHosts]:
    async with trio.open_nursery() as nursery:
        hosts = kind(folder, method, nursery)
        try:
            await nursery.start(hosts.a.vmm.serve_qmp)
            await nursery.start(hosts.b.vmm.serve_qmp)
            yield hosts
            nursery.cancel_scope.cancel()
        finally:
            hosts.close()
