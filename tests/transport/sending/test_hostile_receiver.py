"""I9: receivers that speak raw ZeroMQ, or raw TCP, and mean harm to our sender.

For hostile senders see `test_hostile_peer`.
"""

import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import trio
import zmq

from tests.transport.running import run_trio
from transport.sender import Sender, SenderOptions, open_sender
from transport.wire.errors import PeerClosed, PeerLost, PeerUnreachable, RecordError, TransportError
from transport.wire.records import (
    FIRST_DATA_LANE,
    LANE_WELCOME,
    TUNNEL_LANE,
    Ack,
    Attached,
    Bye,
    CompareReply,
    DigestReply,
    HelloReply,
    LaneHello,
    MessageType,
    Ping,
    Pong,
    RecordCredit,
    RecordMessage,
    SessionHello,
    TunnelCredit,
    TunnelEof,
    TunnelHead,
    Verdict,
)

PAGE = 4096
N_PAGES = 64
DEADLINE_S = 20
NO_PAGES = np.empty(0, np.uint32)


class HostileReceiver(threading.Thread):
    """A ROUTER that answers each message with what `answer(identity, message)` gives.

    It gives a list of (identity, parts of the message).
    """

    def __init__(self, answer: Callable[[bytes, bytes], list[tuple[bytes, list[bytes]]]]) -> None:
        super().__init__(daemon=True)
        self._answer = answer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.LINGER, 0)
        self._router.set(zmq.SNDHWM, 10)
        port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self.url = f"tcp://127.0.0.1:{port}"
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            if not self._router.poll(10):
                continue
            identity, *parts = self._router.recv_multipart()
            if parts == [LaneHello(0).pack()]:
                self._router.send_multipart([identity, LANE_WELCOME], zmq.NOBLOCK)
                continue
            for target, reply in self._answer(identity, parts[0]):
                self._router.send_multipart([target, *reply], zmq.NOBLOCK)
        self._context.destroy(linger=0)

    @contextmanager
    def running(self) -> Iterator[str]:
        self.start()
        try:
            yield self.url
        finally:
            self._over.set()
            self.join()


def accept(identity: bytes) -> list[tuple[bytes, list[bytes]]]:
    return [(identity, [HelloReply(Verdict.ACCEPTED, 4, 5000, 0, b"").pack()])]


class Script:
    """Plays a receiver that accepts, attaches, answers pings and then does one thing wrong."""

    def __init__(
        self,
        *,
        on_frame: Callable[[int], list[bytes]] = lambda sequence: [],
        on_request: Callable[[bytes], list[bytes]] = lambda message: [],
        after_accept: list[list[bytes]] | None = None,
        on_tunnel: list[list[bytes]] | None = None,
        pongs: bool = True,
    ) -> None:
        self._on_frame = on_frame
        self._on_request = on_request
        self._after_accept = after_accept or []
        self._on_tunnel = on_tunnel or []
        self._pongs = pongs

    def __call__(self, identity: bytes, message: bytes) -> list[tuple[bytes, list[bytes]]]:
        if identity[0] == TUNNEL_LANE:
            return [(identity, parts) for parts in self._on_tunnel]
        if identity[0] >= FIRST_DATA_LANE:
            if message[:4] == b"vfpg":
                replies = self._on_frame(struct.unpack_from("<Q", message, 16)[0])
            else:
                replies = self._on_request(message)
            return [(identity, [reply]) for reply in replies]
        if message[0] == MessageType.HELLO:
            attached = [(identity, [Attached(N_PAGES).pack()])]
            return accept(identity) + attached + [(identity, say) for say in self._after_accept]
        if message[0] == MessageType.PING and self._pongs:
            return [(identity, [Pong(Ping.unpack(message).value).pack()])]
        return []


async def attack_sender(
    script: Callable[[bytes, bytes], list[tuple[bytes, list[bytes]]]],
    act: Callable[[Sender], Awaitable[Any]],
    expected: type[TransportError],
) -> None:
    """A sender of ours meets `script` and does `act`; it must end in `expected`, and not hang."""
    lost = expected is PeerLost
    options = SenderOptions(
        lanes=1,
        connect_timeout_s=1.0 if expected is PeerUnreachable else DEADLINE_S,
        peer_timeout_s=1.0 if lost else DEADLINE_S,
        progress_timeout_s=0.5 if lost else DEADLINE_S,
    )
    with HostileReceiver(script).running() as url, pytest.raises(expected) as caught:
        async with open_sender(url, os.urandom(16), b"", options) as sender:
            sender.attach_memory(np.full(N_PAGES * PAGE, 3, np.uint8))
            await act(sender)
    assert type(caught.value) is expected


async def one_round(sender: Sender) -> None:
    await sender.send_round(np.arange(N_PAGES, dtype=np.uint32), 1)


async def listen(sender: Sender) -> None:
    while True:
        await sender.receive_record()


async def compare_all(sender: Sender) -> None:
    await sender.verify()


async def digest_all(sender: Sender) -> None:
    await sender.compare_regions([(0, N_PAGES)])


async def use_tunnel(sender: Sender) -> None:
    await sender.tunnel_send(b"hello")
    while True:
        await sender.tunnel_receive()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\xee" * 50,
        HelloReply(Verdict.ACCEPTED, 4, 5000, 0, b"").pack()[:-1],
        HelloReply(Verdict.ACCEPTED, 0, 5000, 0, b"").pack(),
        HelloReply(Verdict.ACCEPTED, 255, 5000, 0, b"").pack(),
        HelloReply(Verdict.ACCEPTED, 4, 1, 0, b"").pack(),
        HelloReply(Verdict.ACCEPTED, 4, 5000, 0, bytes((1 << 20) + 1)).pack(),
        SessionHello(bytes(16), bytes(16), 1, 1 << 20, b"").pack(),
    ],
)
def test_i9_nonsense_as_answer_to_the_greeting_is_a_typed_error(reply: bytes) -> None:
    run_trio(lambda: attack_sender(lambda identity, _: [(identity, [reply])], listen, RecordError))


def test_i9_a_receiver_that_never_answers_is_unreachable() -> None:
    run_trio(lambda: attack_sender(lambda *_: [], listen, PeerUnreachable))


@pytest.mark.parametrize(
    "said",
    [
        [b""],
        [b"\xee" * 50],
        [RecordMessage(0, 1, b"").pack(), b"part"],
        [RecordMessage(5, 1, b"").pack()],
        [HelloReply(Verdict.ACCEPTED, 4, 5000, 0, b"").pack()],
        [Attached(N_PAGES).pack()],
        [RecordCredit(1, 0).pack()],
        [RecordCredit(0, 1 << 60).pack()],
    ],
)
def test_i9_nonsense_on_the_control_lane_is_a_typed_error(said: list[bytes]) -> None:
    run_trio(lambda: attack_sender(Script(after_accept=[said]), listen, RecordError))


@pytest.mark.parametrize(
    "said",
    [
        [b""],
        [b"\xee" * 50],
        [TunnelHead(3).pack(), b"x"],
        [TunnelHead(0).pack(), bytes(300_000)],
        [TunnelCredit(1000, 0).pack()],
        [TunnelCredit(5, 6).pack()],
        [TunnelEof(1).pack()],
        [TunnelHead(0).pack(), b"x", b"y"],
    ],
)
def test_i9_nonsense_on_the_tunnel_is_a_typed_error(said: list[bytes]) -> None:
    run_trio(lambda: attack_sender(Script(on_tunnel=[said]), use_tunnel, RecordError))


def compare_reply(request: int, n_digests: int) -> bytes:
    return CompareReply(request, np.zeros(n_digests, np.uint64)).pack()


@pytest.mark.parametrize(
    "answers",
    [
        [b""],
        [b"\xee" * 50],
        [Ack(1, NO_PAGES).pack()],
        [Ack(1 << 63, NO_PAGES).pack()],
        [Ack(0, np.array([N_PAGES], np.uint32)).pack()],
        [Ack(0, NO_PAGES).pack(), Ack(0, NO_PAGES).pack()],
        [struct.pack("<BQI", 32, 0, 0xFFFFFFFF)],
        [compare_reply(0, 1)],
        [DigestReply(0, bytes(32)).pack()],
    ],
)
def test_i9_a_false_acknowledgement_is_a_typed_error(answers: list[bytes]) -> None:
    async def rounds(sender: Sender) -> None:
        await one_round(sender)
        await listen(sender)  # an answer too many may come when the round is over

    script = Script(on_frame=lambda _: answers)
    run_trio(lambda: attack_sender(script, rounds, RecordError))


def test_i9_pages_rejected_again_and_again_are_a_typed_error() -> None:
    script = Script(on_frame=lambda sequence: [Ack(sequence, np.array([1, 2], np.uint32)).pack()])
    run_trio(lambda: attack_sender(script, one_round, RecordError))


def test_i9_acknowledgements_that_never_come_are_a_loss() -> None:
    run_trio(lambda: attack_sender(Script(), one_round, PeerLost))


@pytest.mark.parametrize(
    "answers",
    [
        [b""],
        [compare_reply(1, 1)],
        [compare_reply(0, 2)],
        [compare_reply(0, 16384)],
        [struct.pack("<BII", 34, 0, 0)],
        [struct.pack("<BII", 34, 0, 0xFFFFFFFF)],
        [struct.pack("<BIIQB", 34, 0, 1, 0, 0xFF)],
        [Ack(0, NO_PAGES).pack()],
        [DigestReply(0, bytes(32)).pack()],
    ],
)
def test_i9_a_comparison_answered_with_nonsense_is_a_typed_error(answers: list[bytes]) -> None:
    script = Script(on_request=lambda _: answers)
    run_trio(lambda: attack_sender(script, compare_all, RecordError))


@pytest.mark.parametrize(
    "answers",
    [
        [DigestReply(1, bytes(32)).pack()],
        [DigestReply(0, bytes(32)).pack()[:-1]],
        [compare_reply(0, 1)],
    ],
)
def test_i9_a_digest_answered_with_nonsense_is_a_typed_error(answers: list[bytes]) -> None:
    script = Script(on_request=lambda _: answers)
    run_trio(lambda: attack_sender(script, digest_all, RecordError))


def test_i9_a_comparison_that_is_never_answered_is_a_loss() -> None:
    run_trio(lambda: attack_sender(Script(), compare_all, PeerLost))


def test_i9_a_receiver_that_falls_silent_is_a_loss() -> None:
    run_trio(lambda: attack_sender(Script(pongs=False), listen, PeerLost))


def test_i9_a_receiver_that_leaves_with_a_strange_reason_is_quoted_printably() -> None:
    async def scenario() -> None:
        script = Script(after_accept=[[Bye("\x1b[31mred").pack()]])
        with (
            HostileReceiver(script).running() as url,
            pytest.raises(PeerClosed, match=r"\?\[31mred"),
        ):
            async with open_sender(url, os.urandom(16), b"") as sender:
                await listen(sender)

    run_trio(scenario)


def test_i9_a_receiver_whose_message_never_ends_is_cut_off(raw_zmtp: Any) -> None:
    def flood(listener: socket.socket) -> int:
        connection = raw_zmtp.accept(listener)
        # A sign of life: then it is the receiver's verdict that is waited for.
        pong = Pong(0).pack()
        connection.sendall(b"\x00" + bytes([len(pong)]) + pong)
        return int(raw_zmtp.flood_until_shut(connection))

    async def scenario() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, flood, listener)  # which ends
                with pytest.raises(PeerUnreachable):
                    options = SenderOptions(connect_timeout_s=0.5)
                    async with open_sender(url, os.urandom(16), b"", options):
                        pass

    run_trio(scenario)
