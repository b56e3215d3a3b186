"""A ROUTER that several threads use: nothing is lost, and nobody waits for a notice that was taken
away."""

import select
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zmq

from transport.shared_router import SharedRouter
from transport.sockets import Wakeup, Watch, bind, open_router

WAIT_S = 20


@dataclass
class Bench:
    context: zmq.Context[zmq.Socket[bytes]]
    url: str
    shared: SharedRouter
    arrived: Wakeup
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

    def wait(self, seconds: float = WAIT_S) -> set[int]:
        """As the receiving thread does: which descriptors say something."""
        return set(select.select([self.shared.fd, self.arrived], [], [], seconds)[0])

    def receive(self) -> list[bytes]:
        """The next message, however long it takes."""
        while (message := self.shared.receive()) is None:
            assert self.wait(), "a message was missed, or never came"
            self.arrived.clear()
        return [part.bytes for part in message]


@pytest.fixture
def bench() -> Iterator[Bench]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    arrived = Wakeup()
    router = open_router(context, None)
    watch = Watch(router)
    bound = bind(router, "tcp://127.0.0.1:*")
    shared = SharedRouter(router, arrived)
    made = Bench(context, bound.url, shared, arrived, watch)
    yield made
    made.close()
    context.destroy(linger=0)
    arrived.close()


def test_who_sends_says_that_a_message_has_arrived_of_which_it_took_the_notice(
    bench: Bench,
) -> None:
    with bench.dealer(b"a") as dealer:
        dealer.send(b"first")
        assert bench.receive() == [b"a", b"first"]
        assert bench.shared.receive() is None
        dealer.send(b"second")
        assert bench.wait() == {bench.shared.fd}
        assert bench.shared.send((b"a", b"answer")) == 0
        assert bench.wait() >= {bench.arrived}
        assert bench.shared.receive() is not None


def test_every_message_arrives_and_is_answered_whoever_sends(bench: Bench) -> None:
    """Four peers of one message under way each, answered by four threads; the receiving one polls
    without a limit of time, so a lost notice would end the test."""
    rounds = 300
    names = [bytes([number]) for number in range(65, 69)]
    todo: list[threading.Semaphore] = [threading.Semaphore(0) for _ in names]

    def ask(name: bytes) -> None:
        with bench.dealer(name) as dealer:
            for number in range(rounds):
                dealer.send(b"%d" % number)
                if dealer.recv() != b"answer %d" % number:
                    return

    def answer(which: int) -> None:
        for number in range(rounds):
            if not todo[which].acquire(timeout=WAIT_S):
                return
            bench.shared.send((names[which], b"answer %d" % number))

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
    threads += [threading.Thread(target=answer, args=(each,), daemon=True) for each in range(4)]
    for thread in threads:
        thread.start()
    seen: Counter[bytes] = Counter()
    for _ in range(rounds * len(names)):
        name, said = bench.receive()
        assert said == b"%d" % seen[name]
        seen[name] += 1
        todo[names.index(name)].release()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
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
