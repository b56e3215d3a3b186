"""The tunnel: the VMM's own migration stream, carried over the link between the two hosts."""

import contextlib
from collections.abc import Awaitable, Callable

import trio

from ferry.errors import Mismatch
from ferry.migration.handover_runner import HandoverRunner
from ferry.nurseries import first_error
from sync.handover.machine import Event
from sync.vmm.stream.errors import StreamError
from transport.session.link import SessionEnd
from transport.wire.errors import TransportError

TUNNEL_BYTES = 256 << 10
"""One read of the VMM's stream."""


async def tunnel_out(stream: trio.SocketStream, link: SessionEnd) -> None:
    """Carries what the VMM on this host says to the other one, until the VMM closes or is gone."""
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(TUNNEL_BYTES):
            await link.tunnel_send(data)
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
    out: Callable[[trio.SocketStream, SessionEnd], Awaitable[None]] = tunnel_out,
) -> None:
    """Carries both directions of the VMM's stream, the one to the other host by `out`. A link that
    breaks is told as the peer's loss, a stream that cannot be carried as a failure."""
    try:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(out, stream, link)
            nursery.start_soon(tunnel_in, stream, link)
    except* TransportError as group:
        runner.post(Event.PEER_LOST, first_error(group))
    except* (StreamError, Mismatch) as group:
        runner.post(Event.FAILED, first_error(group))
