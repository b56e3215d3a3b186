"""What the tests of the link share: endpoints, and a sender and receiver that have greeted."""

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import trio

from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.sender import Sender, SenderOptions, open_sender

PAGE = 4096


@dataclass
class LinkPair:
    """Both ends of a session in one process, and their memories."""

    sender: Sender
    receiver: Receiver
    source: npt.NDArray[np.uint8]
    target: npt.NDArray[np.uint8]


PairFactory = Callable[..., AbstractAsyncContextManager[LinkPair]]


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a short name: the path of a UNIX socket has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="ferry") as folder:
        yield Path(folder)


@pytest.fixture(params=["tcp", "ipc"])
def bind_url(request: pytest.FixtureRequest, socket_folder: Path) -> str:
    """A URL to bind, of every kind there is."""
    return "tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{socket_folder}/link"


@pytest.fixture
def link_pair() -> PairFactory:
    """Opens a sender and a receiver that have greeted each other and attached zeroed memories.

    With `n_pages` 0 nothing is attached.
    """

    @asynccontextmanager
    async def open_pair(
        url: str = "tcp://127.0.0.1:*",
        n_pages: int = 0,
        sending: SenderOptions | None = None,
        receiving: ReceiverOptions | None = None,
        cache_bytes: int = 1 << 20,
    ) -> AsyncIterator[LinkPair]:
        source = np.zeros(n_pages * PAGE, np.uint8)
        target = np.zeros(n_pages * PAGE, np.uint8)
        async with open_receiver(url, receiving) as receiver, trio.open_nursery() as nursery:
            accepted = trio.Event()

            async def answer() -> None:
                await receiver.wait_hello()
                await receiver.accept(b"welcome")
                if n_pages:
                    receiver.attach_memory(target)
                accepted.set()

            nursery.start_soon(answer)
            async with open_sender(receiver.url, os.urandom(16), b"hello", sending) as sender:
                if n_pages:
                    sender.attach_memory(source, cache_bytes=cache_bytes)
                await accepted.wait()
                yield LinkPair(sender, receiver, source, target)

    return open_pair
