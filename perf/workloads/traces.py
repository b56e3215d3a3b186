"""Recorded guests: the whole memory of a running guest, and the pages that each round changed.

A file is one zstd frame around a numpy .npz with the arrays
`base` uint8[n_pages, 4096]; `ptr` int64[n_rounds + 1], where round r owns `ptr[r]:ptr[r + 1]` of
the next three; `idx` uint32, page numbers; `kind` uint8, 0: `data` is the page, 1: it is the page
XOR what it held before; `data` uint8[:, 4096].
"""

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf.errors import BenchUsageError, NeedMissing
from transport.wire.frames import PAGE_BYTES

MAX_BYTES = 8 << 30
"""The size of a trace when it is unpacked, at most."""

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Trace:
    """`base`: uint8[n_pages, 4096], the memory before the first round. `rounds`: of each, the
    numbers of the pages that changed, ascending, and their new content, uint8[k, 4096]."""

    base: Bytes
    rounds: list[tuple[Indices, Bytes]]


def load(path: Path) -> Trace:
    """The trace in a file. Raises `BenchUsageError` if it is not one."""
    try:
        import zstandard
    except ImportError:
        raise NeedMissing("traces need zstandard: pip install 'vfio-ferry[perf]'") from None
    try:
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        with path.open("rb") as file, unpacker.stream_reader(file) as reader:
            archive = np.load(io.BytesIO(reader.read(MAX_BYTES)), allow_pickle=False)
        base, ptr, idx, kind, data = (archive[n] for n in ("base", "ptr", "idx", "kind", "data"))
    except (OSError, ValueError, KeyError, zstandard.ZstdError) as error:
        raise BenchUsageError(f"{path} is no trace: {error}") from error
    if base.ndim != 2 or base.shape[1] != PAGE_BYTES:
        raise BenchUsageError(f"{path} is no trace: its pages are not of {PAGE_BYTES} bytes")
    now = base.copy()
    rounds = []
    for start, end in itertools.pairwise(ptr):
        indices, pages = idx[start:end], data[start:end].copy()
        differences = kind[start:end] == 1
        pages[differences] ^= now[indices[differences]]
        now[indices] = pages
        rounds.append((indices, pages))
    return Trace(base, rounds)
