"""The last round of a migration: so many dirty pages, from the pause to the receiver's proof.

`applied`: the dirty bitmap is read, the pages are sent, and the receiver has acknowledged that it
has applied every one. `proven`: both sides have digested these pages after that, and they are
equal. `cpu` is what both processes have used until `applied`. A repetition is a session, and each
of its `rounds` counts as one sample. Cases: `hot`, nine of ten pages are of a tenth of the memory,
and a tenth of each was changed; `new`, pages of all memory, all of each new and like a file's.

Beside it a limit, `bare`, the same bytes over bare ZeroMQ connections, until the answer; and a
peer, `moved`: the least program that reads the pages from memory, digests and sends them, checks
them and writes them to a memory, with one thread at either end. It is measured as a round is: after
an interval of its own, with pages just written, by a caller in trio. And `way`, a round of `FEW`
pages, after an interval of its own as well: what ours costs that carries next to nothing. One of
the two follows each round, in turn, with some pages of ours in any case: TCP sends with half the
window, or less, what comes after 0.2 s of rest.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import trio

from perf.baselines.zeromq import BareStream
from perf.benchmark import Context, Measurement
from perf.child import Child, Stopwatch, child
from perf.errors import BenchmarkFailed, BenchUsageError
from perf.links import local_link
from perf.workloads.dirtying import Dirtier
from perf.workloads.images import Mix, file_pages, fill
from transport.kernels.bitmap import bitmap_to_indices
from transport.sender import SenderOptions, open_sender
from transport.wire.frames import PAGE_BYTES

CASES = {"hot": ("hot", 0.1), "new": ("uniform", 1.0)}
"""The pattern of writes, and the share of a page that each changes."""
FEW = 16
"""Pages of a round that carries next to nothing: some for each lane."""


def run(context: Context) -> Iterator[Measurement]:
    n_pages = (context.number("mib") << 20) // PAGE_BYTES
    if context.number("dirty") >= n_pages:
        raise BenchUsageError(f"dirty={context.number('dirty')}: there are {n_pages} pages")
    for case in [*CASES] * context.repeat:
        with ExitStack() as stack:
            link = stack.enter_context(local_link(context.text("link")))
            n_bytes = context.number("dirty") * PAGE_BYTES
            lanes = context.number("lanes")
            bare = BareStream(stack, link.url("bare"), n_bytes, lanes, n_bytes // lanes)
            mover = BareStream(
                stack, link.url("mover"), n_bytes, lanes, n_bytes // lanes, memory_pages=n_pages
            )
            receiver = ("pages", link.url("pages"), str(n_pages))
            party = stack.enter_context(child("perf.processes.receivers", *receiver))
            yield from trio.run(_rounds, context, bare, mover, party, case, n_pages)


async def _rounds(
    context: Context, bare: BareStream, mover: BareStream, party: Child, case: str, n_pages: int
) -> list[Measurement]:
    memory = np.zeros(n_pages * PAGE_BYTES, np.uint8)
    pages = memory.reshape(-1, PAGE_BYTES)
    written = np.zeros((context.number("dirty"), PAGE_BYTES), np.uint8)
    fill(memory, Mix())
    pattern, changed = CASES[case]
    dirtier = Dirtier(memory, pattern, changed=changed, content=file_pages)
    dirty = context.number("dirty")
    found: list[Measurement] = []
    where = {"case": case}
    options = SenderOptions(lanes=context.number("lanes"))
    async with open_sender(party.line(), os.urandom(16), b"", options) as sender:
        sender.attach_memory(memory, cache_bytes=memory.size)
        await sender.send_round(np.arange(n_pages, dtype=np.uint32), 0)
        for number in range(1, 2 * context.number("rounds"), 2):
            await trio.sleep(context.number("interval-ms") / 1e3)
            bits = np.zeros(n_pages, np.bool_)
            while missing := dirty - int(np.count_nonzero(bits)):
                bits[dirtier.write(missing)] = True
            words = np.packbits(bits, bitorder="little").view(np.uint64)
            watch = Stopwatch(os.getpid(), party.pid)
            paused = time.perf_counter()
            indices = bitmap_to_indices(words)
            await sender.send_round(indices, number)
            applied = time.perf_counter()
            cost = watch.stop()
            differing = await sender.verify(indices)
            proven = time.perf_counter()
            if differing.size:
                raise BenchmarkFailed(f"{differing.size} pages are not equal after a round")
            # What is measured below comes last of all: what ran just now finds the cores awake.
            limit = await trio.to_thread.run_sync(bare.round)
            await mover.move(memory, indices)
            found.append(Measurement("applied", (applied - paused) * 1e3, "ms", "lower", where))
            found.append(Measurement("proven", (proven - paused) * 1e3, "ms", "lower", where))
            found.append(Measurement("cpu", cost.cpu_s * 1e3, "ms", "lower", where))
            found.append(Measurement("bare", limit.wall_s * 1e3, "ms", "neither", where))
            found.append(Measurement("bare_cpu", limit.cpu_s * 1e3, "ms", "neither", where))
            await trio.sleep(context.number("interval-ms") / 1e3)
            few = dirtier.write(FEW)
            if number % 4 == 1:
                began = time.perf_counter()
                await sender.send_round(few, number + 1)
                way_s = time.perf_counter() - began
                found.append(Measurement("way", way_s * 1e3, "ms", "neither", where))
                continue
            np.take(pages, indices, axis=0, out=written, mode="clip")
            pages[indices] = written
            moved = await mover.move(memory, indices)
            await sender.send_round(few, number + 1)
            ratio = (applied - paused) / moved.wall_s
            found.append(Measurement("moved", moved.wall_s * 1e3, "ms", "neither", where))
            found.append(Measurement("moved_cpu", moved.cpu_s * 1e3, "ms", "neither", where))
            found.append(Measurement("applied_of_moved", ratio, "x", "lower", where))
        await sender.send_record(0, b"", flush=True)
    return found
