"""What `send` keeps in memory: `... rounds URL MIB CACHE_MIB CODEC ROUNDS DIRTY MARKS`.

Imports what `send` imports and nothing else, sends all pages of a guest's shared memory twice and
then ROUNDS rounds of about DIRTY pages, and prints a JSON line with its memory, in bytes, before
the session, and after each of the rounds in MARKS (`1,100,1000`). The guest is a process of its
own.
"""

import json
import mmap
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_INDICES_BYTES = 1 << 20
EVERY_PAGE = b"*"


def memory_bytes() -> dict[str, int]:
    """`private`: memory that only this process has and that is no file's; `resident`: with the
    text and data of programs and libraries, which processes share. Neither counts the guest's,
    which is shared memory (proc(5), status)."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, file = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return {"private": anonymous, "resident": anonymous + file}


def run_guest(shared: mmap.mmap, dirty: int, control: socket.socket) -> None:
    """Fills the memory; then, at each byte, writes to pages of it and tells which, as uint32; at
    `EVERY_PAGE`, writes to all and tells none."""
    import numpy as np

    from perf.workloads.dirtying import Dirtier
    from perf.workloads.images import Mix, fill
    from transport.wire.frames import PAGE_BYTES

    memory = np.frombuffer(shared, np.uint8)
    fill(memory, Mix())
    dirtier = Dirtier(memory, "hot", changed=0.1)
    while asked := control.recv(1):
        if asked == EVERY_PAGE:
            memory[::PAGE_BYTES] += 1
        control.send(dirtier.write(dirty).tobytes() if asked != EVERY_PAGE else b"done")


async def send(
    url: str,
    memory: "npt.NDArray[np.uint8]",
    cache_mib: int,
    codec: str,
    rounds: int,
    marks: frozenset[int],
    guest: socket.socket,
) -> None:
    import numpy as np

    from ferry.migration.send_options import Options
    from transport.kernels.load import warm_up
    from transport.sender import SenderOptions, open_sender
    from transport.wire.codec import Codec
    from transport.wire.frames import PAGE_BYTES

    def dirty_pages() -> "npt.NDArray[np.uint32]":
        guest.send(b"?")
        return np.frombuffer(guest.recv(MAX_INDICES_BYTES), np.uint32)

    warm_up()
    dirty_pages()
    print(json.dumps({"rounds": 0, **memory_bytes()}), flush=True)
    options = SenderOptions(
        lanes=Options.lanes,
        codec=None if codec == "auto" else Codec.parse(codec),
    )
    async with open_sender(url, os.urandom(16), b"", options) as sender:
        sender.attach_memory(memory, cache_bytes=cache_mib << 20)
        every_page = np.arange(memory.size // PAGE_BYTES, dtype=np.uint32)
        await sender.send_round(every_page, 0)
        # Pages that are sent again are kept in the cache, which is full from here on.
        guest.send(EVERY_PAGE)
        guest.recv(MAX_INDICES_BYTES)
        await sender.send_round(every_page, 1)
        for number in range(1, rounds + 1):
            await sender.send_round(dirty_pages(), number + 1)
            if number in marks:
                print(json.dumps({"rounds": number, **memory_bytes()}), flush=True)
        await sender.send_record(0, b"", flush=True)


def main() -> None:
    url, mib, cache_mib, codec, rounds, dirty, marks = sys.argv[1:]
    descriptor = os.memfd_create("guest")
    os.ftruncate(descriptor, int(mib) << 20)
    shared = mmap.mmap(descriptor, int(mib) << 20)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Before anything is imported: what the guest needs is not counted.
    if os.fork() == 0:
        ours.close()
        run_guest(shared, int(dirty), theirs)
        return
    theirs.close()

    import numpy as np
    import trio

    memory = np.frombuffer(shared, np.uint8)
    wanted = frozenset(map(int, marks.split(",")))
    trio.run(send, url, memory, int(cache_mib), codec, int(rounds), wanted, ours)


if __name__ == "__main__":
    main()
