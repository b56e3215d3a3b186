"""What compression makes of a memory image: bytes and time of each codec, and the trade between.

One core encodes the pages of an image that are not zero, by the transport's encoder, and decodes
them. `stock` is zstandard's own level of the same number over the same frames. `multifd` is what
QEMU's multifd does with the pages: one stream of zstandard, level 1, in packets of 128 pages
(migration/multifd-zstd.c); `bytes_of_multifd` are a codec's bytes by those of that stream, which
bounds from below the time that the codec takes over a link that is the bottleneck.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from perf.benchmark import Context, Measurement
from perf.lane import Bytes, Lane
from perf.workloads.images import FolderPages, Mix, fill
from transport.wire.codec import Codec, Method
from transport.wire.frames import PAGE_BYTES

MULTIFD_PACKET_PAGES = 128
FRAME_PAGES = 255
"""As many raw pages as fit into a frame of 1 MiB."""


def run(context: Context) -> Iterator[Measurement]:
    memory = np.zeros(context.number("mib") << 20, np.uint8)
    fill(memory, Mix(zero=0.0), file_pages=FolderPages(Path(context.text("files"))))
    n_pages = memory.size // PAGE_BYTES
    codecs = [Codec.parse(name) for name in context.codecs("codecs")]
    for _ in range(context.repeat):
        found = {("multifd", ""): (*_packed(memory, MULTIFD_PACKET_PAGES, _stream(1)), 0.0)}
        for codec in codecs:
            found["ferry", str(codec)] = _ours(memory, codec)
            if codec.method is Method.ZSTD:
                compress = zstandard.ZstdCompressor(level=codec.level).compress
                found["stock", str(codec)] = (*_packed(memory, FRAME_PAGES, compress), 0.0)
        of_multifd = found["multifd", ""][0]
        for (way, name), (n_bytes, encode_s, decode_s) in found.items():
            where = {"way": way, "codec": name}
            yield Measurement("bytes_of_raw", n_bytes / memory.size, "x", "neither", where)
            yield Measurement("bytes_of_multifd", n_bytes / of_multifd, "x", "neither", where)
            yield Measurement("encode", encode_s / n_pages * 1e6, "us/page", "neither", where)
            if decode_s:
                yield Measurement("decode", decode_s / n_pages * 1e6, "us/page", "neither", where)


def _ours(memory: Bytes, codec: Codec) -> tuple[int, float, float]:
    lane = Lane(memory, 0)
    lane.codec = codec
    encode_s = lane.encode(lane.everything)
    decode_s, n_bytes = lane.decode()
    return n_bytes, encode_s, decode_s


def _stream(level: int) -> Callable[[memoryview], bytes]:
    stream = zstandard.ZstdCompressor(level=level).compressobj()

    def compress(data: memoryview) -> bytes:
        return stream.compress(data) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    return compress


def _packed(
    memory: Bytes, pages: int, compress: Callable[[memoryview], bytes]
) -> tuple[int, float]:
    """How many bytes the pages become, and how many CPU seconds it takes, packed so many at
    once."""
    step = pages * PAGE_BYTES
    began = time.thread_time()
    n_bytes = sum(len(compress(memory.data[at : at + step])) for at in range(0, memory.size, step))
    return n_bytes, time.thread_time() - began
