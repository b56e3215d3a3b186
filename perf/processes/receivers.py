"""Ends of the wire: `python -m perf.processes.receivers pages|bare URL NUMBER...`.

`pages URL PAGES [SECRET]` is this project's receiver for a guest of so many pages, the secret in
hexadecimal. `bare URL NUMBER PAGES` takes NUMBER ZeroMQ messages, answers, and starts over; if
there are pages, it checks each message by the digest in front of it and writes it to a memory of
so many. Both print the URL that they have bound.
"""

import mmap
import os
import sys

import numpy as np
import numpy.typing as npt
import trio
import xxhash
import zmq

from perf.errors import BenchmarkFailed
from transport.receiver import ReceiverOptions, open_receiver
from transport.session.message_memory import keep_message_memory
from transport.session.sockets import new_context
from transport.wire.frames import PAGE_BYTES


def fresh_memory(n_bytes: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Shared memory, uint8[n_bytes], that has no pages yet: what a new guest has. And its file."""
    descriptor = os.memfd_create("ferry-bench", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, n_bytes)
    return np.frombuffer(mmap.mmap(descriptor, n_bytes), np.uint8), descriptor


async def receive_pages(url: str, n_pages: int, secret: bytes | None) -> None:
    """Receives and applies pages until the sender says goodbye."""
    memory, descriptor = fresh_memory(n_pages * PAGE_BYTES)
    async with open_receiver(url, ReceiverOptions(secret=secret)) as receiver:
        print(receiver.url, flush=True)
        await receiver.wait_hello()
        await receiver.accept(b"")
        receiver.attach_memory(memory, files=[(0, n_pages, descriptor, 0)])
        await receiver.receive_record()


def receive_bare(url: str, messages: int, memory_pages: int) -> None:
    keep_message_memory()
    memory = np.ones((memory_pages, PAGE_BYTES), np.uint8)
    random = np.random.default_rng(1)
    with new_context() as context, context.socket(zmq.ROUTER) as router:
        router.set(zmq.RCVHWM, 8)
        router.bind(url)
        print(bytes(router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode(), flush=True)
        while True:
            for _ in range(messages):
                identity, *digest, data = router.recv_multipart(copy=False)
                if memory_pages:
                    if xxhash.xxh3_64_digest(data.buffer) != digest[0].bytes:
                        raise BenchmarkFailed("a message's digest is another")
                    pages = np.frombuffer(data.buffer, np.uint8).reshape(-1, PAGE_BYTES)
                    memory[random.integers(0, memory_pages, len(pages))] = pages
            router.send_multipart((identity.bytes, b"done"))


def main() -> None:
    kind, url, *numbers = sys.argv[1:]
    if kind == "pages":
        n_pages, *secrets = numbers
        secret = bytes.fromhex(*secrets) if secrets else None
        trio.run(receive_pages, url, int(n_pages), secret)
    else:
        receive_bare(url, *map(int, numbers))


if __name__ == "__main__":
    main()
