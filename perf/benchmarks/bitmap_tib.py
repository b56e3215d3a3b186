"""What a guest pays while the dirty log of its device is read: register reads meanwhile.

A guest of 1 GiB and a large one of sparse memory, each with a gateway and a trivial device in
processes of their own, take turns. The log is empty, or has one page in each `set-every-mib`: what
its reading holds up must not grow with the guest's memory.
"""

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import trio

from perf.benchmark import Context, Measurement
from perf.benchmarks.gateway import Vmm
from perf.child import child
from perf.errors import BenchmarkFailed
from perf.statistics import quantile
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.vfio_user.protocol import HEADER, Command, DmaMap, encode_message

GIB = 1 << 30
QUANTILES = (0.5, 0.99)


class Guest(Vmm):
    """A VMM that has shared `n_bytes` of memory, of which nothing is touched."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        super().__init__(path)
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, n_bytes)
            message = encode_message(4, Command.DMA_MAP, DmaMap(3, 0, 0, n_bytes).pack())
            socket.send_fds(self._sock, [message], [fd])
        finally:
            os.close(fd)
        if HEADER.unpack_from(self._sock.recv(4096))[4]:
            raise BenchmarkFailed("the gateway does not take the guest's memory")

    def read_until(self, enough: threading.Event) -> list[float]:
        """Latencies of reads, one after the other, in microseconds."""
        latencies: list[float] = []
        while not enough.is_set():
            latencies += self.read_latencies_us(16)
        return latencies


def run(context: Context) -> Iterator[Measurement]:
    sizes = {"small": GIB, "large": context.number("gib") * GIB}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        party = partial(child, "perf.processes.registers", quiet=True)
        guests = {}
        for name, n_bytes in sizes.items():
            paths = [str(folder / f"{name}-{part}") for part in ("vmm", "device", "control")]
            every = str(context.number("set-every-mib"))
            stack.enter_context(party("device", paths[1], every))
            stack.enter_context(party("gateway", *paths, "0"))
            guests[name] = Guest(Path(paths[0]), n_bytes)
            stack.callback(guests[name].close)
        works = {
            name: partial(trio.run, _read_logs, guest, folder / f"{name}-control", context)
            for name, guest in guests.items()
        }
        for found in context.alternate(**works):
            for name, (latencies, log_ms) in found.items():
                where = {"guest": name}
                yield Measurement("log", log_ms, "ms", "lower", where)
                for q in QUANTILES:
                    value = quantile(latencies, q)
                    yield Measurement(f"read_p{q * 100:.0f}", value, "us", "lower", where)
            for q in QUANTILES:
                small, large = (quantile(found[name][0], q) for name in ("small", "large"))
                yield Measurement(f"p{q * 100:.0f}_of_small", large / small, "x", "lower")


async def _read_logs(guest: Guest, control: Path, context: Context) -> tuple[list[float], float]:
    """Latencies of reads while logs are read for a while, and how long a log takes, in ms."""
    async with await GatewayClient.connect(control, role=ClientRole.SOURCE) as gateway:
        mediation = await gateway.mediate(tracker="logging", capture=False)
        if mediation.dirty_fd is None:
            raise BenchmarkFailed("the gateway tracks nothing")
        os.close(mediation.dirty_fd)
        enough, latencies, n_logs = threading.Event(), [], 0

        def read() -> None:
            latencies.extend(guest.read_until(enough))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read)
            began = time.monotonic()
            try:
                while not n_logs or time.monotonic() - began < float(context.text("seconds")):
                    await gateway.dirty()
                    n_logs += 1
            finally:
                took_s = time.monotonic() - began
                enough.set()
        await gateway.passthrough()
    return latencies, took_s * 1e3 / n_logs
