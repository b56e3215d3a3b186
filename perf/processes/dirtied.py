"""A guest that is written to while it is sent: `python -m perf.processes.dirtied URL SETTINGS`.

SETTINGS, JSON, are those of the benchmark `precopy`. The guest is a process of its own that writes
at its rate all the time until it is paused. Prints a JSON line with what came of it.
"""

import json
import mmap
import os
import select
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from perf.workloads.dirtying import Dirtier
from perf.workloads.images import Mix, file_pages, fill
from sync.convergence import Convergence, Limits, Reason, Round, Verdict
from transport.kernels.bitmap import bitmap_to_indices, words_for
from transport.kernels.load import warm_up
from transport.sender import RoundStatistics, SenderOptions, open_sender
from transport.wire.codec import Codec
from transport.wire.frames import PAGE_BYTES

STEP_S = 0.002
"""How often the guest writes: what it owes since the last time."""
START, COLLECT, PAUSE = b"s", b"c", b"p"

Words = npt.NDArray[np.uint64]


def run_guest(
    memory: npt.NDArray[np.uint8], settings: Mapping[str, Any], commands: socket.socket
) -> None:
    """At `COLLECT` and `PAUSE` it tells what it has written since the last time, as a bitmap; at
    `PAUSE` it stops writing first."""
    dirtier = Dirtier(
        memory,
        settings["pattern"],
        pages_per_s=settings["pages-per-s"],
        changed=settings["changed"],
        content=file_pages,
    )
    dirty = np.zeros(words_for(memory.size // PAGE_BYTES) * 64, np.bool_)
    started = None
    while True:
        if started is None or select.select([commands], [], [], STEP_S)[0]:
            command = commands.recv(1)
            if not command:
                return
            if command == START:
                started = time.monotonic()
            else:
                commands.send(np.packbits(dirty, bitorder="little").tobytes())
                dirty[:] = False
            if command == PAUSE:
                started = None
        if started is not None:
            now = time.monotonic()
            dirty[dirtier.advance(now - started)] = True
            started = now


class Guest:
    """The guest's process, seen from the sender."""

    def __init__(self, memory: npt.NDArray[np.uint8], settings: Mapping[str, Any]) -> None:
        self._n_words = words_for(memory.size // PAGE_BYTES)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            try:
                self._control.close()
                run_guest(memory, settings, theirs)
            finally:
                os._exit(1)
        theirs.close()

    def start(self) -> None:
        self._control.send(START)

    def collect(self) -> Words:
        """The bitmap of what it has written since the last time."""
        return self._ask(COLLECT)

    def pause(self) -> Words:
        """The bitmap of what it has written since the last time; it writes no more."""
        return self._ask(PAUSE)

    def _ask(self, command: bytes) -> Words:
        self._control.send(command)
        answer = self._control.recv(self._n_words * 8)
        if not answer:
            raise EOFError("the guest has ended")
        return np.frombuffer(answer, np.uint64)


async def migrate(
    url: str, memory: npt.NDArray[np.uint8], settings: Mapping[str, Any], guest: Guest
) -> dict[str, float]:
    """A full round, rounds until what is left fits, and a last one while the guest is paused."""
    codec = settings["codec"]
    options = SenderOptions(
        lanes=settings["lanes"], codec=None if codec == "auto" else Codec.parse(codec)
    )
    limits = Limits(
        downtime_ms=settings["downtime-ms"], fixed_cost_ms=0.0, max_rounds=settings["max-rounds"]
    )
    convergence = Convergence(limits)
    done: list[RoundStatistics] = []
    dirtied = 0
    async with open_sender(url, os.urandom(16), b"", options) as sender:
        sender.attach_memory(memory, cache_bytes=settings["cache-mib"] << 20)
        indices = np.arange(memory.size // PAGE_BYTES, dtype=np.uint32)
        guest.start()
        started = began = time.perf_counter_ns()
        while True:
            done.append(await sender.send_round(indices, len(done)))
            dirty = guest.collect()
            indices = bitmap_to_indices(dirty)
            dirtied += indices.size
            ended = time.perf_counter_ns()
            decision = convergence.observe(
                Round(
                    sent_pages=done[-1].sent_pages,
                    wire_bytes=done[-1].wire_bytes,
                    duration_ns=done[-1].duration_ns,
                    interval_ns=ended - began,
                    dirty_pages=indices.size,
                )
            )
            began = ended
            if decision.verdict is not Verdict.CONTINUE:
                break
        last = guest.pause()
        paused = time.perf_counter_ns()
        done.append(await sender.send_round(bitmap_to_indices(dirty | last), len(done)))
        applied = time.perf_counter_ns()
        differing = (await sender.verify()).size
        await sender.send_record(0, b"", flush=True)
    dirtied += int(np.bitwise_count(last).sum())
    return {
        "full_round_s": done[0].duration_ns / 1e9,
        "precopy_s": (paused - started) / 1e9,
        "last_round_ms": (applied - paused) / 1e6,
        "rounds": len(done),
        "fits": decision.reason is Reason.DOWNTIME,
        "dirtied_pages": dirtied,
        "wire_bytes": sum(each.wire_bytes for each in done),
        "dirtied_wire_bytes": sum(each.wire_bytes for each in done[1:]),
        "differing": differing,
    }


def main() -> None:
    url, text = sys.argv[1:]
    settings = json.loads(text)
    warm_up()
    memory = np.frombuffer(mmap.mmap(-1, settings["mib"] << 20), np.uint8)
    fill(memory, Mix())
    guest = Guest(memory, settings)
    print(json.dumps(trio.run(migrate, url, memory, settings, guest)), flush=True)


if __name__ == "__main__":
    main()
