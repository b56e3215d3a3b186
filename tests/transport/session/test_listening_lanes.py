"""Lanes of a receiver that have nothing to apply hear what arrives, for all of the session."""

import select
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
import trio
import zmq

from tests.transport.running import run_trio
from transport.receiver import ReceiverOptions
from transport.receiving import apply
from transport.receiving.apply import ApplyLane
from transport.sender import SenderOptions
from transport.session.channels import Conversation
from transport.session.link import Closing, Shared
from transport.session.router import Router
from transport.session.sockets import Wakeup
from transport.wire.records import FIRST_DATA_LANE, routing_id

PAGE = 4096
DEADLINE_S = 20
PATIENT = 60.0
"""No side looks at the other by itself before the test has failed."""


class TakenNotice:
    """A ROUTER's messages, each of which arrives while the one before is answered: then libzmq's
    descriptor says nothing, since whoever sends takes the notice away."""

    def __init__(self, messages: list[bytes]) -> None:
        self.first = Wakeup()
        self.first.set()
        self.fd = self.first.fileno()
        self.arrived = deque(messages[:1])
        self.still_to_come = deque(messages[1:])
        self.answers: list[bytes] = []
        self.all_answered = threading.Event()
        self.lane: ApplyLane | None = None

    def hear(self) -> None:
        self.first.clear()
        while self.arrived and self.lane is not None:
            self.lane.submit(zmq.Frame(self.arrived.popleft()))

    def send_answer(self, lane: int, answer: bytes) -> None:
        assert lane == 0
        self.answers.append(answer)
        if not self.still_to_come:
            self.all_answered.set()
        else:
            self.arrived.append(self.still_to_come.popleft())


def test_a_lane_that_has_answered_hears_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ApplyLane, "_handle", lambda _self, message, _decoder: bytes(message))

    async def scenario() -> None:
        talk = Conversation(now=0.0, peer_timeout_s=PATIENT, pings=False)
        shared = Shared(talk, linger_s=0.0)
        messages = TakenNotice([b"first", b"second", b"third"])
        lane = ApplyLane(
            shared,
            np.zeros(PAGE, np.uint8),
            seed=1,
            lane=0,
            lanes=1,
            window_frames=1,
            frame_bytes=1 << 16,
            messages=messages,
        )
        messages.lane = lane
        lane.start()
        try:
            assert await trio.to_thread.run_sync(messages.all_answered.wait, DEADLINE_S)
            assert messages.answers == [b"first", b"second", b"third"]
        finally:
            shared.start_closing(Closing.DROP)
            await trio.to_thread.run_sync(lane.join)
            shared.close()
            messages.first.close()

    run_trio(scenario)


def test_what_is_no_data_arrives_although_every_lane_is_held_up(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_up, go_on = threading.Barrier(3), threading.Event()
    handle = apply.ApplyLane._handle

    def late(*arguments: Any) -> bytes:
        held_up.wait(DEADLINE_S)
        go_on.wait(DEADLINE_S)
        return handle(*arguments)

    async def scenario() -> None:
        async with link_pair(n_pages=1000) as pair:
            monkeypatch.setattr(apply.ApplyLane, "_handle", late)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.sender.send_round, np.arange(1000, dtype=np.uint32), 0)
                await trio.to_thread.run_sync(held_up.wait, DEADLINE_S)
                monkeypatch.setattr(apply.ApplyLane, "_handle", handle)
                await pair.sender.send_record(1, b"heard", flush=True)
                assert (await pair.receiver.receive_record()).payload == b"heard"
                go_on.set()

    run_trio(scenario)


def test_what_a_lane_has_heard_for_others_is_answered_at_once(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the thread that answers would have looked by itself."""
    monkeypatch.setattr("transport.session.router.WATCH_S", PATIENT)

    async def scenario() -> None:
        async with link_pair(
            n_pages=10,
            sending=SenderOptions(peer_timeout_s=PATIENT),
            receiving=ReceiverOptions(peer_timeout_s=PATIENT),
        ) as pair:
            await pair.sender.verify()
            for _ in range(3):
                await pair.sender.send_record(1, b"", flush=True)
                await pair.receiver.receive_record()

    run_trio(scenario)


def test_a_lane_that_stops_before_it_has_heard_everything_has_another_thread_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what is left the descriptor says nothing."""
    monkeypatch.setattr("transport.session.router.BATCH_MESSAGES", 1)

    async def scenario() -> None:
        talk = Conversation(now=0.0, peer_timeout_s=PATIENT, pings=False)
        shared = Shared(talk, linger_s=0.0)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        url = "tcp://127.0.0.1:*"
        router = Router(
            shared, context, url, peer_timeout_s=PATIENT, window_frames=4, secret=None
        )  # its thread is never started: whoever is to go on can be seen to be told
        router._look_around = False
        with context.socket(zmq.DEALER) as stranger:
            stranger.set(zmq.ROUTING_ID, routing_id(FIRST_DATA_LANE, bytes(16)))
            stranger.connect(router.url)
            for _ in range(2):
                stranger.send(b"")
            while router.dropped < 2:
                before = router.dropped
                assert select.select([router.fd, shared.wakeup], [], [], DEADLINE_S)[0]
                shared.wakeup.clear()
                router.hear()
                told = bool(select.select([shared.wakeup], [], [], 0)[0])
                assert told == (router.dropped > before)
        shared.start_closing(Closing.DROP)
        router.run()
        context.destroy(linger=0)
        shared.close()

    run_trio(scenario)
