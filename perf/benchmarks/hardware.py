"""What it costs that a device with queues moves: over vfio-user, and functions of a host (L1).

`vfio-user` is a controller process of ours; `l1` is QEMU's NVMe controller behind the stock
`vfio-pci` of an emulated host, where everything is an order slower and only proportions say
something.

- `read`: a register, by whoever owns the device (`direct`) and by a VMM through the gateway.
- `doorbells`: posted writes that tell of nothing new, followed by the watch.
- `walk_ahead`, `walk_rest`: a pair of I/O `queue`s from a reset to twice around its
  rings, less one; then what a guest submits before its pause, which is in the downtime.
- `pin`, `unpin`: memory that a function is shown and taken (`l1`).
- `dirty_by_queues`: what a round of commands wrote, asked of the gateway, in a sparse guest of
  `gib`; `dirty_by_scan`: a scan of as much memory, none of which is there, so it is not slower.
- `downtime`: the demonstration's guest, with all that it writes meanwhile.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from perf.benchmark import Context, Measurement
from perf.child import process
from perf.errors import BenchmarkFailed

WHERE = ("vfio-user", "l1")
L1_DEADLINE_S = 900.0
LINE_DEADLINE_S = 300.0


def run(context: Context) -> Iterator[Measurement]:
    where = context.text("where")
    if where not in WHERE:
        raise BenchmarkFailed(f"where={where!r} is none of {', '.join(WHERE)}")
    words = [
        "-m",
        "perf.processes.queues",
        json.dumps({**context.settings, "repeat": context.repeat}),
    ]
    yield from _here(words) if where == "vfio-user" else _in_l1(words)


def _here(words: list[str]) -> Iterator[Measurement]:
    with process([sys.executable, *words], name="perf.processes.queues") as it:
        while (line := it.line(LINE_DEADLINE_S)) != "end":
            yield Measurement(**json.loads(line))


def _in_l1(words: list[str]) -> Iterator[Measurement]:
    from lab.l1.demo import compile_ahead, variables
    from lab.l1.host import run_in_l1
    from lab.qemu.environment import prepare

    environment = prepare(lambda text: print(text, file=sys.stderr))
    compile_ahead()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_in_l1(
            environment, Path(folder), (sys.executable, *words), variables(), L1_DEADLINE_S
        )
    if outcome.status:
        raise BenchmarkFailed(f"it failed in the emulated host: {outcome.output[-2000:]}")
    for line in outcome.output.splitlines():
        if line.startswith("{"):
            yield Measurement(**json.loads(line))
