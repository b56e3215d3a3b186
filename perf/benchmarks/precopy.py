"""The rounds of a made-up guest that writes so many pages a second, by a pattern, while it is sent.

Rounds are sent, and judged as `send` does, until what the guest has written meanwhile fits into
`downtime-ms`, or does not get less any more; then the guest is paused and the last round is sent.
`pages-per-s`, `pattern` (`perf.workloads.dirtying`) and `changed`, the share of a page that a write
replaces, make the guest; the link is one of `perf.links.open_link`. Both sides and the guest share
the machine. All pages are compared at the end.
"""

import json
from collections.abc import Iterator

from perf.baselines import DEADLINE_S
from perf.benchmark import Context, Measurement
from perf.child import child
from perf.errors import BenchmarkFailed
from perf.links import open_link
from perf.workloads.dirtying import check_pattern
from transport.wire.frames import PAGE_BYTES

AUTO = "auto"
MIB = 1 << 20


def run(context: Context) -> Iterator[Measurement]:
    check_pattern(context.text("pattern"))
    if context.text("codec") != AUTO:
        context.codecs("codec")
    for _ in range(context.repeat):
        yield from _measurements(context, _migrate(context))


def _migrate(context: Context) -> dict[str, float]:
    settings = dict(context.settings)
    n_pages = context.number("mib") * MIB // PAGE_BYTES
    with open_link(context.text("link")) as link:
        receiver = ("pages", link.url("pages"), str(n_pages))
        with child("perf.processes.receivers", *receiver, prefix=link.target_prefix) as target:
            sender = (target.line(), json.dumps(settings))
            with child("perf.processes.dirtied", *sender, prefix=link.source_prefix) as source:
                found: dict[str, float] = json.loads(source.line(DEADLINE_S))
    if found["differing"]:
        raise BenchmarkFailed(f"{found['differing']:g} pages have not arrived as they were")
    return found


def _measurements(context: Context, found: dict[str, float]) -> Iterator[Measurement]:
    dirtied = found["dirtied_pages"]
    yield Measurement("dirtied", dirtied / found["precopy_s"], "pages/s", "neither")
    yield Measurement("rounds", found["rounds"], "", "lower")
    yield Measurement("fits", float(found["fits"]), "0 or 1", "higher")
    yield Measurement("precopy", found["precopy_s"], "s", "lower")
    full = found["precopy_s"] / found["full_round_s"]
    yield Measurement("precopy_of_full_round", full, "x", "lower")
    yield Measurement("last_round", found["last_round_ms"], "ms", "lower")
    guest_bytes = context.number("mib") * MIB
    yield Measurement("wire_of_guest", found["wire_bytes"] / guest_bytes, "x", "lower")
    if dirtied:
        wire = found["dirtied_wire_bytes"] / (dirtied * PAGE_BYTES)
        yield Measurement("wire_of_dirtied", wire, "x", "lower")
