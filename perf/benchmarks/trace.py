"""The rounds of a recorded guest, encoded and decoded: bytes on the wire, and time per page."""

from collections.abc import Iterator
from pathlib import Path

from perf.benchmark import Context, Measurement
from perf.lane import Lane
from perf.workloads.traces import load
from transport.frames import PAGE_BYTES


def run(context: Context) -> Iterator[Measurement]:
    path = Path(context.text("trace"))
    trace = load(path)
    where = {"trace": path.name}
    for _ in range(context.repeat):
        memory = trace.base.reshape(-1).copy()
        lane = Lane(memory, context.number("cache-mib") << 20)
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
        yield Measurement("encode", encode_s / pages * 1e9, "ns/page", "lower", where)
        yield Measurement("decode", decode_s / pages * 1e9, "ns/page", "lower", where)
