"""What `send` takes of its host's memory beside the guest's, over a thousand rounds.

`private` is what the process costs: memory that is its own and no file's. `resident` adds the pages
of programs and libraries that are mapped in: all processes share them, and the kernel drops them
when it needs room. The bar is held against `private`, less the 16 bytes a page and the cache that
it allows; how much of the cache is used depends on the codec, and on what `auto` has tried.
`growth` is from a tenth of the rounds to all.
"""

import json
from collections.abc import Iterator

from perf.benchmark import Context, Measurement
from perf.child import child
from perf.links import TCP
from transport.wire.frames import PAGE_BYTES

MIB = 1 << 20
BYTES_PER_PAGE = 16


def run(context: Context) -> Iterator[Measurement]:
    n_pages = context.number("mib") * MIB // PAGE_BYTES
    rounds = context.number("rounds")
    for _ in range(context.repeat):
        with child("perf.processes.receivers", "pages", TCP.url("pages"), str(n_pages)) as party:
            marks = _measure(context, party.line(), rounds)
        early, late = marks[rounds // 10], marks[rounds]
        allowed = n_pages * BYTES_PER_PAGE + context.number("cache-mib") * MIB
        for kind in ("private", "resident"):
            for label, at in (("start", marks[0]), ("rounds", late)):
                where = {"memory": kind, "after": label}
                yield Measurement("taken", at[kind] / MIB, "MiB", "lower", where)
            beyond = (late[kind] - allowed) / MIB
            yield Measurement("beyond_allowance", beyond, "MiB", "lower", {"memory": kind})
            grown = (late[kind] - early[kind]) / MIB
            yield Measurement("growth", grown, "MiB", "lower", {"memory": kind})


def _measure(context: Context, url: str, rounds: int) -> dict[int, dict[str, int]]:
    """What `perf.processes.rounds` says of its memory, by the number of rounds that were over."""
    arguments = (
        url,
        *(context.text(name) for name in ("mib", "cache-mib", "codec", "rounds", "dirty")),
    )
    with child("perf.processes.rounds", *arguments, f"{rounds // 10},{rounds}") as sender:
        found = [json.loads(sender.line()) for _ in range(3)]
    return {each["rounds"]: each for each in found}
