"""Ends of the wire: `python -m perf.parties.receivers pages|bare URL NUMBER`.

`pages` is this project's receiver for a guest of NUMBER pages. `bare` takes NUMBER ZeroMQ messages,
drops them, answers, and starts over. Both print the URL that they have bound.
"""

import mmap
import os
import sys

import numpy as np
import numpy.typing as npt
import trio
import zmq

from transport.frames import PAGE_BYTES
from transport.receiver import open_receiver


def fresh_memory(n_bytes: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Shared memory, uint8[n_bytes], that has no pages yet: what a new guest has. And its file."""
    descriptor = os.memfd_create("ferry-bench", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, n_bytes)
    return np.frombuffer(mmap.mmap(descriptor, n_bytes), np.uint8), descriptor


async def receive_pages(url: str, n_pages: int) -> None:
    """Applies until the sender says goodbye."""
    memory, descriptor = fresh_memory(n_pages * PAGE_BYTES)
    async with open_receiver(url) as receiver:
        print(receiver.url, flush=True)
        await receiver.wait_hello()
        await receiver.accept(b"")
        receiver.attach_memory(memory, files=[(0, n_pages, descriptor, 0)])
        await receiver.receive_record()


def receive_bare(url: str, messages: int) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.set(zmq.RCVHWM, 8)
        router.bind(url)
        print(bytes(router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode(), flush=True)
        while True:
            for _ in range(messages):
                identity, _data = router.recv_multipart(copy=False)
            router.send_multipart((identity.bytes, b"done"))


def main() -> None:
    kind, url, number = sys.argv[1:]
    if kind == "pages":
        trio.run(receive_pages, url, int(number))
    else:
        receive_bare(url, int(number))


if __name__ == "__main__":
    main()
