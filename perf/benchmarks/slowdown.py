"""What a migration under way takes from its guest: the guest's I/O rate, state by state.

The small guest of this project keeps its disk busy. `passthrough`: no migration (before and after,
the mean of both). `slow`: mediated, with a link that lets 64 KiB through a second, so that there is
hardly any copying. `dead`: the same, but the receiver has been stopped: nothing is taken from the
link any more, and the journal and the dirty pages pile up. A dead link costs the guest
nothing if these two rates, which are measured in turn, are the same.
"""

import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ferry.testbed import Host, Setup, Testbed
from perf.benchmark import Context, Measurement

MIB = 1 << 20
ALTERNATIONS = 3
WARM_UP_OPERATIONS = 2000
SLOW = ("--bandwidth", "64K", "--peer-timeout", "120")


def run(context: Context) -> Iterator[Measurement]:
    setup = Setup(device=("--logging", "4096"))
    for _ in range(context.repeat):
        with tempfile.TemporaryDirectory() as folder, Testbed(Path(folder), setup) as bed:
            yield from _measure(bed, context.number("milliseconds") / 1e3)


def _measure(bed: Testbed, interval_s: float) -> Iterator[Measurement]:
    a, b = bed.hosts["a"], bed.hosts["b"]
    bed.start_host(a, incoming=False)
    bed.start_host(b, incoming=True)
    bed.wait_operations(a, WARM_UP_OPERATIONS)
    before = _io_rate(a, interval_s)
    receive = bed.receive(b)
    send = bed.send(a, b, *SLOW)
    send.wait_event("phase", phase="precopy")
    found: dict[str, list[float]] = {"slow": [], "dead": []}
    for _ in range(ALTERNATIONS):
        found["slow"].append(_io_rate(a, interval_s))
        receive.signal(signal.SIGSTOP)
        found["dead"].append(_io_rate(a, interval_s))
        receive.resume()
    send.kill()
    assert a.gateway is not None
    a.gateway.wait_event("restored")
    found["passthrough"] = [before, _io_rate(a, interval_s)]
    rates = {state: statistics.fmean(several) for state, several in found.items()}
    for state, rate in rates.items():
        yield Measurement("rate", rate, "MiB/s", "higher", {"state": state})
    for state in ("slow", "dead"):
        ratio = rates[state] / rates["passthrough"]
        yield Measurement("of_passthrough", ratio, "x", "higher", {"state": state})
    yield Measurement("dead_of_slow", rates["dead"] / rates["slow"], "x", "higher")


def _io_rate(host: Host, interval_s: float) -> float:
    """MiB that the guest's device moved from and to its disk, a second. (The guest itself tells
    only one QMP client at a time how far it is, and that is `send`.)"""
    first, began = _io_bytes(host), time.perf_counter()
    time.sleep(interval_s)
    last, ended = _io_bytes(host), time.perf_counter()
    return (last - first) / MIB / (ended - began)


def _io_bytes(host: Host) -> int:
    assert host.device is not None
    counts = dict(
        line.split(": ") for line in Path(f"/proc/{host.device.pid}/io").read_text().splitlines()
    )
    return int(counts["rchar"]) + int(counts["wchar"])
