"""How fast rounds cross the loopback, beside a bare ZeroMQ stream of the same bytes.

    python -m perf.link [--url URL] [--mib 256] [--lanes 2] [--repeat 5]

The receiver is a process of its own. Prints one JSON object a line: `case`; `mb_per_s`, 10^6 bytes
of *guest memory* a second, median of the repeats, and `ratio`, that of the bare stream being 1;
`cpu_ns_per_byte`, of both processes together (which other work on the machine disturbs less), and
`cpu_ratio`; and what the last round consisted of. Cases: `bare` (1 MiB messages, zero copy, as
many connections as lanes, the receiver drops them), `random` (every page new and
incompressible), `text` (every page new, compressible), `zero`, `unchanged`, and `verify` (digest
of both memories).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import trio
import zmq

from transport.frames import PAGE_BYTES
from transport.receiver import open_receiver
from transport.sender import Sender, SenderOptions, open_sender

MESSAGE_BYTES = 1 << 20
MAX_READY_BYTES = 4096
"""Longest line in which a child says where it listens."""


async def receive(url: str, n_pages: int) -> None:
    """The receiver's process: apply until the sender says goodbye."""
    memory = np.zeros(n_pages * PAGE_BYTES, np.uint8)
    async with open_receiver(url) as receiver:
        print(receiver.url, flush=True)
        await receiver.wait_hello()
        await receiver.accept(b"")
        receiver.attach_memory(memory)
        await receiver.receive_record()


def receive_bare(url: str, messages: int) -> None:
    """The bare stream's receiver: take and drop, then answer."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.set(zmq.RCVHWM, 8)
        router.bind(url)
        print(bytes(router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode(), flush=True)
        while True:
            for _ in range(messages):
                identity, _data = router.recv_multipart(copy=False)
            router.send_multipart((identity.bytes, b"done"))


@dataclass(frozen=True)
class Cost:
    """What moving some bytes of memory took."""

    wall_s: float
    cpu_s: float
    """Of both processes."""


class Stopwatch:
    """Measures both processes of a run."""

    def __init__(self, other: int) -> None:
        """`other`: the process id of the receiver."""
        self._stat = Path(f"/proc/{other}/stat")
        self._wall, self._cpu = time.perf_counter(), self._cpu_s()

    def stop(self) -> Cost:
        return Cost(time.perf_counter() - self._wall, self._cpu_s() - self._cpu)

    def _cpu_s(self) -> float:
        fields = self._stat.read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def child(role: str, url: str, number: int) -> Iterator[tuple[str, int]]:
    """Run a role of this module as a process; gives the URL that it has bound, and its id."""
    command = [sys.executable, "-m", "perf.link", "--role", role, "--url", url, str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline(MAX_READY_BYTES).decode().strip(), process.pid
        finally:
            process.kill()


def measure_bare(url: str, n_bytes: int, lanes: int, repeat: int) -> list[Cost]:
    """Of each repeat of the bare stream."""
    messages = n_bytes // MESSAGE_BYTES
    data = os.urandom(MESSAGE_BYTES)
    costs = []
    with child("bare", url, messages) as (bound, process), zmq.Context() as context:
        poller = zmq.Poller()
        dealers = [context.socket(zmq.DEALER) for _ in range(lanes)]
        for dealer in dealers:
            dealer.set(zmq.SNDHWM, 8)
            dealer.connect(bound)
            poller.register(dealer, zmq.POLLIN)
        for _ in range(repeat + 1):
            watch = Stopwatch(process)
            for number in range(messages):
                dealers[number % lanes].send(data, copy=False, track=True)
            [(answered, _)] = poller.poll()
            answered.recv()
            costs.append(watch.stop())
        for dealer in dealers:
            dealer.close(linger=0)
    return costs[1:]  # the first one connects


def random_content(n_bytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng().integers(0, 256, n_bytes, np.uint8)


def text_content(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Words drawn at random: compresses to somewhat less than half."""
    rng = np.random.default_rng()
    words = rng.integers(97, 123, (256, 16), np.uint8)
    return words[rng.integers(0, 256, n_bytes // 16)].reshape(-1)


async def measure_rounds(
    sender: Sender, memory: npt.NDArray[np.uint8], repeat: int, receiver: int
) -> dict[str, tuple[list[Cost], dict[str, object]]]:
    """Of every case, its repeats spread over the run: costs, and what the last one did."""
    indices = np.arange(memory.size // PAGE_BYTES, dtype=np.uint32)
    costs: dict[str, list[Cost]] = {}
    last: dict[str, dict[str, object]] = {}
    contents: dict[str, Callable[[], npt.NDArray[np.uint8] | int]] = {
        "random": lambda: random_content(memory.size),
        "unchanged": lambda: memory,
        "text": lambda: text_content(memory.size),
        "zero": lambda: 0,
    }
    for round_no in range(repeat + 1):
        for case, content in contents.items():
            memory[:] = content()
            watch = Stopwatch(receiver)
            done = await sender.send_round(indices, round_no)
            costs.setdefault(case, []).append(watch.stop())
            last[case] = asdict(done)
        watch = Stopwatch(receiver)
        differing = await sender.verify()
        costs.setdefault("verify", []).append(watch.stop())
        last["verify"] = {"differing": differing.size}
    return {case: (several[1:], last[case]) for case, several in costs.items()}


async def measure(url: str, mib: int, lanes: int, repeat: int) -> None:
    """Print a line for each case."""
    memory = np.zeros(mib << 20, np.uint8)
    bare = measure_bare(url, memory.size, lanes, repeat)
    with child("receive", url, memory.size // PAGE_BYTES) as (bound, process):
        options = SenderOptions(lanes=lanes)
        async with open_sender(bound, os.urandom(16), b"", options) as sender:
            sender.attach_memory(memory)
            found = await measure_rounds(sender, memory, repeat, process)
            await sender.send_record(0, b"", flush=True)
    bare += measure_bare(url, memory.size, lanes, repeat)
    bare_wall = statistics.median(cost.wall_s for cost in bare)
    bare_cpu = statistics.median(cost.cpu_s for cost in bare)
    for case, (costs, numbers) in {"bare": (bare, {}), **found}.items():
        wall = statistics.median(cost.wall_s for cost in costs)
        cpu = statistics.median(cost.cpu_s for cost in costs)
        line = {
            "case": case,
            "mb_per_s": round(memory.size / wall / 1e6),
            "ratio": round(bare_wall / wall, 3),
            "cpu_ns_per_byte": round(cpu / memory.size * 1e9, 3),
            "cpu_ratio": round(cpu / bare_cpu, 3),
            "url": url,
            "lanes": lanes,
            "mib": mib,
            "repeat": repeat,
        }
        print(json.dumps({**line, **numbers}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of rounds beside a bare stream.")
    parser.add_argument("--url", default="tcp://127.0.0.1:*", help="where a receiver binds")
    parser.add_argument("--mib", type=int, default=256, help="guest memory, MiB")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--role", choices=("bare", "receive"), help=argparse.SUPPRESS)
    parser.add_argument("number", type=int, nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "bare":
        receive_bare(options.url, options.number)
    elif options.role == "receive":
        trio.run(receive, options.url, options.number)
    else:
        trio.run(measure, options.url, options.mib, options.lanes, options.repeat)


if __name__ == "__main__":
    main()
