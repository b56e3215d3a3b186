"""I9: peers that speak raw ZeroMQ, or raw TCP, and mean harm.

Here it is the sender that is hostile; for the receiver see `test_hostile_receiver`. Each test ends
in a typed error on our side, or in nothing at all for a session that goes on; never in a hang, a
write outside what was allowed, or memory beyond the limits.
"""

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
import zmq

from tests.transport.running import run_trio
from transport.buffers import give_back_message_memory
from transport.channels import RECORD_WINDOW_BYTES, TUNNEL_WINDOW_BYTES
from transport.encoder import Encoder
from transport.errors import (
    FrameError,
    PeerLost,
    RecordError,
    TransportError,
)
from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.records import (
    CONTROL_LANE,
    FIRST_DATA_LANE,
    MAX_MESSAGE_BYTES,
    TUNNEL_LANE,
    Ack,
    Attached,
    Bye,
    Compare,
    Digest,
    Hello,
    HelloReply,
    MessageType,
    Ping,
    RecordCredit,
    RecordMessage,
    TunnelCredit,
    TunnelEof,
    TunnelHead,
    Verdict,
    routing_id,
    session_seed,
)
from transport.replica import Replica
from transport.sender import open_sender
from transport.sockets import MAX_CONNECTIONS

PAGE = 4096
N_PAGES = 64
DEADLINE_S = 20
NO_PAGES = np.empty(0, np.uint32)


def private_mib() -> int:
    """Memory of this process that is backed by no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) >> 10


class HostileSender:
    """DEALERs with any identity; says what it is told, and reads only when it is told."""

    def __init__(self, url: str) -> None:
        self.session = os.urandom(16)
        self.nonce = os.urandom(16)
        self._url = url
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}

    def dealer(self, lane: int, session: bytes | None = None) -> zmq.Socket[bytes]:
        identity = routing_id(lane, self.session if session is None else session)
        if identity not in self._dealers:
            dealer = self._context.socket(zmq.DEALER)
            dealer.set(zmq.ROUTING_ID, identity)
            dealer.set(zmq.LINGER, 0)
            dealer.set(zmq.RCVTIMEO, DEADLINE_S * 1000)
            dealer.set(zmq.SNDTIMEO, DEADLINE_S * 1000)
            dealer.connect(self._url)
            self._dealers[identity] = dealer
        return self._dealers[identity]

    def greet(self, lanes: int = 2, frame_bytes: int = 1 << 20) -> None:
        self.dealer(CONTROL_LANE).send(
            Hello(self.session, self.nonce, lanes, frame_bytes, b"").pack()
        )

    def wait_for(self, kind: MessageType) -> bytes:
        """Read the control lane up to a message of this kind, pinging to stay alive."""
        while True:
            message = self.dealer(CONTROL_LANE).recv()
            if message[0] == kind:
                return message

    def frames(self, count: int, n_pages: int = N_PAGES, pages: int = 1) -> list[bytes]:
        """Frames of lane 0 of 1 with `pages` pages, valid for a memory of `n_pages`."""
        memory = np.frombuffer(os.urandom(n_pages * PAGE), np.uint8)
        seed = session_seed(self.session, self.nonce)
        encoder = Encoder(memory, Replica(n_pages, 0, 1), seed, frame_bytes=65536)
        out = np.empty(65536, np.uint8)
        made = []
        for sequence in range(count):
            last = n_pages - sequence % 8
            indices = np.arange(last - pages, last, dtype=np.uint32)
            frame = encoder.encode(indices, 0, out, round_no=1, sequence=sequence)
            made.append(out[: frame.n_bytes].tobytes())
        return made

    def close(self) -> None:
        self._context.destroy(linger=0)


def test_a_greeting_that_comes_again_is_the_same_one() -> None:
    """As a sender does whose connection ended while it greeted."""

    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            caller = HostileSender(receiver.url)
            try:
                caller.greet()
                caller.greet()
                await receiver.wait_hello()
                await receiver.accept(b"")
                caller.greet()
                caller.dealer(CONTROL_LANE).send(Ping(1).pack())
                await in_thread(caller.wait_for, MessageType.PONG)
                assert receiver.statistics().dropped_messages == 2
            finally:
                caller.close()

    run_trio(scenario)


# strangers


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


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(function, *arguments)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that notifies nobody."""
    for _ in iter(lambda: bool(condition()), True):
        await trio.sleep(0.01)


STRANGER_MESSAGES: list[list[bytes]] = [
    [b""],
    [b"\xff" * 100],
    [os.urandom(50_000)],
    [b"a", b"b", b"c"],
    [RecordMessage(0, 1, b"").pack()],
    [Ping(1).pack()],
    [b"vfpg" + bytes(100)],
    [Hello(b"X" * 16, bytes(16), 1, 1 << 20, b"").pack()],
    [Hello(bytes(16), bytes(16), 200, 1 << 20, b"").pack()],
    [Hello(bytes(16), bytes(16), 1, 1 << 20, b"").pack()[:-3]],
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
                dealer.send(Hello(bytes(16), bytes(16), 1, 1 << 20, b"").pack())
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

    monkeypatch.setattr("transport.sockets.give_back_message_memory", give_back)

    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            connection = raw_zmtp.connect(receiver.url)
            before = private_mib()
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
                watch = receiver._router._watch
                assert len(watch._connections) <= MAX_CONNECTIONS
            finally:
                for connection in connections:
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


# a member of the session


@contextmanager
def hostile_sender(url: str) -> Iterator[HostileSender]:
    hostile = HostileSender(url)
    try:
        yield hostile
    finally:
        hostile.close()


Attack = Callable[[HostileSender], None]


async def attack_receiver(
    attack: Attack,
    expected: type[TransportError],
    *,
    attached: bool = True,
    accepted: bool = True,
) -> tuple[npt.NDArray[np.uint8], str]:
    """Let `attack` act as the session's sender; the receiver must end in `expected`.

    Returns the receiver's memory and the error's text.
    """
    memory = np.zeros(N_PAGES * PAGE, np.uint8)
    # This sender does not ping, and a busy machine takes its time to load the receiver's code.
    timeout_s = 1.0 if expected is PeerLost else DEADLINE_S
    options = ReceiverOptions(peer_timeout_s=timeout_s, window_frames=4)
    async with open_receiver("tcp://127.0.0.1:*", options) as receiver:
        with hostile_sender(receiver.url) as hostile:
            hostile.greet(lanes=1, frame_bytes=16384)
            await receiver.wait_hello()
            if accepted:
                await receiver.accept(b"")
                await in_thread(hostile.wait_for, MessageType.HELLO_REPLY)
            if attached:
                receiver.attach_memory(memory)
                await in_thread(hostile.wait_for, MessageType.ATTACHED)
            await in_thread(attack, hostile)
            with pytest.raises(expected) as caught:
                while True:
                    await trio.sleep(0.01)
                    await receiver.send_record(1, b"")
            assert type(caught.value) is expected
    return memory, str(caught.value)


def say(lane: int, *messages: bytes | list[bytes]) -> Attack:
    def attack(hostile: HostileSender) -> None:
        for message in messages:
            parts = message if isinstance(message, list) else [message]
            hostile.dealer(lane).send_multipart(parts)

    return attack


def say_frames(choose: Callable[[HostileSender], list[bytes]]) -> Attack:
    return lambda hostile: say(FIRST_DATA_LANE, *choose(hostile))(hostile)


def replayed(hostile: HostileSender) -> list[bytes]:
    first, second = hostile.frames(2)
    return [first, second, first]


def skipped(hostile: HostileSender) -> list[bytes]:
    first, _, third = hostile.frames(3)
    return [first, third]


def flipped(hostile: HostileSender) -> list[bytes]:
    frame = bytearray(hostile.frames(1)[0])
    frame[len(frame) // 2] ^= 1
    return [bytes(frame)]


def of_another_seed(hostile: HostileSender) -> list[bytes]:
    hostile.nonce = bytes(16)
    return hostile.frames(1)


def too_long(hostile: HostileSender) -> list[bytes]:
    return hostile.frames(1, pages=5)  # 20 KiB, where 16 KiB were announced


def out_of_range(hostile: HostileSender) -> list[bytes]:
    return hostile.frames(1, n_pages=N_PAGES + 1)


@pytest.mark.parametrize(
    "choose", [replayed, skipped, flipped, of_another_seed, too_long, out_of_range]
)
def test_i9_a_bad_frame_ends_the_session_and_writes_nothing_more(
    choose: Callable[[HostileSender], list[bytes]],
) -> None:
    async def scenario() -> None:
        memory, _ = await attack_receiver(say_frames(choose), FrameError)
        # Of the good frames in front, which hold one page each, nothing but these pages.
        good = {replayed: 2, skipped: 1}.get(choose, 0)
        touched = memory.reshape(-1, PAGE).any(axis=1).nonzero()[0].tolist()
        assert touched == list(range(N_PAGES - good, N_PAGES))

    run_trio(scenario)


def test_i9_frames_before_there_is_memory_end_the_session() -> None:
    async def scenario() -> None:
        _, why = await attack_receiver(
            say_frames(lambda hostile: hostile.frames(1)), FrameError, attached=False
        )
        assert "before there is memory" in why

    run_trio(scenario)


def test_i9_frames_beyond_the_window_end_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = threading.Event()
    monkeypatch.setattr(
        "transport.apply.ApplyLane._handle", lambda *_: busy.wait(DEADLINE_S) and b""
    )

    async def scenario() -> None:
        async def relent() -> None:
            await trio.sleep(1)
            busy.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(relent)
            _, why = await attack_receiver(
                say_frames(lambda hostile: hostile.frames(5)), FrameError
            )
        assert "more than 4 frames" in why

    run_trio(scenario)


def test_i9_a_peer_that_takes_no_answers_is_not_answered_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handled = threading.Semaphore(0)

    def handle(*_: Any) -> bytes:
        handled.release()
        return bytes(1 << 16)

    def attack(hostile: HostileSender) -> None:
        hostile._context.setsockopt(zmq.RCVHWM, 1)
        lane = hostile.dealer(FIRST_DATA_LANE)
        lane.send(b"more")
        while handled.acquire(timeout=1):
            lane.send(b"more")

    monkeypatch.setattr("transport.apply.ApplyLane._handle", handle)

    async def scenario() -> None:
        before = private_mib()
        _, why = await attack_receiver(attack, FrameError)
        assert "does not take the answers of lane 0" in why
        assert private_mib() - before < 64

    run_trio(scenario)


@pytest.mark.parametrize(
    "attack",
    [
        say(FIRST_DATA_LANE + 1, b"vfpg" + bytes(100)),
        say(FIRST_DATA_LANE + 15, b"vfpg" + bytes(100)),
        say(FIRST_DATA_LANE, [b"vfpg" + bytes(100), b"part"]),
        say(3, b"vfpg" + bytes(100)),
        say(0xFF, b"vfpg" + bytes(100)),
    ],
    ids=["lane 1 of 1", "lane 15", "two parts", "lane -13", "lane 239"],
)
def test_i9_frames_on_a_lane_that_is_none_end_the_session(attack: Attack) -> None:
    run_trio(lambda: attack_receiver(attack, FrameError))


def compare(first: int, length: int, block_pages: int = 1) -> bytes:
    return Compare(0, block_pages, np.array([[first, length]], np.uint32)).pack()


@pytest.mark.parametrize(
    "attack",
    [
        say(CONTROL_LANE, b""),
        say(CONTROL_LANE, b"\xee" * 40),
        say(CONTROL_LANE, Hello(bytes(16), bytes(16), 1, 1 << 20, b"").pack()),
        say(CONTROL_LANE, HelloReply(Verdict.ACCEPTED, 4, 5000, b"").pack()),
        say(CONTROL_LANE, [Ping(1).pack(), b"part"]),
        say(CONTROL_LANE, RecordMessage(1, 1, b"").pack()),
        say(CONTROL_LANE, RecordMessage(0, 1, b"").pack(), RecordMessage(0, 1, b"").pack()),
        say(CONTROL_LANE, struct.pack("<BQHI", 3, 0, 1, 0xFFFFFFFF)),
        say(CONTROL_LANE, RecordCredit(5, 0).pack()),
        say(CONTROL_LANE, Attached(1).pack()),
        say(CONTROL_LANE, Ack(0, NO_PAGES).pack()),
        say(
            CONTROL_LANE,
            *[
                RecordMessage(n, 1, bytes(1 << 20)).pack()
                for n in range(1 + (RECORD_WINDOW_BYTES >> 20))
            ],
        ),
        say(TUNNEL_LANE, b""),
        say(TUNNEL_LANE, TunnelHead(0).pack()),
        say(TUNNEL_LANE, [TunnelHead(0).pack(), b""]),
        say(TUNNEL_LANE, [TunnelHead(1).pack(), b"1"]),
        say(TUNNEL_LANE, [TunnelHead(0).pack(), b"1", b"2"]),
        say(TUNNEL_LANE, [TunnelHead(0).pack(), bytes(300_000)]),
        say(TUNNEL_LANE, [TunnelEof(0).pack(), b"1"]),
        say(TUNNEL_LANE, TunnelEof(7).pack()),
        say(TUNNEL_LANE, TunnelEof(0).pack(), [TunnelHead(0).pack(), b"1"]),
        say(TUNNEL_LANE, TunnelCredit(1, 0).pack()),
        say(
            TUNNEL_LANE,
            *[
                [TunnelHead(n << 18).pack(), bytes(1 << 18)]
                for n in range(1 + (TUNNEL_WINDOW_BYTES >> 18))
            ],
        ),
        say(FIRST_DATA_LANE, b""),
        say(FIRST_DATA_LANE, b"nonsense"),
        say(FIRST_DATA_LANE, Ack(0, NO_PAGES).pack()),
        say(FIRST_DATA_LANE, compare(0, N_PAGES + 1)),
        say(FIRST_DATA_LANE, compare(0xFFFFFF00, 0x100)),
        say(FIRST_DATA_LANE, compare(N_PAGES, 256, 256)),
        say(FIRST_DATA_LANE, Digest(0, N_PAGES - 1, 2).pack()),
        say(FIRST_DATA_LANE, Digest(0, 0xFFFFFFFF, 16384).pack()),
        say(FIRST_DATA_LANE, Digest(0, 0, 16384).pack()),
    ],
)
def test_i9_a_member_that_breaks_the_rules_ends_the_session(attack: Attack) -> None:
    run_trio(lambda: attack_receiver(attack, RecordError))


@pytest.mark.parametrize("lane", [TUNNEL_LANE, FIRST_DATA_LANE], ids=["tunnel", "frames"])
def test_i9_a_sender_that_does_not_wait_for_the_answer_ends_the_session(lane: int) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            with hostile_sender(receiver.url) as hostile:
                hostile.greet()
                await receiver.wait_hello()
                hostile.dealer(lane).send(b"vfpg" + bytes(100))
                with pytest.raises(RecordError, match="does not wait"):
                    while True:
                        await receiver.wait_hello()
                        await trio.sleep(0.01)

    run_trio(scenario)


def test_i9_the_receiver_says_why_it_leaves() -> None:
    async def scenario() -> None:
        def attack(hostile: HostileSender) -> None:
            hostile.dealer(CONTROL_LANE).send(b"\xee")
            assert b"type 238" in hostile.wait_for(MessageType.BYE)

        await attack_receiver(attack, RecordError)

    run_trio(scenario)


def test_i9_a_sender_that_falls_silent_is_lost() -> None:
    run_trio(lambda: attack_receiver(lambda hostile: None, PeerLost, attached=False))


def test_i9_a_sender_that_reads_nothing_costs_no_memory() -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            with hostile_sender(receiver.url) as hostile:
                hostile.dealer(CONTROL_LANE).set(zmq.RCVHWM, 1)
                hostile.greet()
                await receiver.wait_hello()
                await receiver.accept(b"")
                before = private_mib()

                def flood() -> None:
                    for stamp in range(50_000):
                        hostile.dealer(CONTROL_LANE).send(Ping(stamp).pack())

                await in_thread(flood)
                assert private_mib() - before < 64

    run_trio(scenario)
