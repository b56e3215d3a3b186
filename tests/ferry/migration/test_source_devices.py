"""What the devices of a source say of a migration before it begins."""

from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
from trio.testing import trio_test

from ferry.errors import NotOwner
from ferry.migration.send_options import Options
from ferry.migration.source_devices import SourceDevice, attach_devices, showing_ms
from ferry.migration.undo import Undo
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.records import Fate


def device(pin_ns: float, *, fence: bool) -> SourceDevice:
    info, registers = SimpleNamespace(pin_ns_per_page=pin_ns), SimpleNamespace(fence=fence)
    return SourceDevice(0, "", cast(Any, None), cast(Any, info), cast(Any, registers), "scan")


def test_memory_that_is_pinned_is_counted_at_the_target_and_where_it_is_taken_away() -> None:
    """A process maps it at no cost; a function that is not fenced keeps it until it is let go."""
    process, queues, fenced = (
        device(0.0, fence=True),
        device(500.0, fence=False),
        device(500.0, fence=True),
    )
    assert showing_ms([process], 1 << 20) == 0.0
    assert showing_ms([queues], 1 << 20) == pytest.approx(524.288)
    assert showing_ms([fenced, queues], 1 << 20) == pytest.approx(3 * 524.288)


@trio_test
async def test_that_a_guest_has_moved_is_said_though_its_vmm_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gateway(GatewayClient):
        def __init__(self) -> None:
            self.info = cast(
                Any,
                SimpleNamespace(
                    state="released",
                    session="s1",
                    sessions={"s1": Fate.MOVED},
                    device_connected=True,
                    vmm_connected=False,
                ),
            )
            self._closed = True

        async def status(self) -> Any:
            return self.info

    async def connect(*_: Any, **__: Any) -> Gateway:
        return Gateway()

    monkeypatch.setattr(GatewayClient, "connect", connect)
    options = Options(to="ipc:///x", qmp="q", gateway=("g",))
    async with AsyncExitStack() as held:
        with pytest.raises(NotOwner, match="moved away in session s1"):
            await attach_devices(options, "s2", held, Undo())
