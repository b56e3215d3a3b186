"""What `send` keeps in memory: `... perf.parties.rounds URL MIB CACHE_MIB ROUNDS DIRTY MARKS`.

Imports what `send` imports, sends ROUNDS rounds of DIRTY pages of a guest's shared memory, and
prints a JSON line with its memory, in bytes, before the session, and after each of the rounds in
MARKS (`1,100,1000`).
"""

import json
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import trio

import ferry.send
from perf.workloads.dirtying import Dirtier
from perf.workloads.images import Mix, fill
from transport.frames import PAGE_BYTES
from transport.kernels.compiled import warm_up
from transport.sender import SenderOptions, open_sender

GUEST = "perf-guest"


def memory_bytes() -> dict[str, int]:
    """`private`: memory that only this process has and that is no file's; `resident`: with the
    text and data of programs and libraries, which processes share. Neither counts the guest's."""
    found = {"private": 0, "resident": 0}
    counted = True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("Rss", "Anonymous"):
            key = "resident" if name == "Rss" else "private"
            found[key] += int(value.split()[0]) * 1024 * counted
        elif "-" in name:
            counted = GUEST not in line
    return found


async def send(
    url: str, mib: int, cache_mib: int, rounds: int, dirty: int, marks: frozenset[int]
) -> None:
    descriptor = os.memfd_create(GUEST)
    os.ftruncate(descriptor, mib << 20)
    memory = np.frombuffer(mmap.mmap(descriptor, mib << 20), np.uint8)
    dirtier = Dirtier(memory, "hot", changed=0.1)
    fill(memory, Mix())
    warm_up()
    print(json.dumps({"rounds": 0, **memory_bytes()}), flush=True)
    options = SenderOptions(lanes=ferry.send.Options.lanes)
    async with open_sender(url, os.urandom(16), b"", options) as sender:
        sender.attach_memory(memory, cache_bytes=cache_mib << 20)
        await sender.send_round(np.arange(memory.size // PAGE_BYTES, dtype=np.uint32), 0)
        for number in range(1, rounds + 1):
            await sender.send_round(dirtier.write(dirty), number)
            if number in marks:
                print(json.dumps({"rounds": number, **memory_bytes()}), flush=True)
        await sender.send_record(0, b"", flush=True)


def main() -> None:
    url, mib, cache_mib, rounds, dirty, marks = sys.argv[1:]
    wanted = frozenset(map(int, marks.split(",")))
    trio.run(send, url, int(mib), int(cache_mib), int(rounds), int(dirty), wanted)


if __name__ == "__main__":
    main()
