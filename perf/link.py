"""How fast rounds cross the loopback, beside a bare ZeroMQ stream of the same bytes.

    python -m perf.link [--url URL] [--mib 256] [--lanes 2] [--repeat 5]

The receiver is a process of its own. Prints one JSON object a line: `case`, `mb_per_s` (10^6 bytes
of *guest memory* a second, median of the repeats), `ratio` to the bare stream, and what the
rounds consisted of. Cases: `bare` (1 MiB messages, zero copy, as many connections as lanes, the
receiver drops them), `random` (every page new and incompressible), `text` (every page new,
compressible), `zero`, `unchanged`, and `verify` (digest of both memories).
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
from dataclasses import asdict

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


@contextmanager
def child(role: str, url: str, number: int) -> Iterator[str]:
    """Run a role of this module in a process of its own; gives the URL that it has bound."""
    command = [sys.executable, "-m", "perf.link", "--role", role, "--url", url, str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline(MAX_READY_BYTES).decode().strip()
        finally:
            process.kill()


def measure_bare(url: str, n_bytes: int, lanes: int, repeat: int) -> float:
    """Bytes a second of the bare stream, median."""
    messages = n_bytes // MESSAGE_BYTES
    data = os.urandom(MESSAGE_BYTES)
    rates = []
    with child("bare", url, messages) as bound, zmq.Context() as context:
        poller = zmq.Poller()
        dealers = [context.socket(zmq.DEALER) for _ in range(lanes)]
        for dealer in dealers:
            dealer.set(zmq.SNDHWM, 8)
            dealer.connect(bound)
            poller.register(dealer, zmq.POLLIN)
        for _ in range(repeat + 1):
            started = time.perf_counter()
            for number in range(messages):
                dealers[number % lanes].send(data, copy=False, track=True)
            [(answered, _)] = poller.poll()
            answered.recv()
            rates.append(messages * MESSAGE_BYTES / (time.perf_counter() - started))
        for dealer in dealers:
            dealer.close(linger=0)
    return statistics.median(rates[1:])  # the first one connects


def random_content(n_bytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng().integers(0, 256, n_bytes, np.uint8)


def text_content(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Words drawn at random: compresses to somewhat less than half."""
    rng = np.random.default_rng()
    words = rng.integers(97, 123, (256, 16), np.uint8)
    return words[rng.integers(0, 256, n_bytes // 16)].reshape(-1)


async def measure_rounds(
    sender: Sender, memory: npt.NDArray[np.uint8], repeat: int
) -> dict[str, dict[str, object]]:
    """Every case, its repeats spread over the run; bytes of memory a second, median."""
    indices = np.arange(memory.size // PAGE_BYTES, dtype=np.uint32)
    rates: dict[str, list[float]] = {}
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
            done = await sender.send_round(indices, round_no)
            rates.setdefault(case, []).append(memory.size / (done.duration_ns / 1e9))
            last[case] = asdict(done)
        started = time.perf_counter()
        differing = await sender.verify()
        rates.setdefault("verify", []).append(memory.size / (time.perf_counter() - started))
        last["verify"] = {"differing": differing.size}
    return {
        case: {"bytes_per_s": statistics.median(values[1:]), **last[case]}
        for case, values in rates.items()
    }


async def measure(url: str, mib: int, lanes: int, repeat: int) -> None:
    """Print a line for each case."""
    memory = np.zeros(mib << 20, np.uint8)
    before = measure_bare(url, memory.size, lanes, repeat)
    with child("receive", url, memory.size // PAGE_BYTES) as bound:
        options = SenderOptions(lanes=lanes)
        async with open_sender(bound, os.urandom(16), b"", options) as sender:
            sender.attach_memory(memory)
            found = await measure_rounds(sender, memory, repeat)
            await sender.send_record(0, b"", flush=True)
    bare = (before + measure_bare(url, memory.size, lanes, repeat)) / 2
    line = {"url": url, "lanes": lanes, "mib": mib, "repeat": repeat}
    print(json.dumps({**line, "case": "bare", "mb_per_s": round(bare / 1e6)}))
    for case, numbers in found.items():
        rate = numbers.pop("bytes_per_s")
        assert isinstance(rate, float)
        values = {"mb_per_s": round(rate / 1e6), "ratio": round(rate / bare, 3), **numbers}
        print(json.dumps({**line, "case": case, **values}), flush=True)


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
