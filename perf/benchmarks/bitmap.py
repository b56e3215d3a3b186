"""Bitmap scans on one core, beside reading the same bytes and beside numpy."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from perf.benchmark import Context, Measurement, cpu_seconds
from transport.kernels.bitmap import bitmap_to_indices, count

GIB = 1 << 30
DENSITIES = (0.0, 0.001, 0.01, 0.5)
SCANS = {"count": count, "to_indices": bitmap_to_indices}

Words = npt.NDArray[np.uint64]


def bitmap(density: float, n_bytes: int) -> Words:
    """A bitmap of which the share `density` of the bits are set, at random."""
    if density == 0:
        # Written, because pages never touched would all be the same one, out of the cache.
        return np.full(n_bytes // 8, 0, np.uint64)
    rng = np.random.default_rng(1)
    bits = rng.random(n_bytes * 8 // 64, np.float32) < density
    # The same pattern 64 times: random numbers for every bit would take minutes.
    return np.tile(np.packbits(bits, bitorder="little"), 64).view(np.uint64)


def numpy_scan(words: Words) -> npt.NDArray[np.intp]:
    """The numbers of the bits that are set, found in two lines of numpy."""
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def run(context: Context) -> Iterator[Measurement]:
    n_bytes = context.number("mib") << 20
    for density in DENSITIES:
        words = bitmap(density, n_bytes)
        where = {"density": density}
        works: dict[str, Callable[[Words], object]] = {
            "numpy": numpy_scan,
            "read": np.bitwise_or.reduce,
            **SCANS,
        }
        timed = {name: partial(cpu_seconds, partial(work, words)) for name, work in works.items()}
        for seconds in context.alternate(**timed):
            yield Measurement("read", n_bytes / seconds["read"] / GIB, "GiB/s", "neither", where)
            for name in SCANS:
                taken = seconds[name]
                yield Measurement(name, n_bytes / taken / GIB, "GiB/s", "higher", where)
                for peer in ("read", "numpy"):
                    ratio = seconds[peer] / taken
                    yield Measurement(f"{name}_of_{peer}", ratio, "x", "higher", where)
