"""One control connection: a request at a time, and an end for a client that does not read."""

import socket
from collections.abc import Callable, Iterator

import pytest

from sync.gateway.control.peer import WRITE_DEADLINE_S, ControlPeer
from sync.gateway.control.wire import ControlDecoder, encode
from sync.gateway.errors import ControlProtocolError

Pair = tuple[ControlPeer, socket.socket, list[ControlPeer]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A peer, its client's socket, and the list that hears of replies."""
    ours, theirs = socket.socketpair()
    replied: list[ControlPeer] = []
    peer = ControlPeer(ours, replied.append)
    yield peer, theirs, replied
    peer.close()
    theirs.close()


def test_i9_no_request_is_taken_before_the_last_one_is_answered(pair: Pair) -> None:
    peer, client, replied = pair
    client.sendall(encode({"n": 1}) + encode({"n": 2}))
    assert peer.receive()
    assert peer.next_request().fields == {"n": 1}
    peer.busy = True
    assert peer.next_request() is None and not peer.wants_read
    peer.reply({"ok": True}, b"blob", ())
    assert replied == [peer]
    assert peer.next_request() is None and not peer.wants_read, "the reply is still here"
    assert peer.flush(0.0)
    decoder = ControlDecoder(0)
    decoder.feed(client.recv(1000), [])
    assert decoder.next_message().blob == b"blob"
    assert peer.wants_read
    assert peer.next_request().fields == {"n": 2}


def test_i10_a_client_that_does_not_read_is_given_up(pair: Pair) -> None:
    peer, client, _ = pair
    peer.reply({"ok": True}, bytes(4 << 20), ())
    assert peer.flush(100.0) and peer.wants_write
    assert peer.flush(100.0 + WRITE_DEADLINE_S)
    assert not peer.flush(100.1 + WRITE_DEADLINE_S)
    while len(client.recv(1 << 20)) == 1 << 20:
        pass


def test_descriptors_in_a_request_are_an_error_and_no_leak(
    pair: Pair, open_fds: Callable[[], int]
) -> None:
    peer, client, _ = pair
    before = open_fds()
    socket.send_fds(client, [encode({"op": "status"})], [0])
    with pytest.raises(ControlProtocolError):
        peer.receive()
    peer.close()
    assert open_fds() == before - 1


def test_the_end_of_the_stream(pair: Pair, open_fds: Callable[[], int]) -> None:
    peer, client, _ = pair
    client.close()
    assert not peer.receive()
    peer.reply({"ok": True}, b"", ())
    assert not peer.flush(0.0)
    peer.close()
    peer.reply({"ok": True}, b"", ())
    peer.close()
