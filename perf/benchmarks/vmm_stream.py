"""QEMU's migration stream through its reader: what the reader takes, and how fast QEMU is then.

`read` and `pass_on` are the reader alone, in CPU time, with a stream of pages that is made up and
lies in memory: all blocks taken over, or all carried. `memcpy` copies the same bytes. `opened` is a
real QEMU that sends an image to this process, its mapping proven on the way; `discarded` the same
to a socket that is only emptied. Rates are of the guest's memory, pages of zeros included.
"""

import itertools
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ferry.migration.kernels import STREAM_KERNEL
from perf.baselines import qemu
from perf.benchmark import Context, Measurement, cpu_seconds
from perf.child import Cost
from perf.errors import BenchmarkFailed
from perf.results import Better
from perf.workloads.images import Mix, image_file
from sync.memory import PAGE_BYTES
from sync.vmm.stream.mapping import FileRange
from sync.vmm.stream.opened import OpenedStream
from sync.vmm.stream.reader import Announced, BlockList, PageRange, StreamReader

GIB, MIB = 1 << 30, 1 << 20
BLOCK = b"ram"
MAX_TAIL_BYTES = MIB


def run(context: Context) -> Iterator[Measurement]:
    n_bytes, chunk_bytes = context.number("mib") * MIB, context.number("chunk-kib") << 10
    zero = float(context.settings["zero"])
    made = memoryview(_made_stream(n_bytes // PAGE_BYTES, zero))
    copied = np.empty(chunk_bytes, np.uint8)
    works = {
        "memcpy": lambda: _memcpy(made, copied),
        "read": lambda: _read(made, chunk_bytes, take=True),
        "pass_on": lambda: _read(made, chunk_bytes, take=False),
    }
    timed = {name: partial(cpu_seconds, work) for name, work in works.items()}
    for seconds in context.alternate(**timed):
        for name, taken in seconds.items():
            yield Measurement(name, n_bytes / taken / GIB, "GiB/s", _better(name))
        yield Measurement("read_of_memcpy", seconds["memcpy"] / seconds["read"], "x", "higher")
    with image_file(n_bytes, Mix(zero=zero)) as image:
        takes: dict[str, Callable[[socket.socket], None]] = {
            "discarded": partial(_discard, chunk_bytes),
            "opened": partial(_open, image, chunk_bytes),
        }
        streams = {name: partial(qemu.stream, image, take) for name, take in takes.items()}
        costs: dict[str, Cost]
        for costs in context.alternate(**streams):
            for name, cost in costs.items():
                yield Measurement(name, n_bytes / cost.wall_s / GIB, "GiB/s", _better(name))
                cpu = cost.cpu_s / (n_bytes / GIB)
                yield Measurement(f"{name}_qemu_cpu", cpu, "s/GiB", "neither")


def _better(name: str) -> Better:
    return "neither" if name in ("memcpy", "discarded") else "higher"


def _made_stream(n_pages: int, zero: float) -> bytes:
    """One section of a stream with all pages of one block; a share of `zero` of them is zeros."""
    rng = np.random.default_rng(1)
    page, name = rng.bytes(PAGE_BYTES), bytes([len(BLOCK)]) + BLOCK
    data = bytearray(b"QEVM\0\0\0\3\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4")
    length = n_pages * PAGE_BYTES
    data += struct.pack(">Q", length | 4) + name + struct.pack(">QQ", length, 16)
    data += b"\x7e\0\0\0\1\3\0\0\0\1"
    for number, is_zero in enumerate((rng.random(n_pages) < zero).tolist()):
        flags = (2 if is_zero else 8) | (0x20 if number else 0)
        data += struct.pack(">Q", number * PAGE_BYTES | flags)
        data += (b"" if number else name) + (b"\0" if is_zero else page)
    return bytes(data + struct.pack(">Q", 16) + b"\x7e\0\0\0\1\0")


def _memcpy(data: memoryview, out: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    for at in range(0, len(data), out.size):
        part = np.frombuffer(data[at : at + out.size], np.uint8)
        out[: part.size] = part


def _read(data: memoryview, chunk_bytes: int, *, take: bool) -> None:
    reader = StreamReader(max_held_bytes=MIB, max_tail_bytes=MAX_TAIL_BYTES, kernel=STREAM_KERNEL)
    for at in range(0, len(data), chunk_bytes):
        reader.feed(data[at : at + chunk_bytes])
        while (event := reader.next_event()) is not None:
            if isinstance(event, BlockList):
                for block in event.blocks:
                    if take:
                        reader.take(block.name, [PageRange(0, block.n_pages, 0)])
                    else:
                        reader.carry(block.name)
    reader.end()


def _received(connection: socket.socket, chunk_bytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(chunk_bytes))
    return itertools.takewhile(len, (buffer[: connection.recv_into(buffer)] for _ in iter(int, 1)))


def _discard(chunk_bytes: int, connection: socket.socket) -> None:
    for _ in _received(connection, chunk_bytes):
        pass


def _open(image: Path, chunk_bytes: int, connection: socket.socket) -> None:
    memory: np.memmap[tuple[int], np.dtype[np.uint8]] = np.memmap(image, np.uint8, "r")
    n_pages = memory.size // PAGE_BYTES
    stream = OpenedStream(
        memory,
        [FileRange(0, n_pages, "image", 0)],
        max_held_bytes=16 * MIB,
        max_tail_bytes=MAX_TAIL_BYTES,
        kernel=STREAM_KERNEL,
    )
    n_announced = 0
    for chunk in _received(connection, chunk_bytes):
        stream.feed(chunk)
        while (event := stream.next_event()) is not None:
            if isinstance(event, Announced):
                n_announced += event.pages.size
    stream.reader.end()
    if n_announced < n_pages:
        raise BenchmarkFailed(f"{n_announced} of {n_pages} pages were announced")
