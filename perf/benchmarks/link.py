"""How fast rounds cross a link of one machine, beside a bare ZeroMQ stream of the same bytes.

Cases: `random` (every page new and incompressible), `file` (every page new, compressible), `zero`,
`unchanged`, and `verify` (digest of both memories). The bare stream has 1 MiB messages, zero copy,
as many connections as lanes, and a receiver that drops them; it is never encrypted, ours is with
`encryption=curve`. Rates are of guest memory; CPU time, which other work on the machine disturbs
less, is that of both processes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import trio

from perf.baselines.zeromq import BareStream
from perf.benchmark import Context, Measurement
from perf.child import Cost, Stopwatch, child
from perf.errors import BenchUsageError
from perf.links import local_link
from perf.results import Better
from perf.workloads.images import file_pages, random_pages
from transport.sender import SenderOptions, open_sender
from transport.session.secret import SECRET_BYTES
from transport.wire.frames import PAGE_BYTES

GIB = 1 << 30


def run(context: Context) -> Iterator[Measurement]:
    n_bytes, lanes = context.number("mib") << 20, context.number("lanes")
    secret = _secret(context.text("encryption"))
    with ExitStack() as stack:
        link = stack.enter_context(local_link(context.text("link")))
        bare = BareStream(stack, link.url("bare"), n_bytes, lanes)
        receiver = ["pages", link.url("pages"), str(n_bytes // PAGE_BYTES)]
        if secret is not None:
            receiver.append(secret.hex())
        party = stack.enter_context(child("perf.processes.receivers", *receiver))
        options = SenderOptions(lanes=lanes, secret=secret)
        yield from trio.run(_rounds, context, bare, party.line(), party.pid, n_bytes, options)


def _secret(encryption: str) -> bytes | None:
    if encryption not in ("none", "curve"):
        raise BenchUsageError(f"encryption={encryption}: there is none and curve")
    return os.urandom(SECRET_BYTES) if encryption == "curve" else None


async def _rounds(
    context: Context,
    bare: BareStream,
    url: str,
    receiver: int,
    n_bytes: int,
    options: SenderOptions,
) -> list[Measurement]:
    rng = np.random.default_rng(1)
    memory = np.zeros(n_bytes, np.uint8)
    indices = np.arange(memory.size // PAGE_BYTES, dtype=np.uint32)
    contents: dict[str, Callable[[], npt.NDArray[np.uint8] | int]] = {
        "random": lambda: random_pages(rng, indices.size).reshape(-1),
        "unchanged": lambda: memory,
        "file": lambda: file_pages(rng, indices.size).reshape(-1),
        "zero": lambda: 0,
    }
    found: list[Measurement] = []
    async with open_sender(url, os.urandom(16), b"", options) as sender:
        sender.attach_memory(memory)
        for number in range(context.repeat + 1):
            costs = {"bare": await trio.to_thread.run_sync(bare.round)}
            for case, content in contents.items():
                memory[:] = content()
                watch = Stopwatch(os.getpid(), receiver)
                await sender.send_round(indices, number)
                costs[case] = watch.stop()
            watch = Stopwatch(os.getpid(), receiver)
            await sender.verify()
            costs["verify"] = watch.stop()
            if number:
                found += _measurements(costs, n_bytes)
        await sender.send_record(0, b"", flush=True)
    return found


def _measurements(costs: dict[str, Cost], n_bytes: int) -> Iterator[Measurement]:
    for case, cost in costs.items():
        better: Better = "neither" if case == "bare" else "higher"
        yield Measurement("rate", n_bytes / cost.wall_s / GIB, "GiB/s", better, {"case": case})
        if case != "bare":
            ratio = costs["bare"].wall_s / cost.wall_s
            yield Measurement("rate_of_bare", ratio, "x", "higher", {"case": case})
            ratio = cost.cpu_s / max(costs["bare"].cpu_s, 1e-9)
            yield Measurement("cpu_of_bare", ratio, "x", "lower", {"case": case})
