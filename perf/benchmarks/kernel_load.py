"""What a process pays before it can use the kernels: imports, and loading them from the cache.

And once, with an empty cache, what it takes to compile them.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from perf.benchmark import Context, Measurement
from transport.kernels.declare import warm_up

PROGRAM = (
    "import time; a = time.perf_counter()\n"
    "import transport.sending.encoder, transport.receiving.decoder; b = time.perf_counter()\n"
    "from transport.kernels.declare import warm_up; w = warm_up()\n"
    "print(b - a, w.seconds)"
)


def run(context: Context) -> Iterator[Measurement]:
    warm_up()  # fills the cache
    for _ in range(context.repeat):
        ours, load = _start({})
        yield Measurement("import_transport", ours, "s", "lower")
        yield Measurement("load_kernels", load, "s", "lower")
    with tempfile.TemporaryDirectory() as folder:
        _, compiling = _start({"VFIO_FERRY_CACHE": folder})
        yield Measurement("compile_kernels", compiling, "s", "lower")


def _start(environment: dict[str, str]) -> tuple[float, float]:
    """How many seconds a new process takes for imports, and how many until the kernels are
    ready."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        check=True,
        env={**os.environ, **environment},
    )
    ours, kernels = map(float, done.stdout.split())
    return ours, kernels
