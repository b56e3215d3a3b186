"""A sender that means harm, for the tests of what a receiver makes of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import trio
import zmq

from transport.sending.encoder import Encoder
from transport.sending.replica import Replica
from transport.wire.records import CONTROL_LANE, MessageType, SessionHello, routing_id, session_seed

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
            SessionHello(self.session, self.nonce, lanes, frame_bytes, b"").pack()
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


@contextmanager
def hostile_sender(url: str) -> Iterator[HostileSender]:
    hostile = HostileSender(url)
    try:
        yield hostile
    finally:
        hostile.close()


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(function, *arguments)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that notifies nobody."""
    for _ in iter(lambda: bool(condition()), True):
        await trio.sleep(0.01)
