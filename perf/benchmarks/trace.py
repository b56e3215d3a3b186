"""The rounds of a recorded guest, encoded and decoded: bytes on the wire, and time per page.

The bytes are counted with everything that goes with the pages, and set beside the pages' own and
beside XBZRLE with a cache without limit (`perf.xbzrle`). A floor for them is measured if
`floor-level` is not 0, for it takes minutes: zstandard at that level over all pages of a round at
once, with what they held before as its dictionary.
"""

from collections.abc import Iterator
from pathlib import Path

import zstandard

from perf.benchmark import Context, Measurement
from perf.lane import Lane
from perf.workloads.traces import Bytes, Trace, load
from perf.xbzrle import wire_bytes
from transport.codec import Codec
from transport.frames import PAGE_BYTES

FLOOR_WINDOW_LOG = 27
"""128 MiB: the pages of a round and what they held before."""


def run(context: Context) -> Iterator[Measurement]:
    path = Path(context.text("trace"))
    trace = load(path)
    codecs = [Codec.parse(name) for name in context.text("codecs").split(",")]
    xbzrle = sum(wire_bytes(new, old) for old, new in _changes(trace))
    if level := context.number("floor-level"):
        floor = sum(_floor_bytes(old, new, level) for old, new in _changes(trace))
        where = {"trace": path.name}
        yield Measurement("floor_of_xbzrle", floor / xbzrle, "x", "neither", where)
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
    """Of each round, what its pages held and what they hold then, uint8[n, 4096] both."""
    now = trace.base.copy()
    for indices, content in trace.rounds:
        yield now[indices], content
        now[indices] = content


def _floor_bytes(old: Bytes, new: Bytes, level: int) -> int:
    known = zstandard.ZstdCompressionDict(old.tobytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=FLOOR_WINDOW_LOG, enable_ldm=True
    )
    compressor = zstandard.ZstdCompressor(dict_data=known, compression_params=parameters)
    return len(compressor.compress(new.tobytes()))
