"""Digests, encoding and decoding of pages on one core, beside memcpy of the same bytes.

Memory is random, so that it neither compresses nor is zero, unless the metric says otherwise.
"""

from collections.abc import Callable, Iterator

import numpy as np

from perf.benchmark import Context, Measurement, cpu_seconds
from perf.lane import SEED, Lane
from perf.results import Better
from transport.kernels.digests import digest_all, scan_changed
from transport.wire.frames import PAGE_BYTES

GIB = 1 << 30


def run(context: Context) -> Iterator[Measurement]:
    n_bytes = context.number("mib") << 20
    memory = np.random.default_rng(2).integers(0, 256, n_bytes, np.uint8)
    copy = np.zeros_like(memory)
    lane = Lane(memory, n_bytes)
    shuffled = np.random.default_rng(3).permutation(lane.everything)
    words = memory.view(np.uint64).reshape(-1, PAGE_BYTES // 8)
    seen = digest_all(memory, SEED)

    def memcpy() -> float:
        return cpu_seconds(lambda: np.copyto(copy, memory))

    def rates(**works: Callable[[], float]) -> Iterator[Measurement]:
        for seconds in context.alternate(memcpy=memcpy, **works):
            for name, taken in seconds.items():
                better: Better = "neither" if name == "memcpy" else "higher"
                yield Measurement(name, n_bytes / taken / GIB, "GiB/s", better)
                if name != "memcpy":
                    ratio = seconds["memcpy"] / taken
                    yield Measurement(f"{name}_of_memcpy", ratio, "x", "higher")

    def changing(prepare: Callable[[], object]) -> tuple[Callable[[], float], Callable[[], float]]:
        """Two functions that encode and decode pages which change each time, and return how long it
        took."""
        decoded = 0.0

        def encode() -> float:
            nonlocal decoded
            prepare()
            taken = lane.encode(lane.everything)
            decoded = lane.decode()[0]
            return taken

        def decode() -> float:
            encode()
            return decoded

        return encode, decode

    def edit() -> None:
        words[:, ::100] += np.uint64(1)

    def clear() -> None:
        lane.replica.forget(lane.everything)
        memory[:] = 0

    def first() -> None:
        lane.replica.forget(lane.everything)

    encode_raw, decode_raw = changing(first)
    encode_delta, decode_delta = changing(edit)
    encode_zero, decode_zero = changing(clear)
    yield from rates(
        digest_all=lambda: cpu_seconds(lambda: digest_all(memory, SEED)),
        scan_changed_none=lambda: cpu_seconds(lambda: scan_changed(memory, seen, SEED)),
        encode_raw=encode_raw,
        decode_raw=decode_raw,
    )
    encode_raw()
    yield from rates(
        encode_unchanged=lambda: lane.encode(lane.everything),
        encode_unchanged_shuffled=lambda: lane.encode(shuffled),
    )
    yield from rates(encode_delta=encode_delta, decode_delta=decode_delta)
    yield from rates(encode_zero=encode_zero, decode_zero=decode_zero)
    encode_zero()
    yield from rates(encode_unchanged_zero=lambda: lane.encode(lane.everything))
