"""The VMM's stream on its way into the tunnel: when the other host hears of its end."""

import pytest
import trio

from ferry.migration.tunnel import tunnel_out
from transport.session.link import LinkThread, SessionEnd


class Tunnel(SessionEnd):
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.sent = b""
        self.ended = False

    def _threads(self) -> list[LinkThread]:
        return []

    async def tunnel_send(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    async def tunnel_send_eof(self) -> None:
        self.ended = True


@pytest.mark.parametrize("complete", [True, False])
def test_the_end_of_a_stream_that_broke_off_is_not_passed_on(complete: bool) -> None:
    tunnel = Tunnel()

    async def judge() -> bool:
        assert not tunnel.ended
        return complete

    async def main() -> None:
        ours, theirs = trio.socket.socketpair()
        async with trio.SocketStream(ours) as vmm, trio.SocketStream(theirs) as stream:
            await vmm.send_all(b"a page")
            await vmm.send_eof()
            await tunnel_out(stream, tunnel, judge)

    trio.run(main)
    assert tunnel.sent == b"a page"
    assert tunnel.ended is complete
