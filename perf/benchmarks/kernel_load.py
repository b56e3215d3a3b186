"""What a process pays before it can use the kernels: imports, and loading them from the cache."""

import subprocess
import sys
from collections.abc import Iterator

from perf.benchmark import Context, Measurement
from transport.kernels.compiled import warm_up

PROGRAM = (
    "import time; a = time.perf_counter(); import numba; b = time.perf_counter()\n"
    "import transport.encoder, transport.decoder; c = time.perf_counter()\n"
    "from transport.kernels.compiled import warm_up; w = warm_up()\n"
    "print(b - a, c - b, w.seconds)"
)


def run(context: Context) -> Iterator[Measurement]:
    warm_up()  # fills the cache
    for _ in range(context.repeat):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
        numba, ours, load = map(float, done.stdout.split())
        yield Measurement("import_numba", numba, "s", "neither")
        yield Measurement("import_transport", ours, "s", "lower")
        yield Measurement("load_kernels", load, "s", "lower")
