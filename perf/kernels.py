"""How fast the compiled loops are, beside memcpy and numpy in the same run.

    python -m perf.kernels [--mib 256] [--bitmap-mib 32] [--repeat 5] [--trace FILE]

Prints one JSON object a line: `metric`, `value` (median of the repeats), `unit`, and where it says
something, `ratio` and what it is a ratio `to`. One thread; times are CPU times, so that a busy
machine disturbs less (except at the start, which is by the clock). Memory is random, so that it
neither compresses nor is zero, unless the metric says otherwise. `--trace` adds the rounds of a
recorded guest (its folder's load_trace.py reads it): time for each page, wire bytes for each byte.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transport.decoder import Decoder
from transport.encoder import Encoder
from transport.frames import DEFAULT_FRAME_BYTES, PAGE_BYTES
from transport.kernels.bitmap import bitmap_to_indices, bitmap_to_runs, count
from transport.kernels.compiled import warm_up
from transport.kernels.digests import digest_all, scan_changed
from transport.replica import Replica

SEED = 0x5EED
TRACE_CACHE_BYTES = 256 << 20
GIB = 1 << 30

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]


def say(metric: str, value: float, unit: str, **more: float | str) -> None:
    line: dict[str, float | str] = {"metric": metric, "value": value, "unit": unit, **more}
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps({"benchmark": "kernels", **rounded}), flush=True)


def seconds(work: Callable[[], object], repeat: int, prepare: Callable[[], object] = int) -> float:
    """Median CPU time of `work`, with `prepare` before each and a first run that does not count."""
    times = []
    for _ in range(repeat + 1):
        prepare()
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return statistics.median(times[1:])


def measure_start() -> None:
    """Import and first use in a process of its own, kernels from the cache."""
    program = (
        "import time; a = time.perf_counter(); import numba; b = time.perf_counter()\n"
        "import transport.encoder, transport.decoder; c = time.perf_counter()\n"
        "from transport.kernels.compiled import warm_up; w = warm_up()\n"
        "print(b - a, c - b, w.seconds, w.compiled)"
    )
    say("compiled_at_start", warm_up().compiled, "kernels")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    numba, ours, load, compiled = map(float, done.stdout.split())
    say("import_numba", numba, "s")
    say("import_transport", ours, "s")
    say("load_kernels", load, "s", compiled=compiled)


def bitmap(density: float, n_bytes: int) -> Words:
    rng = np.random.default_rng(1)
    if density == 0:
        # Written, because pages never touched would all be the same one, out of the cache.
        return np.full(n_bytes // 8, 0, np.uint64)
    bits = rng.random(n_bytes * 8 // 64, np.float32) < density
    # The same pattern 64 times: random numbers for every bit would take minutes.
    return np.tile(np.packbits(bits, bitorder="little"), 64).view(np.uint64)


def measure_bitmaps(n_bytes: int, repeat: int) -> None:
    empty = bitmap(0, n_bytes)
    read = seconds(lambda: np.bitwise_or.reduce(empty), repeat)
    say("bitmap_read_numpy", n_bytes / read / GIB, "GiB/s")
    for density in (0.0, 1e-4, 0.01, 0.1, 0.5):
        words = bitmap(density, n_bytes)
        numpy = seconds(
            lambda words=words: np.flatnonzero(  # type: ignore[misc]
                np.unpackbits(words.view(np.uint8), bitorder="little")
            ),
            1,
        )
        for name, scan in (
            ("count", count),
            ("to_indices", bitmap_to_indices),
            ("to_runs", bitmap_to_runs),
        ):
            taken = seconds(lambda scan=scan, words=words: scan(words), repeat)  # type: ignore[misc]
            say(
                f"bitmap_{name}",
                n_bytes / taken / GIB,
                "GiB/s",
                density=density,
                ratio=numpy / taken,
                to="numpy unpackbits and flatnonzero",
            )


class Lane:
    """An encoder and a decoder, and two memories."""

    def __init__(self, source: Bytes, cache_bytes: int) -> None:
        self.source = source
        self.n_pages = source.size // PAGE_BYTES
        self.target = np.zeros_like(source)
        self.replica = Replica(self.n_pages, cache_bytes)
        self.encoder = Encoder(source, self.replica, SEED)
        self.decoder = Decoder(self.target, self.n_pages, SEED)
        self.out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)
        self.frames: list[bytes] = []
        self.encode_seconds = self.decode_seconds = 0.0

    def encode(self, indices: npt.NDArray[np.uint32]) -> None:
        """Encode all of `indices`; frames are kept for `decode`."""
        start = 0
        while start < indices.size:
            sequence = self.decoder.next_sequence + len(self.frames)
            began = time.thread_time()
            done = self.encoder.encode(indices, start, self.out, round_no=0, sequence=sequence)
            self.encode_seconds += time.thread_time() - began
            start += done.consumed
            if done.n_bytes:
                self.frames.append(self.out[: done.n_bytes].tobytes())

    def decode(self) -> int:
        """Apply the frames that were kept. Returns their bytes."""
        began = time.thread_time()
        for frame in self.frames:
            self.decoder.apply(frame)
        self.decode_seconds += time.thread_time() - began
        n_bytes = sum(map(len, self.frames))
        self.frames = []
        return n_bytes


def measure_pages(n_bytes: int, repeat: int) -> None:
    memory = np.random.default_rng(2).integers(0, 256, n_bytes, np.uint8)
    copy = np.zeros_like(memory)
    memcpy = n_bytes / seconds(lambda: np.copyto(copy, memory), repeat) / GIB
    say("memcpy", memcpy, "GiB/s")

    def rate(metric: str, taken: float) -> None:
        say(
            metric,
            n_bytes / taken / GIB,
            "GiB/s",
            ratio=n_bytes / taken / GIB / memcpy,
            to="memcpy",
        )

    lane = Lane(memory, n_bytes)
    everything = np.arange(lane.n_pages, dtype=np.uint32)
    shuffled = np.random.default_rng(3).permutation(everything)
    words = memory.view(np.uint64).reshape(-1, PAGE_BYTES // 8)
    seen = digest_all(memory, SEED)

    rate("digest_all", seconds(lambda: digest_all(memory, SEED), repeat))
    rate("scan_changed_none", seconds(lambda: scan_changed(memory, seen, SEED), repeat))

    def cycle(metric: str, prepare: Callable[[], object]) -> None:
        """Change the memory, encode and decode it, and say how long each took."""
        encode, decode = [], []
        for _ in range(repeat + 1):
            prepare()
            lane.encode_seconds = lane.decode_seconds = 0.0
            lane.encode(everything)
            lane.decode()
            encode.append(lane.encode_seconds)
            decode.append(lane.decode_seconds)
        rate(f"encode_{metric}", statistics.median(encode[1:]))
        rate(f"decode_{metric}", statistics.median(decode[1:]))

    def edit() -> None:
        words[:, ::100] += np.uint64(1)

    cycle("raw", lambda: lane.replica.forget(everything))
    rate("encode_unchanged", seconds(lambda: lane.encode(everything), repeat))
    rate("encode_unchanged_shuffled", seconds(lambda: lane.encode(shuffled), repeat))
    cycle("delta", edit)
    memory[:] = 0
    cycle("zero", lambda: lane.replica.forget(everything))
    rate("encode_unchanged_zero", seconds(lambda: lane.encode(everything), repeat))


def measure_trace(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("load_trace", path.parent / "load_trace.py")
    assert spec is not None
    assert spec.loader is not None
    loader: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    base, rounds = loader.load_trace(path)
    for cache_bytes in (TRACE_CACHE_BYTES, TRACE_CACHE_BYTES // 16, 0):
        lane = Lane(base.reshape(-1).copy(), cache_bytes)
        lane.encode(np.arange(lane.n_pages, dtype=np.uint32))
        lane.decode()
        lane.encode_seconds = lane.decode_seconds = 0.0
        wire_bytes = pages = 0
        for indices, content in rounds:
            lane.source.reshape(-1, PAGE_BYTES)[indices] = content
            lane.encode(indices)
            wire_bytes += lane.decode()
            pages += indices.size
        more: dict[str, float | str] = {"trace": path.name, "cache_mib": cache_bytes >> 20}
        say("trace_wire", wire_bytes / (pages * PAGE_BYTES), "bytes/byte", **more)
        say("trace_encode", lane.encode_seconds / pages * 1e9, "ns/page", **more)
        say("trace_decode", lane.decode_seconds / pages * 1e9, "ns/page", **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="memory, MiB")
    parser.add_argument("--bitmap-mib", type=int, default=32, help="bitmap, MiB")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--trace", type=Path, action="append", default=[])
    options = parser.parse_args()
    measure_start()
    measure_bitmaps(options.bitmap_mib << 20, options.repeat)
    measure_pages(options.mib << 20, options.repeat)
    for path in options.trace:
        measure_trace(path)


if __name__ == "__main__":
    main()
