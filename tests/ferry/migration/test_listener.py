"""The end of a link is told to the handover, whatever the listener is at."""

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import trio

from ferry.migration import listener
from ferry.migration.listener import Listener
from ferry.migration.messages import MessageKind
from sync.handover.machine import Event
from sync.handover.states import HandoverState, Role
from transport.wire.errors import PeerLost


def test_i8_a_peer_that_leaves_is_noticed_while_a_gateway_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A message is acted on for good; the link ends meanwhile."""
    monkeypatch.setattr(listener, "HEAR_OUT_S", 0.0)
    told = trio.Event()

    class Link:
        async def receive_record(self) -> Any:
            return SimpleNamespace(kind=MessageKind.ASK_LOADED, payload=b"")

        async def wait_ended(self) -> NoReturn:
            raise PeerLost("it left")

    class Runner:
        role, state = Role.TARGET, HandoverState.RECEIVING

        def post(self, event: Event, error: Exception) -> None:
            assert event is Event.PEER_LOST and isinstance(error, PeerLost)
            told.set()

    async def hang(_kind: MessageKind, _payload: bytes) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        link: Any = Link()
        runner: Any = Runner()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Listener(link, runner, hang).run)
            with trio.fail_after(10):
                await told.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)
