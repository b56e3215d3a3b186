"""The rounds of a recorded guest, encoded and decoded: bytes on the wire, and time per page.

The bytes are counted with everything that goes with the pages, and set beside the pages' own and
beside XBZRLE with a cache without limit (`perf.xbzrle`). A floor for them is what zstandard at
`floor-level` (0: none) makes of pages all at once, with what they held before as its dictionary.
That takes seconds a MiB, so it is measured on a sample of at most `floor-mib`, and set beside
XBZRLE of the same sample: blocks of neighbouring pages, evenly from all rounds, so that each round
is packed by itself with the pages of its blocks.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zstandard

from perf.benchmark import Context, Measurement
from perf.lane import Lane
from perf.results import Dimension
from perf.workloads.traces import Bytes, Trace, load
from perf.xbzrle import wire_bytes
from transport.wire.codec import Codec
from transport.wire.frames import PAGE_BYTES

SAMPLE_PAGES = 32
"""Neighbouring pages in one block of the floor's sample."""
FLOOR_WINDOW_LOG = 27
"""zstandard's window for the floor, as a power of two: 128 MiB hold the pages of a round and what
they held before."""


def run(context: Context) -> Iterator[Measurement]:
    path = Path(context.text("trace"))
    trace = load(path)
    codecs = [Codec.parse(name) for name in context.codecs("codecs")]
    xbzrle = sum(wire_bytes(new, old) for old, new in _changes(trace))
    if level := context.number("floor-level"):
        yield from _floor(trace, path.name, level, context.number("floor-mib") << 20)
    for _ in range(context.repeat):
        for codec in codecs:
            where = {"trace": path.name, "codec": str(codec)}
            memory = trace.base.reshape(-1).copy()
            lane = Lane(memory, context.number("cache-mib") << 20)
            lane.codec = codec
            lane.encode(lane.everything)
            lane.decode()
            wire = pages = 0
            encode_s = decode_s = 0.0
            for indices, content in trace.rounds:
                memory.reshape(-1, PAGE_BYTES)[indices] = content
                encode_s += lane.encode(indices)
                taken, n_bytes = lane.decode()
                decode_s += taken
                wire += n_bytes
                pages += indices.size
            yield Measurement("wire_of_raw", wire / (pages * PAGE_BYTES), "x", "lower", where)
            yield Measurement("wire_of_xbzrle", wire / xbzrle, "x", "lower", where)
            yield Measurement("encode", encode_s / pages * 1e9, "ns/page", "lower", where)
            yield Measurement("decode", decode_s / pages * 1e9, "ns/page", "lower", where)


def _changes(trace: Trace) -> Iterator[tuple[Bytes, Bytes]]:
    """For each round, what its pages held before and what they hold then, uint8[n, 4096] both."""
    now = trace.base.copy()
    for indices, content in trace.rounds:
        yield now[indices], content
        now[indices] = content


def _floor(trace: Trace, name: str, level: int, max_bytes: int) -> Iterator[Measurement]:
    n_bytes = sum(content.nbytes for _, content in trace.rounds)
    share = min(1.0, max_bytes / n_bytes)
    raw = floor = xbzrle = 0
    for number, (old, new) in enumerate(_changes(trace)):
        taken = sampled(len(new), share, seed=number)
        if taken.any():
            raw += new[taken].nbytes
            floor += _floor_bytes(old[taken], new[taken], level)
            xbzrle += wire_bytes(new[taken], old[taken])
    where: dict[str, Dimension] = {"trace": name, "sample": round(raw / n_bytes, 3)}
    yield Measurement("floor_of_xbzrle", floor / xbzrle, "x", "neither", where)
    yield Measurement("floor_of_raw", floor / raw, "x", "neither", where)


def sampled(n_pages: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which of a round's pages are taken, bool[n_pages]: each block with that probability."""
    blocks = np.random.default_rng(seed).random(-(-n_pages // SAMPLE_PAGES)) < share
    return np.repeat(blocks, SAMPLE_PAGES)[:n_pages]


def _floor_bytes(old: Bytes, new: Bytes, level: int) -> int:
    known = zstandard.ZstdCompressionDict(old.tobytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=FLOOR_WINDOW_LOG, enable_ldm=True
    )
    compressor = zstandard.ZstdCompressor(dict_data=known, compression_params=parameters)
    return len(compressor.compress(new.tobytes()))
