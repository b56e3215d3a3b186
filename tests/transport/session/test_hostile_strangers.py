"""I9: who speaks raw ZeroMQ, or raw TCP, to a receiver and belongs to no session of its own.

It is dropped and counted, costs no memory, and the session that comes or runs goes on. For members
of a session see `test_hostile_peer` and `test_hostile_receiver`.
"""

import os
import socket
import struct
import threading
from typing import Any

import numpy as np
import pytest
import trio
import trio.lowlevel
import zmq

from tests.transport.hostile_sender import (
    N_PAGES,
    PAGE,
    HostileSender,
    in_thread,
    private_mib,
    until,
)
from tests.transport.running import run_trio
from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.sender import SenderOptions, open_sender
from transport.session.message_memory import give_back_message_memory
from transport.session.sockets import MAX_CONNECTIONS
from transport.wire.records import (
    CONTROL_LANE,
    FIRST_DATA_LANE,
    MAX_MESSAGE_BYTES,
    TUNNEL_LANE,
    Bye,
    Ping,
    RecordMessage,
    SessionHello,
    TunnelEof,
    TunnelHead,
)


async def expect_good_session(receiver: Receiver) -> None:
    """A sender of ours gets through, and a round with it."""
    source, target = (np.full(N_PAGES * PAGE, fill, np.uint8) for fill in (7, 0))
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            await receiver.wait_hello()
            await receiver.accept(b"")
            receiver.attach_memory(target)

        nursery.start_soon(answer)
        async with open_sender(receiver.url, os.urandom(16), b"") as sender:
            sender.attach_memory(source)
            await sender.send_round(np.arange(N_PAGES, dtype=np.uint32), 1)
            assert np.array_equal(source, target)


STRANGER_MESSAGES: list[list[bytes]] = [
    [b""],
    [b"\xff" * 100],
    [os.urandom(50_000)],
    [b"a", b"b", b"c"],
    [RecordMessage(0, 1, b"").pack()],
    [Ping(1).pack()],
    [b"vfpg" + bytes(100)],
    [SessionHello(b"X" * 16, bytes(16), 1, 1 << 20, b"").pack()],
    [SessionHello(bytes(16), bytes(16), 200, 1 << 20, b"").pack()],
    [SessionHello(bytes(16), bytes(16), 1, 1 << 20, b"").pack()[:-3]],
    [struct.pack("<B8sH", 1, b"vfioferr", 999)],
]


@pytest.mark.parametrize("lane", [CONTROL_LANE, TUNNEL_LANE, FIRST_DATA_LANE, 0xFF])
def test_i9_what_strangers_say_is_dropped_and_counted(lane: int) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            hostile = HostileSender(receiver.url)
            try:
                for message in STRANGER_MESSAGES:
                    hostile.dealer(lane).send_multipart(message)
                await until(
                    lambda: receiver.statistics().dropped_messages >= len(STRANGER_MESSAGES)
                )
                await expect_good_session(receiver)
            finally:
                hostile.close()

    run_trio(scenario)


@pytest.mark.parametrize("identity", [b"", b"\x01", b"\x01" + bytes(15), b"\x01" + bytes(17)])
def test_i9_identities_of_another_shape_are_nobody(identity: bytes) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
                dealer.set(zmq.LINGER, 0)
                if identity:
                    dealer.set(zmq.ROUTING_ID, identity)
                dealer.connect(receiver.url)
                dealer.send(SessionHello(bytes(16), bytes(16), 1, 1 << 20, b"").pack())
                dealer.send(b"more")
                await until(lambda: receiver.statistics().dropped_messages >= 2)
            await expect_good_session(receiver)

    run_trio(scenario)


def test_i9_a_message_that_never_ends_is_cut_off_before_it_fills_the_memory(
    raw_zmtp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back = threading.Event()

    def give_back() -> None:
        give_back_message_memory()
        given_back.set()

    monkeypatch.setattr("transport.session.watch.give_back_message_memory", give_back)

    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            before = private_mib()
            for _ in range(4):  # what one has filled is there for the next
                connection = raw_zmtp.connect(receiver.url)
                await in_thread(raw_zmtp.flood_until_shut, connection)
            await until(lambda: private_mib() - before < 64)
            await until(given_back.is_set)
            await expect_good_session(receiver)

    run_trio(scenario)


def test_i9_a_declared_length_beyond_the_limit_ends_the_connection(raw_zmtp: Any) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            before = private_mib()
            for length in (MAX_MESSAGE_BYTES + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
                with raw_zmtp.connect(receiver.url) as connection:
                    connection.sendall(b"\x02" + struct.pack(">Q", length))
                    while await in_thread(connection.recv, 4096):
                        pass
            assert private_mib() - before < 64
            await expect_good_session(receiver)

    run_trio(scenario)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 20, b"\xff" + bytes(8) + b"\x7f\xff"]
)
def test_i9_a_stranger_that_speaks_no_zmtp_is_no_obstacle(garbage: bytes) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            port = int(receiver.url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(garbage)
                await expect_good_session(receiver)

    run_trio(scenario)


def test_i9_connections_are_bounded_and_do_not_shut_the_door(raw_zmtp: Any) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            connections = [raw_zmtp.connect(receiver.url) for _ in range(3 * MAX_CONNECTIONS)]
            try:
                await expect_good_session(receiver)
                (watch,) = receiver._router._watches.values()
                assert len(watch._connections) <= MAX_CONNECTIONS
            finally:
                for connection in connections:
                    connection.close()

    run_trio(scenario)


@pytest.mark.parametrize("secret", [None, bytes(range(32))], ids=["open", "secret"])
@pytest.mark.parametrize("n_pages", [0, N_PAGES], ids=["before memory", "before a round"])
def test_i9_who_belongs_to_the_session_is_never_put_out_for_who_does_not(
    link_pair: Any, secret: bytes | None, n_pages: int
) -> None:
    """Also a lane that has had nothing to say so far."""

    async def scenario() -> None:
        sending, receiving = SenderOptions(secret=secret), ReceiverOptions(secret=secret)
        async with link_pair(n_pages=n_pages, sending=sending, receiving=receiving) as pair:
            port = int(pair.receiver.url.rpartition(":")[2])
            (watch,) = pair.receiver._router._watches.values()
            lanes = 2 + sending.lanes * bool(n_pages)
            # A connection belongs to the session once its first message has been read.
            await until(
                lambda: sum(not each.stranger for each in [*watch._connections.values()]) == lanes
            )
            idle = []
            try:
                for _ in range(3 * MAX_CONNECTIONS):
                    idle.append(socket.create_connection(("127.0.0.1", port)))
                    await trio.lowlevel.checkpoint()
                await pair.sender.send_record(1, b"", flush=True)
                if not n_pages:
                    source, target = np.full((2, N_PAGES * PAGE), 0, np.uint8)
                    pair.source, pair.target = source, target
                    pair.receiver.attach_memory(target)
                    pair.sender.attach_memory(source)
                pair.source[:] = 5
                await pair.sender.send_round(np.arange(N_PAGES, dtype=np.uint32), 1)
                assert np.array_equal(pair.source, pair.target)
                await pair.sender.tunnel_send(b"ours")
                assert await pair.receiver.tunnel_receive() == b"ours"
                await pair.receiver.tunnel_send(b"yours")
                assert await pair.sender.tunnel_receive() == b"yours"
            finally:
                for connection in idle:
                    connection.close()

    run_trio(scenario)


def test_i9_other_sessions_cannot_touch_ours(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=N_PAGES) as pair:
            hostile = HostileSender(pair.receiver.url)
            try:
                hostile.greet()
                hostile.dealer(FIRST_DATA_LANE).send(hostile.frames(1)[0])
                hostile.dealer(CONTROL_LANE).send(Bye("go away").pack())
                hostile.dealer(TUNNEL_LANE).send_multipart([TunnelHead(0).pack(), b"evil"])
                await until(lambda: pair.receiver.statistics().dropped_messages >= 4)
                # libzmq lets nobody take an identity that is in use.
                ours = pair.sender._hello.session
                hostile.dealer(CONTROL_LANE, ours).send(Bye("go away").pack())
                hostile.dealer(TUNNEL_LANE, ours).send(TunnelEof(0).pack())
                pair.source[:] = 5
                await pair.sender.send_round(np.arange(N_PAGES, dtype=np.uint32), 1)
                assert np.array_equal(pair.source, pair.target)
                await pair.sender.tunnel_send(b"ours")
                assert await pair.receiver.tunnel_receive() == b"ours"
            finally:
                hostile.close()

    run_trio(scenario)
