"""The tunnel: the VMM's own migration stream, carried over the link between the two hosts."""

import contextlib
from collections.abc import Awaitable, Callable

import trio

from ferry.migration.handover_runner import HandoverRunner
from ferry.nurseries import first_error
from sync.handover.machine import Event
from transport.session.link import SessionEnd
from transport.wire.errors import TransportError

TUNNEL_BYTES = 256 << 10
"""One read of the VMM's stream."""


async def tunnel_out(
    stream: trio.SocketStream, link: SessionEnd, complete: Callable[[], Awaitable[bool]] | None
) -> None:
    """Carries the stream of the VMM on this host to the other one, until the VMM closes or is gone.

    `complete` is asked then. The end of a stream that broke off is not passed on: the other VMM
    would fail of it, and its host would see that before it hears the reason.
    """
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(TUNNEL_BYTES):
            await link.tunnel_send(data)
    if complete is None or await complete():
        await link.tunnel_send_eof()


async def tunnel_in(stream: trio.SocketStream, link: SessionEnd) -> None:
    """Carries the stream of the other host's VMM to the one here, until the other one closes.

    A VMM that has closed its end has what it wants, or has failed; its QMP says which. The peer's
    stream is read to its end all the same, or the peer would wait for room.
    """
    gone = False
    while data := await link.tunnel_receive():
        if not gone:
            try:
                await stream.send_all(data)
            except trio.BrokenResourceError:
                gone = True
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_eof()


async def run_tunnel(
    stream: trio.SocketStream,
    link: SessionEnd,
    runner: HandoverRunner,
    complete: Callable[[], Awaitable[bool]] | None = None,
) -> None:
    """Carries both directions of the VMM's stream. A link that breaks is told as the peer's loss.

    `complete` says, when the VMM has closed its end, whether the other host may hear of it.
    """
    try:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(tunnel_out, stream, link, complete)
            nursery.start_soon(tunnel_in, stream, link)
    except* TransportError as group:
        runner.post(Event.PEER_LOST, first_error(group))
