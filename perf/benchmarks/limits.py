"""What the machine allows: memory, one core's codec and digest, and bare streams over loopback.

Everything else is to be read beside these. `bare` streams move an image's pages that are not zero:
TCP into fresh shared memory, ZeroMQ (1 MiB messages, no copy at the sender) to a receiver that
drops them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import lz4.block
import numpy as np
import xxhash

from perf.baselines import tcp
from perf.baselines.zeromq import BareStream
from perf.benchmark import Context, Measurement, cpu_seconds
from perf.links import TCP
from perf.processes.receivers import fresh_memory
from perf.workloads.images import Mix, image_file
from transport.wire.frames import PAGE_BYTES

CONNECTIONS = 2
WRITTEN_BYTES = 256 << 10
"""Bytes of one pwrite(2) where the target's memory is written by that."""
GIB = 1 << 30


def run(context: Context) -> Iterator[Measurement]:
    n_bytes = context.number("mib") << 20
    with ExitStack() as stack:
        path = stack.enter_context(image_file(n_bytes, Mix(zero=0.0)))
        zmq = BareStream(stack, TCP.url("bare"), n_bytes, CONNECTIONS)
        image = np.fromfile(path, np.uint8)
        words = image.view(np.uint64)
        copy = np.zeros_like(image)
        pages = image.reshape(-1, PAGE_BYTES)
        packed = [lz4.block.compress(page.data, store_size=False) for page in pages]

        def cpu(work: Callable[[], object]) -> Callable[[], float]:
            return lambda: cpu_seconds(work)

        def first_touch() -> None:
            memory, descriptor = fresh_memory(n_bytes)
            memory[:] = image
            os.close(descriptor)

        def first_write() -> None:
            _, descriptor = fresh_memory(n_bytes)
            for at in range(0, n_bytes, WRITTEN_BYTES):
                os.pwrite(descriptor, image.data[at : at + WRITTEN_BYTES], at)
            os.close(descriptor)

        for seconds in context.alternate(
            read=cpu(lambda: np.bitwise_or.reduce(words)),
            memcpy=cpu(lambda: np.copyto(copy, image)),
            first_touch=cpu(first_touch),
            first_write=cpu(first_write),
            xxh3=cpu(lambda: [xxhash.xxh3_64_intdigest(page.data) for page in pages]),
            lz4_compress=cpu(
                lambda: [lz4.block.compress(page.data, store_size=False) for page in pages]
            ),
            lz4_decompress=cpu(
                lambda: [
                    lz4.block.decompress(page, uncompressed_size=PAGE_BYTES) for page in packed
                ]
            ),
            tcp=lambda: tcp.copy(path, CONNECTIONS).wall_s,
            zmq=lambda: zmq.round().wall_s,
        ):
            for name, taken in seconds.items():
                yield Measurement(name, n_bytes / taken / GIB, "GiB/s", "neither")
        yield Measurement("lz4_of_raw", sum(map(len, packed)) / n_bytes, "x", "neither")
