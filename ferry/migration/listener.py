"""How both sides listen to each other, by the rules of `ferry.migration.conversation`."""

from collections.abc import Awaitable, Callable

import trio

from ferry.errors import FerryError
from ferry.migration.conversation import Conversation
from ferry.migration.handover_runner import HandoverRunner
from ferry.migration.messages import MessageKind
from sync.handover.machine import Event, RemoteProtocolError
from transport.session.link import SessionEnd
from transport.wire.errors import TransportError

HEAR_OUT_S = 5.0
"""What a peer has said before it left is acted on within this time, or it has just left."""


class Listener:
    """Hears the peer on `link`. `act` is called with each message that is to be acted on and its
    payload, and is over before the next one is read."""

    def __init__(
        self,
        link: SessionEnd,
        runner: HandoverRunner,
        act: Callable[[MessageKind, bytes], Awaitable[None]],
    ) -> None:
        self._link = link
        self._runner = runner
        self._act = act
        self._conversation = Conversation(runner.role)

    async def run(self) -> None:
        """Listens until the link ends or the peer breaks the protocol; tells the handover of it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            try:
                await self.hear_out()
            except (TransportError, FerryError, RemoteProtocolError) as error:
                self._runner.post(Event.PEER_LOST, error)
            except Exception as error:
                self._runner.post(Event.FAILED, error)
            nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        """Tells of the link's end where a message is not acted on to its end, as when a gateway
        hangs: what the peer has said before is heard first, if it can be."""
        try:
            await self._link.wait_ended()
        except TransportError as error:
            await trio.sleep(HEAR_OUT_S)
            self._runner.post(Event.PEER_LOST, error)
        except trio.ClosedResourceError:
            return

    async def hear_out(self) -> None:
        """Listens as `run` does, but raises what ends it."""
        while True:
            record = await self._link.receive_record()
            kind = self._conversation.take(record.kind, self._runner.state)
            if kind is not None:
                await self._act(kind, record.payload)
