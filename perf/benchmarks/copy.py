"""A full copy of a memory image from one process to another: ours, QEMU's, and a bare stream.

The link is one of `perf.links.open_link`.
Each copy has processes and target memory of its own, and is compared with the image afterwards.
Ours uses `codec`. `bare` sends nothing but the pages that are not zero: what TCP and the target's
memory allow. What is not zero is what the files below the folder `files` hold, or made up if that
is `none`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from perf.baselines import Copy, ferry, qemu, tcp
from perf.benchmark import Context, Measurement
from perf.links import open_link
from perf.results import Better
from perf.workloads.images import FolderPages, Mix, file_pages, image_file

OURS = "ferry"
BARE = "bare"
REFERENCE = "multifd"
"""QEMU's fastest setting where the link is not the bottleneck."""
CONNECTIONS = 2
MADE_UP = "none"
GIB = 1 << 30


def run(context: Context) -> Iterator[Measurement]:
    with ExitStack() as stack:
        link = stack.enter_context(open_link(context.text("link")))
        n_bytes = context.number("mib") << 20
        mix = Mix(zero=float(context.settings["zero"]))
        folder = context.text("files")
        pages = FolderPages(Path(folder)) if folder != MADE_UP else file_pages
        image = stack.enter_context(image_file(n_bytes, mix, file_pages=pages))
        ways: dict[str, Callable[[], Copy]] = {
            OURS: lambda: ferry.copy(image, {"codec": context.text("codec")}, link=link),
            BARE: lambda: tcp.copy(image, CONNECTIONS, link=link),
        }
        for name in context.text("peers").split("+"):
            ways[name] = partial(qemu.copy, image, qemu.setting(name), link=link)
        for copies in context.alternate(**ways):
            yield from _measurements(copies)


def _measurements(copies: dict[str, Copy]) -> Iterator[Measurement]:
    for way, copy in copies.items():
        where = {"way": way}
        more: Better = "higher" if way == OURS else "neither"
        less: Better = "lower" if way == OURS else "neither"
        gib = copy.guest_bytes / GIB
        yield Measurement("rate", gib / copy.wall_s, "GiB/s", more, where)
        for side, cpu_s in (("source", copy.source_cpu_s), ("target", copy.target_cpu_s)):
            yield Measurement("cpu", cpu_s / gib, "s/GiB", less, {**where, "side": side})
        wire = copy.wire_bytes / copy.guest_bytes
        yield Measurement("wire_of_guest", wire, "x", less, where)
    ours, bare = copies[OURS], copies[BARE]
    best_s = min(copy.wall_s for way, copy in copies.items() if way not in (OURS, BARE))
    yield Measurement("time_of_best_qemu", ours.wall_s / best_s, "x", "lower")
    yield Measurement("rate_of_bare", bare.wall_s / ours.wall_s, "x", "higher")
    if reference := copies.get(REFERENCE):
        yield Measurement("rate_of_multifd", reference.wall_s / ours.wall_s, "x", "higher")
        yield Measurement("cpu_of_multifd", ours.cpu_s / reference.cpu_s, "x", "lower")
        yield Measurement("multifd_rate_of_bare", bare.wall_s / reference.wall_s, "x", "neither")
        yield Measurement("multifd_cpu_of_bare", reference.cpu_s / bare.cpu_s, "x", "neither")
