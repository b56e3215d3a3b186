"""A secret that both ends have: who is let in, what can be read on the way, what is counted."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import trio
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.running import run_trio
from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.sender import SenderOptions, open_sender
from transport.session import sockets
from transport.session import watch as watching
from transport.session.gatekeeper import Gatekeeper
from transport.session.link import Closing, Shared
from transport.session.secret import (
    SECRET_BYTES,
    Keys,
    Secret,
    check_secret,
    new_key,
    prove_by,
    public_key,
)
from transport.wire.errors import PeerUnreachable
from transport.wire.records import CONTROL_LANE, MAX_MESSAGE_BYTES, SessionHello, routing_id

SECRET, OTHER = b"s" * SECRET_BYTES, b"o" * SECRET_BYTES
MARK = b"what nobody else may read"
IMPATIENT_S = 4.0
"""A connection that is turned away is tried again every 50 ms, and once has to be seen."""


async def exchange(receiver: Receiver, url: str, options: SenderOptions) -> None:
    """A whole session: a record, bytes of the tunnel, and a round of pages."""
    source = np.frombuffer(MARK.ljust(4096) * 8, np.uint8)
    target = np.zeros_like(source)
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            await receiver.wait_hello()
            await receiver.accept(b"")
            receiver.attach_memory(target)
            assert (await receiver.receive_record()).payload == MARK
            assert await receiver.tunnel_receive() == MARK

        nursery.start_soon(answer)
        async with open_sender(url, os.urandom(16), b"", options) as sender:
            sender.attach_memory(source)
            await sender.send_record(1, MARK, flush=True)
            await sender.tunnel_send(MARK)
            await sender.send_round(np.arange(8, dtype=np.uint32), 0)
            assert (await sender.verify()).size == 0
    assert np.array_equal(source, target)


@contextmanager
def relay(url: str) -> Iterator[tuple[str, bytearray]]:
    """An address that leads to `url`, and all that passes it, in both directions."""
    seen = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))
    there = ("127.0.0.1", int(url.rpartition(":")[2]))

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                seen.extend(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection(there)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@contextmanager
def two_sockets(
    secret: bytes | None,
) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """A ROUTER, not bound yet, and a DEALER, not connected; with the secret's gatekeeper. For a
    trio run that is going on."""
    shared = Shared(None, 0)  # type: ignore[arg-type]
    with zmq.Context() as context:
        gatekeeper = Gatekeeper(shared, context, SECRET)
        gatekeeper.start()
        ends = sockets.open_router(context, secret), sockets.open_dealer(context, b"me", secret)
        try:
            yield ends
        finally:
            shared.start_closing(Closing.DROP)
            gatekeeper.join()
            for end in ends:
                end.close(linger=0)
    shared.close()


@pytest.mark.parametrize("secret", [None, SECRET])
def test_what_is_encrypted_cannot_be_read_on_the_way(secret: bytes | None) -> None:
    async def scenario() -> None:
        options = ReceiverOptions(secret=secret)
        async with open_receiver("tcp://127.0.0.1:*", options) as receiver:
            with relay(receiver.url) as (url, seen):
                await exchange(receiver, url, SenderOptions(secret=secret))
                assert (MARK in seen) is (secret is None)

    run_trio(scenario)


def test_a_secret_is_for_every_kind_of_endpoint(bind_url: str) -> None:
    async def scenario() -> None:
        async with open_receiver(bind_url, ReceiverOptions(secret=SECRET)) as receiver:
            await exchange(receiver, receiver.url, SenderOptions(secret=SECRET))

    run_trio(scenario)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(SECRET, OTHER), (SECRET, None), (None, SECRET)], ids=str
)
def test_who_has_not_the_same_secret_is_turned_away(
    theirs: bytes | None, ours: bytes | None
) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*", ReceiverOptions(secret=theirs)) as receiver:
            stranger = SenderOptions(secret=ours, connect_timeout_s=IMPATIENT_S)
            with pytest.raises(PeerUnreachable, match="have not got the same secret"):
                async with open_sender(receiver.url, os.urandom(16), b"", stranger):
                    pass
            # And is in nobody's way.
            await exchange(receiver, receiver.url, SenderOptions(secret=theirs))

    run_trio(scenario)


def test_hosts_with_keys_of_their_own_admit_those_that_they_were_told() -> None:
    """Also where a stranger knows the receiver's public key, and where somebody else sits at the
    receiver's address."""
    a, b, c, stranger = (new_key() for _ in range(4))
    receiving = Keys(a, (public_key(b), public_key(c)))
    wrong: list[Secret] = [
        Keys(stranger, (public_key(a),)),
        Keys(b, (public_key(stranger),)),
        SECRET,
    ]

    async def scenario() -> None:
        options = ReceiverOptions(secret=receiving)
        async with open_receiver("tcp://127.0.0.1:*", options) as receiver:
            for secret in wrong:
                impatient = SenderOptions(secret=secret, connect_timeout_s=IMPATIENT_S)
                with pytest.raises(PeerUnreachable, match="do not know each other's keys"):
                    async with open_sender(receiver.url, os.urandom(16), b"", impatient):
                        pass
            with relay(receiver.url) as (url, seen):
                await exchange(receiver, url, SenderOptions(secret=Keys(c, (public_key(a),))))
                assert MARK not in seen

    run_trio(scenario)


def test_it_is_not_enough_to_know_the_receivers_key() -> None:
    """CURVE alone would let them in."""

    def know_the_receivers_key(dealer: zmq.Socket[bytes]) -> None:
        prove_by(SECRET, dealer)
        public, secret = zmq.curve_keypair()
        dealer.set(zmq.CURVE_PUBLICKEY, public)
        dealer.set(zmq.CURVE_SECRETKEY, secret)

    async def scenario() -> None:
        options = ReceiverOptions(secret=SECRET)
        async with open_receiver("tcp://127.0.0.1:*", options) as receiver:
            with zmq.Context() as context:
                session = os.urandom(16)
                dealer = sockets.open_dealer(context, routing_id(CONTROL_LANE, session), None)
                know_the_receivers_key(dealer)
                watch = watching.Watch(dealer)
                sockets.connect(dealer, receiver.url)
                dealer.send(SessionHello(session, bytes(16), 1, 65536, b"let me in").pack())
                while True:
                    await trio.to_thread.run_sync(watch.monitor.poll, 100)
                    events = [event for event, _ in watch.events()]
                    assert watching.ConnectionEvent.READY not in events
                    if watching.ConnectionEvent.UNSUITED in events:
                        break
                watch.close()
                dealer.close(linger=0)
            await exchange(receiver, receiver.url, SenderOptions(secret=SECRET))

    run_trio(scenario)


@given(
    encrypted=st.booleans(),
    lengths=st.lists(
        st.one_of(st.integers(0, 600), st.sampled_from([255, 256, 222, 223, 70_000])),
        min_size=1,
        max_size=12,
    ),
)
@settings(max_examples=20, deadline=None)
def test_the_watch_counts_what_came_in(encrypted: bool, lengths: list[int]) -> None:
    """Or a connection would be taken for one that keeps too much, after some time."""

    async def scenario() -> None:
        with two_sockets(SECRET if encrypted else None) as (router, dealer):
            watch = watching.Watch(router)
            sockets.connect(dealer, sockets.bind(router, "tcp://127.0.0.1:*").url)
            open_bytes = None
            for length in [0, *lengths]:
                dealer.send_multipart([bytes(length), bytes(length // 2)])
                assert router.poll(10_000)
                message = sockets.receive(router)
                assert message is not None
                for _ in watch.events():
                    pass  # it learns of the connection
                fd = watch.given(message[1:])
                with watching._duplicate(fd) as copy:
                    assert copy is not None
                    kept = watching._came_in(copy) - watch._connections[fd].given_bytes
                if open_bytes is None:
                    open_bytes = kept  # the handshake
                assert kept == open_bytes
            watch.close()

    run_trio(scenario)


def test_who_is_vouched_for_before_its_opening_is_heard_of_is_no_stranger() -> None:
    """The message may be taken before the notice of the connection that it came on."""

    async def scenario() -> None:
        with two_sockets(None) as (router, dealer):
            watch = watching.Watch(router)
            sockets.connect(dealer, sockets.bind(router, "tcp://127.0.0.1:*").url)
            dealer.send(b"here I am")
            assert router.poll(10_000)
            message = sockets.receive(router)
            assert message is not None
            watch.vouch(watch.given(message[1:]))
            for _ in watch.events():
                pass
            (connection,) = watch._connections.values()
            assert not connection.stranger
            watch.close()

    run_trio(scenario)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_the_longest_message_arrives_and_a_longer_one_does_not(secret: bytes | None) -> None:
    async def scenario() -> None:
        with two_sockets(secret) as (router, dealer):
            sockets.connect(dealer, sockets.bind(router, "tcp://127.0.0.1:*").url)
            dealer.send(bytes(MAX_MESSAGE_BYTES))
            assert router.poll(10_000)
            assert len(router.recv_multipart()[1]) == MAX_MESSAGE_BYTES
            dealer.send(bytes(MAX_MESSAGE_BYTES + 1))
            dealer.send(b"what comes behind it, on another connection")
            assert router.poll(10_000)
            assert router.recv_multipart()[1].startswith(b"what comes behind")

    run_trio(scenario)


def test_a_secret_is_of_one_length_and_does_not_show() -> None:
    for wrong in (b"", SECRET + b"s", SECRET[1:]):
        with pytest.raises(ValueError, match="32"):
            check_secret(wrong)
        for options in (SenderOptions, ReceiverOptions):
            make: Any = options
            with pytest.raises(ValueError, match="32"):
                make(secret=wrong)
            assert "sss" not in repr(make(secret=SECRET))
