"""The rounds of a recorded guest, encoded and decoded: bytes on the wire, and time per page.

The bytes are counted with everything that goes with the pages, and set beside the pages' own and
beside XBZRLE with a cache without limit (`perf.xbzrle`).
"""

from collections.abc import Iterator
from pathlib import Path

from perf.benchmark import Context, Measurement
from perf.lane import Lane
from perf.workloads.traces import Trace, load
from perf.xbzrle import wire_bytes
from transport.codec import Codec
from transport.frames import PAGE_BYTES


def run(context: Context) -> Iterator[Measurement]:
    path = Path(context.text("trace"))
    trace = load(path)
    codecs = [Codec.parse(name) for name in context.text("codecs").split(",")]
    xbzrle = _xbzrle_bytes(trace)
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


def _xbzrle_bytes(trace: Trace) -> int:
    now = trace.base.copy()
    total = 0
    for indices, content in trace.rounds:
        total += wire_bytes(content, now[indices])
        now[indices] = content
    return total
