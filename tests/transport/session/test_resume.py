"""A link that is lost and made anew, between two real ends, with a proxy that breaks it.

Each session moves pages, records and tunnel bytes in both directions at once; whatever happens to
the link, each arrives once and in order, and the memories come out equal.
"""

import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio
import trio.lowlevel
import zmq

from tests.transport.cutting_proxy import CuttingProxy
from tests.transport.hostile_sender import until
from tests.transport.running import run_trio
from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.receiving.apply import ApplyLane
from transport.sender import Sender, SenderOptions, open_sender
from transport.session import link
from transport.session.link import LinkState
from transport.wire.errors import PeerLost
from transport.wire.records import (
    CONTROL_LANE,
    MessageType,
    Position,
    Resumption,
    SessionHello,
    resume_key,
    routing_id,
)

PAGE = 4096
N_PAGES = 512
LANES = 2
WINDOW_FRAMES = 4
SECRET = bytes(range(32))


@dataclass
class Session:
    sender: Sender
    receiver: Receiver
    proxy: CuttingProxy
    session: bytes
    target: np.ndarray
    source: np.ndarray = field(default_factory=lambda: np.zeros(N_PAGES * PAGE, np.uint8))
    rounds: int = 0

    async def lost(self) -> LinkState:
        """Waits until both sides have no link; the sender's state."""
        for end in (self.sender, self.receiver):
            while not end.link.lost:
                await end.wait_link(end.link)
        return self.sender.link

    async def resumed(self, times: int = 1) -> None:
        while self.sender.link.lost or self.sender.link.resumed < times:
            await self.sender.wait_link(self.sender.link)

    async def round(self, seed: int = 0) -> None:
        """Rewrites some of the memory and sends it."""
        self.rounds += 1
        pages = self.source.reshape(-1, PAGE)
        rng = np.random.default_rng(seed + self.rounds)
        which = np.sort(rng.choice(N_PAGES, N_PAGES // 3, replace=False)).astype(np.uint32)
        pages[which, : 64 * self.rounds % PAGE + 1] = rng.integers(0, 256, dtype=np.uint8)
        pages[which[::3]] = rng.integers(0, 256, (which[::3].size, PAGE), np.uint8)
        await self.sender.send_round(which, self.rounds)

    async def assert_equal(self) -> None:
        assert not (await self.sender.verify()).size
        assert np.array_equal(self.source, self.target)


@asynccontextmanager
async def sessions(
    *,
    secret: bytes | None = None,
    window_s: float = 30.0,
    receiver_window_s: float = 30.0,
    peer_timeout_s: float = 20.0,
) -> AsyncIterator[Session]:
    """A session that is held, over a proxy."""
    name = os.urandom(16)
    to_send = SenderOptions(
        lanes=LANES,
        frame_bytes=64 << 10,
        secret=secret,
        peer_timeout_s=peer_timeout_s,
        resume_window_s=window_s,
        connect_timeout_s=5.0,
    )
    to_receive = ReceiverOptions(
        secret=secret,
        peer_timeout_s=peer_timeout_s,
        resume_window_s=receiver_window_s,
        window_frames=WINDOW_FRAMES,
    )
    async with (
        trio.open_nursery() as nursery,
        open_receiver("tcp://127.0.0.1:*", to_receive) as receiver,
    ):
        proxy = CuttingProxy(int(receiver.url.rpartition(":")[2]))
        await nursery.start(proxy.serve)

        target = np.zeros(N_PAGES * PAGE, np.uint8)

        async def accept() -> None:
            await receiver.wait_hello()
            await receiver.accept(b"")
            receiver.attach_memory(target)

        nursery.start_soon(accept)
        async with open_sender(f"tcp://127.0.0.1:{proxy.port}", name, b"", to_send) as sender:
            session = Session(sender, receiver, proxy, name, target)
            sender.attach_memory(session.source)
            sender.hold()
            await session.round()
            yield session
            sender.release()
        nursery.cancel_scope.cancel()


async def exchange(session: Session, records: int = 200, tunnel_bytes: int = 300_000) -> None:
    """Records and tunnel bytes in both directions, at once, and their ends."""

    async def say(end: Sender | Receiver) -> None:
        for number in range(records):
            await end.send_record(number, number.to_bytes(4, "little") * (number % 50))
            await trio.lowlevel.checkpoint()

    async def hear(end: Sender | Receiver) -> None:
        for number in range(records):
            record = await end.receive_record()
            assert (record.kind, record.payload) == (
                number,
                number.to_bytes(4, "little") * (number % 50),
            )

    async def pour(end: Sender | Receiver, seed: int) -> None:
        data = random.Random(seed).randbytes(tunnel_bytes)
        for at in range(0, tunnel_bytes, 7000):
            await end.tunnel_send(data[at : at + 7000])
            await trio.lowlevel.checkpoint()
        await end.tunnel_send_eof()

    async def drink(end: Sender | Receiver, seed: int) -> None:
        got = bytearray()
        while data := await end.tunnel_receive():
            got += data
        assert bytes(got) == random.Random(seed).randbytes(tunnel_bytes)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(say, session.sender)
        nursery.start_soon(hear, session.receiver)
        nursery.start_soon(say, session.receiver)
        nursery.start_soon(hear, session.sender)
        nursery.start_soon(pour, session.sender, 1)
        nursery.start_soon(drink, session.receiver, 1)
        nursery.start_soon(pour, session.receiver, 2)
        nursery.start_soon(drink, session.sender, 2)


def more_carried(proxy: CuttingProxy, than: int) -> bool:
    return proxy.carried_bytes > than


def more_dropped(receiver: Receiver, than: int) -> bool:
    return receiver.statistics().dropped_messages > than


def run(body: Callable[[Session], Awaitable[None]], **how: object) -> None:
    async def main() -> None:
        async with sessions(**how) as session:  # type: ignore[arg-type]
            await body(session)

    run_trio(main, 60.0)


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "encrypted"])
def test_i3_a_link_that_is_cut_again_and_again_loses_and_repeats_nothing(
    secret: bytes | None,
) -> None:
    async def body(session: Session) -> None:
        rng = random.Random(7)
        cuts = 0

        async def cut() -> None:
            nonlocal cuts
            while cuts < 25:
                # All of them or one of them, also while it is being made anew.
                await trio.sleep(rng.random() * 0.1)
                cuts += session.proxy.cut(None if rng.random() < 0.5 else rng)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            nursery.start_soon(exchange, session)
            while cuts < 25:
                await session.round()
        await session.round()
        await session.assert_equal()
        state = session.sender.link
        totals = session.sender.statistics()
        assert 1 <= state.resumed <= cuts
        # What went twice is at most what was under way at each cut.
        assert totals.lost_messages <= cuts * LANES * WINDOW_FRAMES

    run(body, secret=secret)


def test_what_comes_when_libzmq_has_connected_anew_is_not_taken_for_the_same_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Longer than libzmq needs to connect.
    monkeypatch.setattr(link, "GRACE_S", 0.3)

    async def body(session: Session) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange, session, 200, 12_000_000)
            for times in range(1, 5):
                carried = session.proxy.carried_bytes
                nursery.start_soon(session.round)
                await until(partial(more_carried, session.proxy, carried + 1_000_000))
                session.proxy.cut()
                await session.resumed(times)
        await session.round()
        await session.assert_equal()

    run(body)


def test_a_silent_link_is_left_and_made_anew() -> None:
    async def body(session: Session) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange, session)
            session.proxy.fall_silent()
            await session.round()
        assert session.sender.link.resumed >= 1
        await session.assert_equal()

    run(body, peer_timeout_s=0.5)


def test_nothing_goes_twice_that_was_answered() -> None:
    async def body(session: Session) -> None:
        everything = np.arange(N_PAGES, dtype=np.uint32)
        await session.sender.send_round(everything, 8)
        frames = session.sender.statistics().lane_messages
        session.proxy.cut()
        await session.resumed()
        again = await session.sender.send_round(everything, 9)
        assert again.same == N_PAGES and not again.sent_pages
        assert session.sender.statistics().lane_messages == frames

    run(body)


def test_i3_a_lane_goes_on_when_it_has_applied_what_it_had_got_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_apply = threading.Event()
    may_apply.set()
    handle = ApplyLane._handle

    def wait_and_handle(lane: ApplyLane, *frame: Any) -> bytes:
        assert may_apply.wait(60)
        return handle(lane, *frame)

    monkeypatch.setattr(ApplyLane, "_handle", wait_and_handle)

    async def body(session: Session) -> None:
        may_apply.clear()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.round)
                lanes = session.receiver._lanes
                await until(lambda: not all(lane.idle for lane in lanes))
                session.proxy.cut()
                while not session.receiver.link.resumed:
                    await session.receiver.wait_link(session.receiver.link)
                # Its connections are there; but it has still older frames than might come.
                await until(lambda: len(session.receiver._router._lane_fds) == LANES + 1)
                assert session.sender.link.lost
                may_apply.set()
        finally:
            may_apply.set()
        await session.assert_equal()

    run(body)


def test_a_stranger_in_the_window_is_not_let_in_and_does_not_disturb() -> None:
    async def body(session: Session) -> None:
        session.proxy.shut = True
        session.proxy.cut()
        await session.lost()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        resume = Resumption(MessageType.RESUME, 1000, Position(0, 0, False))
        said: list[tuple[bytes, int, bytes | None]] = [
            (os.urandom(16), 0, None),
            # One that knows the session's name, and nothing else of it.
            (session.session, 1000, resume.pack(resume_key(session.session, bytes(16)))),
            (session.session, 1001, b"\x0c"),
            (session.session, 0, b"\x05" + bytes(8)),
        ]
        try:
            for name, number, words in said:
                stranger = context.socket(zmq.DEALER)
                stranger.set(zmq.ROUTING_ID, routing_id(CONTROL_LANE, name, number))
                stranger.connect(session.receiver.url)
                hello = SessionHello(name, os.urandom(16), 1, 1 << 20, b"")
                dropped = session.receiver.statistics().dropped_messages
                stranger.send(hello.pack() if words is None else words)
                await until(partial(more_dropped, session.receiver, dropped))
        finally:
            await trio.to_thread.run_sync(lambda: context.destroy(linger=0))
        assert session.receiver.link.lost
        session.proxy.shut = False
        await session.round()
        await session.assert_equal()

    run(body)


def test_a_link_that_does_not_come_back_ends_the_session_on_both_sides() -> None:
    async def body(session: Session) -> None:
        session.proxy.shut = True
        session.proxy.cut()
        for end in (session.sender, session.receiver):
            with pytest.raises(PeerLost, match="could not be made anew"):
                await end.receive_record()
        with pytest.raises(PeerLost):
            await session.sender.send_round(np.arange(9, dtype=np.uint32), 3)

    run(body, window_s=0.5)


def test_once_it_is_released_a_lost_link_ends_the_session_at_once() -> None:
    async def body(session: Session) -> None:
        session.sender.release()
        await session.sender.send_record(1, b"", flush=True)
        await session.receiver.receive_record()
        session.proxy.cut()
        for end in (session.sender, session.receiver):
            with pytest.raises(PeerLost, match="has ended"):
                await end.receive_record()

    run(body)


def test_a_session_that_is_released_while_it_has_no_link_is_over() -> None:
    async def body(session: Session) -> None:
        session.proxy.shut = True
        session.proxy.cut()
        await session.lost()
        session.sender.release()
        with pytest.raises(PeerLost, match="could not be made anew"):
            await session.sender.receive_record()

    run(body)


@pytest.mark.parametrize("which", ["window_s", "receiver_window_s"])
def test_a_side_that_does_not_wait_for_a_link_is_heeded(which: str) -> None:
    async def body(session: Session) -> None:
        session.proxy.cut()
        for end in (session.sender, session.receiver):
            with pytest.raises(PeerLost, match="has ended"):
                await end.receive_record()

    run(body, **{which: 0.0})


def test_a_receiver_that_was_started_anew_is_not_resumed_and_says_so() -> None:
    async def body(session: Session) -> None:
        session.proxy.shut = True
        session.proxy.cut()
        await session.lost()
        async with open_receiver("tcp://127.0.0.1:*") as another:
            session.proxy.to(int(another.url.rpartition(":")[2]))
            session.proxy.shut = False
            with pytest.raises(PeerLost, match="does not know this session"):
                await session.sender.receive_record()

    run(body)
