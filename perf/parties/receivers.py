"""Ends of the wire: `python -m perf.parties.receivers pages|bare URL NUMBER`.

`pages` is this project's receiver for a guest of NUMBER pages. `bare` takes NUMBER ZeroMQ messages,
drops them, answers, and starts over. Both print the URL that they have bound.
"""

import sys

import numpy as np
import trio
import zmq

from transport.frames import PAGE_BYTES
from transport.receiver import open_receiver


async def receive_pages(url: str, n_pages: int) -> None:
    """Applies until the sender says goodbye."""
    memory = np.zeros(n_pages * PAGE_BYTES, np.uint8)
    async with open_receiver(url) as receiver:
        print(receiver.url, flush=True)
        await receiver.wait_hello()
        await receiver.accept(b"")
        receiver.attach_memory(memory)
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
