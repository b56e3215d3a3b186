"""The least that a full copy over TCP or UNIX sockets can be: the pages that are not zero, as they
are, into fresh memory. Nothing says where they belong, and nothing checks them; which pages are
zero is known before the clock starts. A limit, not a peer.
"""

from pathlib import Path

from perf.baselines import DEADLINE_S, Copy
from perf.child import Stopwatch, child
from perf.links import TCP, Link
from perf.workloads.images import KeptMemory

PARTY = "perf.processes.tcp"


def copy(image: Path, connections: int, *, link: Link = TCP) -> Copy:
    """Copies `image` over `link`. Raises `BenchmarkFailed`."""
    n_bytes = image.stat().st_size
    listen = str(link.sockets / "bare") if link.sockets else link.target_address
    target_command = ("receive", listen, str(connections), str(n_bytes))
    with (
        KeptMemory(n_bytes) as kept,
        child(PARTY, *target_command, prefix=link.target_prefix) as target,
    ):
        source_command = ("send", target.line(), str(connections), str(image))
        with child(PARTY, *source_command, prefix=link.source_prefix) as source:
            wire_bytes = int(source.line())
            kept.give_back()
            watch = Stopwatch(source.pid, target.pid)
            source.go()
            source.line(DEADLINE_S)
            cost = watch.stop()
    return Copy(
        guest_bytes=n_bytes,
        wire_bytes=wire_bytes,
        wall_s=cost.wall_s,
        source_cpu_s=cost.cpu_s_of[source.pid],
        target_cpu_s=cost.cpu_s_of[target.pid],
    )
