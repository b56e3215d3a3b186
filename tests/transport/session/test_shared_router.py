"""A ROUTER that several threads use: nothing is lost, and nobody waits for a notice that was taken
away."""

import os
import select
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zmq

from transport.session.shared_router import SharedRouter
from transport.session.sockets import bind, open_router
from transport.session.watch import Watch

WAIT_S = 20


@dataclass
class Bench:
    context: zmq.Context[zmq.Socket[bytes]]
    url: str
    shared: SharedRouter
    watch: Watch
    closed: bool = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.shared.close(self.watch, 0)

    def dealer(self, name: bytes) -> zmq.Socket[bytes]:
        dealer = self.context.socket(zmq.DEALER)
        dealer.set(zmq.ROUTING_ID, name)
        dealer.set(zmq.RCVTIMEO, WAIT_S * 1000)
        dealer.connect(self.url)
        return dealer

    def receive(self) -> list[bytes]:
        """The next message, however long it takes."""
        while (message := self.shared.receive()) is None:
            ready, _, _ = select.select([self.shared.fd], [], [], WAIT_S)
            assert ready, "a message was missed, or never came"
        return [part.bytes for part in message]


@pytest.fixture
def bench() -> Iterator[Bench]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = open_router(context, None)
    watch = Watch(router)
    bound = bind(router, "tcp://127.0.0.1:*")
    shared = SharedRouter(router)
    made = Bench(context, bound.url, shared, watch)
    yield made
    made.close()
    context.destroy(linger=0)


def test_who_sends_takes_the_notice_of_what_has_arrived_and_finds_it(bench: Bench) -> None:
    with bench.dealer(b"a") as dealer:
        dealer.send(b"first")
        assert bench.receive() == [b"a", b"first"]
        assert bench.shared.receive() is None
        dealer.send(b"second")
        assert select.select([bench.shared.fd], [], [], WAIT_S)[0]
        assert bench.shared.send((b"a", b"answer")) == 0
        assert bench.shared.receive() is not None


def test_every_message_arrives_and_is_answered_whoever_receives_and_sends(bench: Bench) -> None:
    """Four peers of one message under way each, and three threads that take turns. Each polls
    without a notice but the descriptor's, so a lost one would end the test."""
    rounds = 300
    names = [bytes([number]) for number in range(65, 69)]
    seen: Counter[bytes] = Counter()
    over = threading.Event()
    failed: list[str] = []

    def ask(name: bytes) -> None:
        with bench.dealer(name) as dealer:
            for number in range(rounds):
                dealer.send(b"%d" % number)
                if dealer.recv() != b"answer %d" % number:
                    failed.append("a wrong answer")

    def answer() -> None:
        while not over.is_set():
            with bench.shared.lock:
                while (message := bench.shared.receive()) is not None:
                    name, said = (part.bytes for part in message)
                    if said != b"%d" % seen[name]:
                        failed.append(f"{said!r} after {seen[name]}")
                    seen[name] += 1
                    bench.shared.send((name, b"answer " + said))
            select.select([bench.shared.fd, over_reading], [], [])

    over_reading, over_writing = os.pipe()
    peers = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
    threads = [threading.Thread(target=answer, daemon=True) for _ in range(3)]
    for thread in threads + peers:
        thread.start()
    for thread in peers:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    over.set()
    os.close(over_writing)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    os.close(over_reading)
    assert not failed
    assert set(seen.values()) == {rounds}


def test_what_cannot_be_sent_is_said(bench: Bench) -> None:
    assert bench.shared.send((b"nobody", b"")) == zmq.EHOSTUNREACH
    with bench.dealer(b"deaf") as dealer:
        dealer.send(b"")
        bench.receive()
        outcomes = {bench.shared.send((b"deaf", bytes(1 << 16))) for _ in range(2000)}
        assert outcomes == {0, zmq.EAGAIN}
    with pytest.raises(TypeError):
        bench.shared.send((b"deaf", "no bytes"))  # type: ignore[arg-type]


def test_a_closed_one_says_that_there_is_nobody(bench: Bench) -> None:
    with bench.dealer(b"a") as dealer:
        dealer.send(b"")
        bench.receive()
        bench.close()
        assert bench.shared.send((b"a", b"")) == zmq.EHOSTUNREACH
        assert bench.shared.receive() is None
