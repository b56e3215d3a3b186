"""Two hosts whose VMs have two devices each, with a gateway of its own for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.migration import belonging
from lab.vfio_user.client import Client
from sync.gateway.engine.core import Limits
from sync.gateway.engine.custody import CustodyState, Owner
from sync.vmm.devices import VmmDevice
from sync.vmm.driver import Vmm as DrivenVmm
from tests.in_process.device import ModelDevice
from tests.in_process.two_hosts import Host, Method, TwoHosts
from tests.in_process.vmm import Vmm
from tests.sync.gateway.conftest import House

SECOND = " 2"
"""Behind the name of a victim that is of the second device."""


class VmmOfTwo(Vmm):
    """Its second device is behind the gateway that listens at `second`."""

    def __init__(self, second: Path, *args: Any, **options: Any) -> None:
        self._second = second
        self.other: Client | None = None
        super().__init__(*args, **options)
        self.connect_other()

    def connect_other(self) -> None:
        self.other = self.connected(self._second)

    def die(self) -> None:
        if self.alive and self.other is not None:
            self.other.close()
        super().die()


class HostOfTwo(Host):
    """What `kill` is told may have ` 2` behind it."""

    def __init__(
        self, folder: Path, method: Method, on_run: Callable[[], None], *, incoming: bool
    ) -> None:
        second = folder.with_name(f"{folder.name}2")
        second.mkdir()
        self.second = House(second, Limits())
        v2, logging = method.registers == "v2", method.dirty == "logging"
        self.other = ModelDevice(v2=v2, logging=logging)
        self._other_server = self.second.serve(self.other)
        self._lost: set[str] = set()
        super().__init__(folder, method, on_run, incoming=incoming)

    def _new_vmm(self, *, incoming: bool) -> Vmm:
        return VmmOfTwo(
            self.second.vmm_path,
            self._folder,
            self._house.vmm_path,
            self._on_run,
            incoming=incoming,
        )

    @property
    def flags(self) -> dict[str, Any]:
        (first,) = super().flags["gateway"]
        return {**super().flags, "gateway": (first, str(self.second.control_path))}

    @property
    def record(self) -> tuple[CustodyState, Owner]:
        custody = self.second.gateway.core.custody
        assert super().record == (custody.state, custody.owner)
        return super().record

    def kill(self, what: str) -> None:
        if not what.endswith(SECOND):
            super().kill(what)
        elif what.startswith("device"):
            self._lost.add("device")
            self.second.end_device(self._other_server)
        else:
            self._lost.add("gateway")
            self.second.end()

    def revive(self) -> None:
        if "device" in self._lost:
            self._other_server = self.second.serve(self.other)
        if "gateway" in self._lost:
            self.second.open()
        super().revive()
        if self._lost and isinstance(self.vmm, VmmOfTwo) and self.vmm.alive:
            self.vmm.connect_other()
        self._lost.clear()

    def close(self) -> None:
        super().close()
        self.second.close()


class TwoHostsOfTwo(TwoHosts):
    host = HostOfTwo


def tell_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted VMMs have no object model: which device has which socket is told here."""

    async def devices(vmm: DrivenVmm) -> tuple[VmmDevice, ...]:
        stream = vmm.client._stream
        assert isinstance(stream, trio.SocketStream)
        folder = Path(stream.socket.getpeername()).parent
        return tuple(
            VmmDevice(f"/{number}", f"{folder}{more}/vmm.sock", f"00: {number}.0")
            for number, more in enumerate(("", "2"))
        )

    monkeypatch.setattr(belonging, "list_devices", devices)
