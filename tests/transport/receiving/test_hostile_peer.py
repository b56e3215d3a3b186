"""I9: peers of a session that speak raw ZeroMQ and mean harm.

Here it is the sender that is hostile; for the receiver see `test_hostile_receiver`, for those that
belong to no session `test_hostile_strangers`. Each test ends in a typed error on our side, never in
a hang, a write outside what was allowed, or memory beyond the limits.
"""

import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
import zmq

from tests.transport.hostile_sender import (
    DEADLINE_S,
    N_PAGES,
    NO_PAGES,
    PAGE,
    HostileSender,
    hostile_sender,
    in_thread,
    private_mib,
)
from tests.transport.running import run_trio
from transport.receiver import ReceiverOptions, open_receiver
from transport.session.channels import RECORD_WINDOW_BYTES, TUNNEL_WINDOW_BYTES
from transport.wire.errors import FrameError, PeerLost, RecordError, TransportError
from transport.wire.records import (
    CONTROL_LANE,
    FIRST_DATA_LANE,
    TUNNEL_LANE,
    Ack,
    Attached,
    Compare,
    Digest,
    HelloReply,
    MessageType,
    Ping,
    RecordCredit,
    RecordMessage,
    SessionHello,
    TunnelCredit,
    TunnelEof,
    TunnelHead,
    Verdict,
)


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
        good = 2 if choose is replayed else 1 if choose is skipped else 0
        touched = np.flatnonzero(memory.reshape(-1, PAGE).any(axis=1)).tolist()
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
        "transport.receiving.apply.ApplyLane._handle", lambda *_: busy.wait(DEADLINE_S) and b""
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

    monkeypatch.setattr("transport.receiving.apply.ApplyLane._handle", handle)

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
        say(CONTROL_LANE, SessionHello(bytes(16), bytes(16), 1, 1 << 20, b"").pack()),
        say(CONTROL_LANE, HelloReply(Verdict.ACCEPTED, 4, 5000, 0, b"").pack()),
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
                with pytest.raises(RecordError, match="LANE does not belong"):
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
