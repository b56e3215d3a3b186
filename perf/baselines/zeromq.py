"""Bare ZeroMQ connections: bytes to a process that drops them, a limit; or pages that it checks by
digest and writes to a memory, the least that a peer can do. It answers when it has all."""

import os
import select
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import trio
import xxhash
import zmq

from perf.child import Cost, Stopwatch, child
from transport.session.sockets import new_context
from transport.session.watch import ConnectionEvent, Watch
from transport.wire.frames import PAGE_BYTES

MESSAGE_BYTES = 1 << 20


class BareStream:
    """`lanes` connections over which messages go that are not copied."""

    def __init__(
        self,
        stack: ExitStack,
        url: str,
        n_bytes: int,
        lanes: int,
        message_bytes: int = MESSAGE_BYTES,
        *,
        memory_pages: int = 0,
    ) -> None:
        """Starts the process, which binds `url` and ends with `stack`. `n_bytes`: of each `round`.
        `memory_pages`: of the memory that `move` writes to, a page here and a page there; 0: none,
        for `round`."""
        self._messages = n_bytes // message_bytes
        self._data = os.urandom(message_bytes)
        # Of its own: what it took from the heap and gave back would change what is measured next.
        rooms = self._messages if memory_pages else 0
        self._room = np.zeros((rooms, -(-message_bytes // PAGE_BYTES), PAGE_BYTES), np.uint8)
        words = ("bare", url, str(self._messages), str(memory_pages))
        party = stack.enter_context(child("perf.processes.receivers", *words))
        self._process = party.pid
        context = stack.enter_context(new_context())
        self._poller = zmq.Poller()
        self._notices = stack.enter_context(select.epoll())
        self._dealers = [context.socket(zmq.DEALER) for _ in range(lanes)]
        bound = party.line()
        for dealer in self._dealers:
            stack.callback(dealer.close, linger=0)
            dealer.set(zmq.SNDHWM, 8)
            _connect(dealer, bound)
            self._poller.register(dealer, zmq.POLLIN)
            self._notices.register(int(dealer.get(zmq.FD)), select.EPOLLIN)

    def round(self) -> Cost:
        """How long a round takes: from the first message to the answer to the last."""
        watch = Stopwatch(os.getpid(), self._process)
        for number in range(self._messages):
            dealer = self._dealers[number % len(self._dealers)]
            dealer.send(self._data, copy=False, track=True)
        [(answered, _)] = self._poller.poll()
        answered.recv()
        return watch.stop()

    async def move(self, memory: npt.NDArray[np.uint8], indices: npt.NDArray[np.uint32]) -> Cost:
        """These pages of `memory`, no more than a round's: from reading the first to the answer to
        the last. For trio's thread."""
        pages = memory.reshape(-1, PAGE_BYTES)
        watch = Stopwatch(os.getpid(), self._process)
        for number, part in enumerate(np.array_split(indices, self._messages)):
            dealer = self._dealers[number % len(self._dealers)]
            room = self._room[number][: part.size]
            np.take(pages, part, axis=0, out=room, mode="clip")
            dealer.send(xxhash.xxh3_64_digest(room.data), zmq.SNDMORE)
            dealer.send(room.data, copy=False, track=True)
        while not (ready := self._poller.poll(0)):
            await trio.lowlevel.wait_readable(self._notices)
        ready[0][0].recv()
        return watch.stop()


def _connect(dealer: zmq.Socket[bytes], url: str) -> None:
    """Connects to `url`, and waits until both ends have agreed on ZMTP."""
    watch = Watch(dealer)
    dealer.connect(url)
    events: set[ConnectionEvent] = set()
    while ConnectionEvent.READY not in events:
        watch.monitor.poll()
        events.update(event for event, _ in watch.events())
    watch.close()
