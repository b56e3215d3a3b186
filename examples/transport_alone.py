"""`transport` without a VMM and without a device: moves a memory that changes to another process.

    python examples/transport_alone.py

The process starts a second one, which receives. It sends all pages, changes some while rounds go
on, says so in records, sends what changed, and has both copies proven equal by digest.
"""

import contextlib
import os
import subprocess
import sys
import tempfile

import numpy as np
import trio

from transport.receiver import open_receiver
from transport.sender import open_sender
from transport.wire.errors import PeerClosed
from transport.wire.frames import PAGE_BYTES

N_PAGES = 4096
ROUNDS = 3
NOTE, DONE = 1, 2
"""Kinds of record: they mean what the application wants them to mean."""


async def receive(url: str) -> None:
    """One session: accept whoever comes, and let the pages come into an array."""
    memory = np.zeros(N_PAGES * PAGE_BYTES, np.uint8)
    async with open_receiver(url) as link:
        greeting = await link.wait_hello()
        print(f"receiver: {greeting.payload.decode()} from session {greeting.session.hex()[:8]}")
        await link.accept(b"welcome")
        link.attach_memory(memory)
        with contextlib.suppress(PeerClosed):
            while True:
                record = await link.receive_record()
                if record.kind == NOTE:
                    print(f"receiver: {record.payload.decode()}")
                elif record.kind == DONE:
                    pages = link.statistics().pages_applied
                    await link.send_record(DONE, f"{pages} pages written".encode(), flush=True)


async def send(url: str) -> None:
    """Rounds until nothing changes any more, then the proof."""
    random = np.random.default_rng(1)
    memory = random.integers(0, 256, N_PAGES * PAGE_BYTES, np.uint8)
    dirty = np.arange(N_PAGES, dtype=np.uint32)
    async with open_sender(url, os.urandom(16), b"a memory of 16 MiB") as link:
        print(f"sender: the receiver says {link.hello_reply.decode()}")
        link.attach_memory(memory)
        for round_no in range(1, ROUNDS + 1):
            # Which pages are to be sent is settled before the first of them is read.
            round_ = await link.send_round(dirty, round_no)
            note = f"round {round_no}: {round_.sent_pages} pages in {round_.wire_bytes} bytes"
            await link.send_record(NOTE, note.encode())
            dirty = np.unique(random.integers(0, N_PAGES, 64).astype(np.uint32))
            memory.reshape(N_PAGES, PAGE_BYTES)[dirty, :16] = round_no
        differ = await link.verify()
        await link.send_round(differ, ROUNDS + 1)
        await link.send_record(DONE, b"", flush=True)
        print(f"sender: {(await link.receive_record()).payload.decode()}")
        remaining = await link.verify()
        (region,) = await link.compare_regions([(0, N_PAGES)])
        print(f"sender: {differ.size} pages differed before the last round, {remaining.size} now")
        if remaining.size or not region.equal:
            sys.exit("the copies differ")


def main() -> None:
    if len(sys.argv) == 3:
        trio.run({"receive": receive, "send": send}[sys.argv[1]], sys.argv[2])
        return
    with tempfile.TemporaryDirectory(prefix="ferry-") as folder:
        url = f"ipc://{folder}/link.sock"
        with subprocess.Popen([sys.executable, __file__, "receive", url]) as receiver:
            try:
                trio.run(send, url)
            except BaseException:
                receiver.kill()
                raise
        if receiver.returncode:
            sys.exit("the receiver failed")


if __name__ == "__main__":
    main()
