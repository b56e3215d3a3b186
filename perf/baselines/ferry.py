"""A full copy of an image by `transport`, from one process to another, as `send` and `receive` do.

The clock runs from the call of `send_round` with every page to its return, when all of them are
acknowledged as applied; both sides have loaded their code before. The target's memory is shared,
and nobody has touched it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from perf.baselines import DEADLINE_S, Copy
from perf.child import Stopwatch, child
from perf.errors import BenchmarkFailed
from perf.links import TCP, Link
from perf.processes.sender import READY
from perf.workloads.images import KeptMemory
from transport.wire.frames import PAGE_BYTES


def copy(image: Path, options: Mapping[str, object] | None = None, *, link: Link = TCP) -> Copy:
    """Copies `image` (a multiple of 4096 bytes) over `link` and proves that all has arrived.

    `options` are those of `perf.processes.sender`. Raises `BenchmarkFailed`.
    """
    n_bytes = image.stat().st_size
    target_command = ("pages", link.url("pages"), str(n_bytes // PAGE_BYTES))
    with (
        KeptMemory(n_bytes) as kept,
        child("perf.processes.receivers", *target_command, prefix=link.target_prefix) as target,
    ):
        source_command = (target.line(), str(image), json.dumps(dict(options or {})))
        with child("perf.processes.sender", *source_command, prefix=link.source_prefix) as source:
            if source.line() != READY:
                raise BenchmarkFailed("the sender did not become ready")
            kept.give_back()
            watch = Stopwatch(source.pid, target.pid)
            source.go()
            done = json.loads(source.line(DEADLINE_S))
            cost = watch.stop()
            source.go()
            if differing := int(source.line()):
                raise BenchmarkFailed(f"{differing} pages have not arrived as they were")
    return Copy(
        guest_bytes=n_bytes,
        wire_bytes=done["wire_bytes"],
        wall_s=done["duration_ns"] / 1e9,
        source_cpu_s=cost.cpu_s_of[source.pid],
        target_cpu_s=cost.cpu_s_of[target.pid],
    )
