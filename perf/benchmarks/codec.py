"""The codec that lanes choose by themselves, against each fixed one, on several links.

`links` are those of `perf.links.open_link`. An image is as large as `seconds` of a shaped link can
carry uncompressed, `mib` at most. The best fixed codec of a link is the one with the
smallest median of all repetitions.
"""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from perf.baselines import Copy, ferry
from perf.benchmark import Context, Measurement
from perf.links import open_link
from perf.results import Dimension
from perf.workloads.images import Mix, image_file

AUTO = "auto"
MIB = 1 << 20


def run(context: Context) -> Iterator[Measurement]:
    for name in context.text("links").split("+"):
        yield from _on_link(context, name)


def _on_link(context: Context, link_name: str) -> Iterator[Measurement]:
    zero = float(context.settings["zero"])
    n_mib = context.number("mib")
    with ExitStack() as stack:
        link = stack.enter_context(open_link(link_name))
        if link.bits_per_s:
            carried = float(context.settings["seconds"]) * link.bits_per_s / 8
            n_mib = min(n_mib, max(1, int(carried / (1 - zero) / MIB)))
        image = stack.enter_context(image_file(n_mib * MIB, Mix(zero=zero)))
        names = [AUTO, *context.codecs("codecs")]
        ways = {name: partial(ferry.copy, image, {"codec": name}, link=link) for name in names}
        rounds: list[dict[str, Copy]] = list(context.alternate(**ways))
    where: dict[str, Dimension] = {"link": link.name, "image-mib": n_mib}
    walls = {name: [copies[name].wall_s for copies in rounds] for name in names}
    best = min(names[1:], key=lambda name: statistics.median(walls[name]))
    for copies in rounds:
        for name, copy in copies.items():
            how = {**where, "codec": name}
            yield Measurement("time", copy.wall_s, "s", "lower", how)
            wire = copy.wire_bytes / copy.guest_bytes
            yield Measurement("wire_of_guest", wire, "x", "lower", how)
        ratio = copies[AUTO].wall_s / copies[best].wall_s
        yield Measurement("time_of_best_fixed", ratio, "x", "lower", {**where, "best": best})
