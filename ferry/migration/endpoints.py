"""The address between the hosts: what it is, and why nobody answers there."""

from urllib.parse import urlsplit

import trio

from ferry.errors import Unreachable
from ferry.exit_codes import describe
from transport.session.sockets import addresses_of, at_address
from transport.wire.errors import EndpointError

PROBE_S = 2.0
"""How long a connection may take that is tried to find out why there is none."""


async def resolved(url: str) -> str:
    """`url` with an address in place of a name; of several, the first that takes connections.

    Raises `Unreachable` if there is no such host.
    """
    parts = urlsplit(url)
    if parts.scheme != "tcp" or not parts.hostname or parts.port is None:
        return url
    try:
        addresses = await trio.to_thread.run_sync(
            addresses_of, parts.hostname, abandon_on_cancel=True
        )
    except EndpointError as error:
        raise Unreachable(f"{error}: look at --to and at the name service") from error
    found = addresses[0]
    if len(addresses) > 1:
        with trio.move_on_after(PROBE_S):
            try:
                stream = await trio.open_tcp_stream(parts.hostname, parts.port)
            except OSError:
                pass
            else:
                async with stream:
                    found = stream.socket.getpeername()[0]
    return at_address(url, found)


async def why_nobody_answers(url: str) -> str:
    """What a plain connection to `url` meets, and what to do; empty where that tells nothing."""
    parts = urlsplit(url)
    if parts.scheme != "tcp" or not parts.hostname or parts.port is None:
        return ""
    with trio.move_on_after(PROBE_S):
        try:
            stream = await trio.open_tcp_stream(parts.hostname, parts.port)
        except OSError as group:
            first, *more = getattr(group.__cause__, "exceptions", (group.__cause__ or group,))
            if any(isinstance(cause, ConnectionRefusedError) for cause in (first, *more)):
                return (
                    f"{parts.hostname} refuses port {parts.port}: nothing listens there; start "
                    "`vfio-ferry receive` there first, or look at the port of --to"
                )
            return f"no way to {parts.hostname}: {describe(first)}"
        await stream.aclose()
        return ""
    return (
        f"{parts.hostname} is silent at port {parts.port}: the host is down, or a firewall drops "
        f"what is sent to it; open TCP port {parts.port} there"
    )
