"""From starting `send` and `receive` to the first page on its way.

Both are started at the same time, between two hosts of real processes whose guest is at work, as
after a decision to migrate. `iops` bounds the guest's rate (0: unbounded), which otherwise keeps
the processors busy that both hosts, their devices and gateways have in common here. `cold` more
starts have an empty cache: the kernels are compiled, and whether both processes say so is measured
as well.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.testbed import Process, Setup, Testbed
from perf.benchmark import Context, Measurement
from perf.errors import BenchmarkFailed

END_S = 120.0
FILL_CACHES = (
    "import ferry.commands.send, ferry.commands.receive\n"
    "from transport.kernels.load import warm_up\nwarm_up()"
)


def run(context: Context) -> Iterator[Measurement]:
    with (
        tempfile.TemporaryDirectory() as modules,
        # What an installed Python has beside its sources, also where these may not be written to.
        _environment(PYTHONPYCACHEPREFIX=modules, PYTHONDONTWRITEBYTECODE=""),
    ):
        subprocess.run([sys.executable, "-c", FILL_CACHES], check=True)
        for _ in range(context.repeat):
            yield from _start("warm", context.text("iops"))
        for _ in range(context.number("cold")):
            with (
                tempfile.TemporaryDirectory() as kernels,
                _environment(VFIO_FERRY_CACHE=kernels),
            ):
                yield from _start("cold", context.text("iops"))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets environment variables, for the block, for the processes that are started in it."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start(cache: str, iops: str) -> Iterator[Measurement]:
    where = {"cache": cache}
    setup = Setup(device=("--logging", "4096"), guest=("--iops", iops))
    with tempfile.TemporaryDirectory() as folder, Testbed(Path(folder), setup) as bed:
        a, b = bed.hosts["a"], bed.hosts["b"]
        bed.start_host(a, incoming=False)
        bed.start_host(b, incoming=True)
        bed.wait_operations(a, 100)
        link = f"ipc://{folder}/link.sock"
        began = time.time()
        receive = bed.start(
            "receive",
            *("receive", "--listen", link, "--json"),
            *("--gateway", b.control_socket, "--qmp", b.qmp_socket),
        )
        send = bed.start(
            "send",
            *("send", "--to", link, "--json", "--connect-timeout", "60"),
            *("--gateway", a.control_socket, "--qmp", a.qmp_socket),
        )
        if send.wait(END_S) or receive.wait(END_S):
            raise BenchmarkFailed(f"the migration failed: {send.tail()}")
        listening = receive.wait_event("listening")
        first = send.wait_event("round")
        first_page_s = first["time"] - first["duration_ms"] / 1e3 - began
        yield Measurement("listening", listening["time"] - began, "s", "lower", where)
        yield Measurement("first_page", first_page_s, "s", "lower", where)
        said = _says_that_it_compiles(send) and _says_that_it_compiles(receive)
        yield Measurement("says_so", float(said), "0 or 1", "neither", where)


def _says_that_it_compiles(process: Process) -> bool:
    return any("compiling" in event.get("text", "") for event in process.events)
