"""What a migration under way takes from its guest: the guest's I/O rate, state by state.

The small guest of this project keeps its disk busy. `passthrough`: no migration (before and after).
`slow`: mediated, with a link that lets 64 KiB through a second, so that there is hardly any
copying. `dead`: the same, but the receiver has been stopped: nothing is taken from the link any
more, and the journal and the dirty pages pile up. Slow and dead take turns. A dead link costs the
guest nothing if their rates are the same.

`depth` requests are in flight. With 1, each waits for the one before, so the rate is the inverse of
their latency; with many and two cores, the guest and its device keep both busy, and what is
measured is who gets a core when. `iops` bounds the rate (0: unbounded): then the cores are not
busy, and what a state takes from the guest is told apart from what `send` and `receive` take from
the cores. `cpu` says how much that is.
"""

import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lab.testbed import Host, Process, Setup, Testbed
from perf.benchmark import Context, Measurement
from perf.child import Stopwatch
from perf.statistics import permutation_test

MIB = 1 << 20
WARM_UP_OPERATIONS = 1000
SETTLE_S = 0.05
"""How long the guest is left alone between one state and the next."""
SLOW = ("--bandwidth", "64K", "--peer-timeout", "120")
PAIRS = (("slow", "passthrough"), ("dead", "passthrough"), ("dead", "slow"))


class Interval(NamedTuple):
    """What was seen in one interval of a state."""

    mib_per_s: float
    cores: Mapping[str, float]
    """How much of a core each process took."""


def run(context: Context) -> Iterator[Measurement]:
    guest = ("--queue-depth", context.text("depth"), "--iops", context.text("iops"))
    setup = Setup(device=("--logging", "4096"), guest=guest)
    interval_s = context.number("milliseconds") / 1e3
    for _ in range(context.repeat):
        with tempfile.TemporaryDirectory() as folder, Testbed(Path(folder), setup) as bed:
            yield from _figures(_measure(bed, context.number("intervals"), interval_s))


def _measure(bed: Testbed, n_intervals: int, interval_s: float) -> dict[str, list[Interval]]:
    a, b = bed.hosts["a"], bed.hosts["b"]
    bed.start_host(a, incoming=False)
    bed.start_host(b, incoming=True)
    bed.wait_operations(a, WARM_UP_OPERATIONS)
    assert a.guest is not None and a.device is not None and a.gateway is not None
    always = {"guest": a.guest, "device": a.device, "gateway": a.gateway}
    found: dict[str, list[Interval]] = {"passthrough": [], "slow": [], "dead": []}

    def passthrough() -> None:
        for _ in range(n_intervals // 2):
            found["passthrough"].append(_watch(a, always, interval_s))

    passthrough()
    receive = bed.receive(b)
    send = bed.send(a, b, *SLOW)
    send.wait_event("phase", phase="precopy")
    for number in range(n_intervals):
        for state in ("slow", "dead") if number % 2 else ("dead", "slow"):
            receive.signal(signal.SIGCONT if state == "slow" else signal.SIGSTOP)
            time.sleep(SETTLE_S)
            ours = {"send": send, "receive": receive}
            found[state].append(_watch(a, {**always, **ours}, interval_s))
    receive.resume()
    send.kill()
    a.gateway.wait_event("restored")
    passthrough()
    return found


def _figures(found: Mapping[str, list[Interval]]) -> Iterator[Measurement]:
    rates = {state: [each.mib_per_s for each in several] for state, several in found.items()}
    for state, several in found.items():
        for rate in rates[state]:
            yield Measurement("rate", rate, "MiB/s", "higher", {"state": state})
        for name in several[0].cores:
            cores = statistics.fmean(each.cores[name] for each in several)
            yield Measurement("cpu", cores, "cores", "lower", {"state": state, "of": name})
    for state, other in PAIRS:
        ratio = statistics.fmean(rates[state]) / statistics.fmean(rates[other])
        yield Measurement(f"{state}_of_{other}", ratio, "x", "higher")
        p = permutation_test(rates[state], rates[other], "mean")
        yield Measurement(f"{state}_of_{other}_p", p, "", "neither")


def _watch(host: Host, processes: Mapping[str, Process], interval_s: float) -> Interval:
    """The rate is of what the guest's device moved from and to its disk. (The guest itself tells
    only one QMP client at a time how far it is, and that is `send`.)"""
    watch = Stopwatch(*(process.pid for process in processes.values()))
    n_bytes = host.disk_bytes()
    time.sleep(interval_s)
    n_bytes = host.disk_bytes() - n_bytes
    cost = watch.stop()
    cores = {name: cost.cpu_s_of[each.pid] / cost.wall_s for name, each in processes.items()}
    return Interval(n_bytes / MIB / cost.wall_s, cores)
