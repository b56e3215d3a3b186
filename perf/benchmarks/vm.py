"""A stock guest that is moved from one QEMU to another while it runs and writes: by us, with a
pass-through device, and by QEMU's own migration with each of its settings, without one.

The link is one of `perf.links.open_link`; each move has a guest of its own, whose page cache holds
`content` MiB of the files below the folder `files`, and whose `writer` is one of
`perf.workloads.writers`. `time` runs from the command to the guest running at the target, and
holds the start of `send` as a process (`migration` does not); `work` is how much of its work the
guest does while it is moved and runs, of that before. A way that is not done after `deadline-s`
has no figures but `came_to_an_end` 0, and counts as slower than the others.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import trio

from lab.qemu.environment import cached
from perf.baselines import qemu
from perf.baselines.vm import Guest, Move, Terms, move
from perf.benchmark import Context, Measurement
from perf.errors import NeedMissing
from perf.links import open_link
from perf.results import Better
from perf.workloads import writers
from perf.workloads.images import FolderPages, Mix, file_pages, image_file

OURS = "ferry"
PLAIN = "plain"
MADE_UP = "none"
MIB = 1 << 20
FIGURES: Mapping[str, Callable[[Move], float]] = {
    "time": lambda moved: moved.command_s,
    "migration": lambda moved: moved.migration_s,
    "wire": lambda moved: moved.wire_bytes,
    "downtime": lambda moved: moved.downtime_ms,
    "cpu": lambda moved: moved.cpu_s,
}
"""What of ours is compared with the best of QEMU's settings."""


def run(context: Context) -> Iterator[Measurement]:
    environment = cached()
    if environment is None:
        raise NeedMissing("a guest's kernel is needed: `python -m lab.qemu prepare` makes it")
    writers.check(context.text("writer"))
    settings = {OURS: None} | {
        name: qemu.setting(name) for name in context.text("peers").split("+")
    }
    terms = Terms(
        context.number("downtime-ms"), context.number("settle-s"), context.number("deadline-s")
    )
    folder = context.text("files")
    pages = FolderPages(Path(folder)) if folder != MADE_UP else file_pages
    content_bytes = context.number("content") * MIB
    with (
        open_link(context.text("link")) as link,
        image_file(content_bytes, Mix(zero=0), file_pages=pages) as content,
    ):
        guest = Guest(
            environment,
            content,
            context.number("mib") * MIB,
            context.text("writer"),
            context.number("set"),
        )
        for number in range(context.repeat):
            names = sorted(settings, reverse=bool(number % 2))
            found = {
                name: trio.run(partial(move, guest, settings[name], link, terms)) for name in names
            }
            yield from _measurements(found)


def _measurements(found: dict[str, Move | None]) -> Iterator[Measurement]:
    for way, moved in found.items():
        where = {"way": way}
        more: Better = "higher" if way == OURS else "neither"
        less: Better = "lower" if way == OURS else "neither"
        yield Measurement("came_to_an_end", moved is not None, "", more, where)
        if moved is None:
            continue
        yield Measurement("time", moved.command_s, "s", less, where)
        yield Measurement("migration", moved.migration_s, "s", less, where)
        yield Measurement("wire", moved.wire_bytes / MIB, "MiB", less, where)
        yield Measurement("downtime", moved.downtime_ms, "ms", less, where)
        yield Measurement("work", moved.work, "x", more, where)
        for side, cpu_s in (("source", moved.source_cpu_s), ("target", moved.target_cpu_s)):
            yield Measurement("cpu", cpu_s, "s", less, where | {"side": side})
    ours = found[OURS]
    if ours is None:
        return
    if ours.lanes_share is not None and ours.send_bytes is not None:
        yield Measurement("lanes_share", ours.lanes_share, "x", "higher")
        yield Measurement("send_memory", ours.send_bytes / MIB, "MiB", "lower")
    peers = {way: moved for way, moved in found.items() if moved is not None and way != OURS}
    if not peers:
        return
    for name, figure in FIGURES.items():
        best = min(figure(moved) for moved in peers.values())
        yield Measurement(f"{name}_of_best_qemu", figure(ours) / best, "x", "lower")
        if plain := peers.get(PLAIN):
            yield Measurement(f"{name}_of_plain", figure(ours) / figure(plain), "x", "lower")
