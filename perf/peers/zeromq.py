"""Bare ZeroMQ connections: bytes to a process that drops them and answers. A limit, not a peer."""

import os
from contextlib import ExitStack

import zmq

from perf.processes import Cost, Stopwatch, child

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
    ) -> None:
        """Starts the process, which binds `url` and ends with `stack`. `n_bytes`: of each round."""
        self._messages = n_bytes // message_bytes
        self._data = os.urandom(message_bytes)
        party = stack.enter_context(
            child("perf.parties.receivers", "bare", url, str(self._messages))
        )
        self._process = party.pid
        context = stack.enter_context(zmq.Context())
        self._poller = zmq.Poller()
        self._dealers = [context.socket(zmq.DEALER) for _ in range(lanes)]
        bound = party.line()
        for dealer in self._dealers:
            stack.callback(dealer.close, linger=0)
            dealer.set(zmq.SNDHWM, 8)
            dealer.connect(bound)
            self._poller.register(dealer, zmq.POLLIN)

    def round(self) -> Cost:
        """From the first message to the answer to the last."""
        watch = Stopwatch(os.getpid(), self._process)
        for number in range(self._messages):
            dealer = self._dealers[number % len(self._dealers)]
            dealer.send(self._data, copy=False, track=True)
        [(answered, _)] = self._poller.poll()
        answered.recv()
        return watch.stop()
