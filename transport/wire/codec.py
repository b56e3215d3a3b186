"""How pages are compressed: the choices there are, and zstandard over the body of a frame.

Owns the names of the choices and the packing and unpacking of bodies. Which forms pages take within
a body is decided in `transport.kernels.pages`; which codec is worth its time, in
`transport.sending.codec_choice`.

A body is packed as one zstandard frame (RFC 8878) that states its content size; nothing is carried
from one body to the next, so a frame can be applied without those in front of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from transport.wire.errors import FrameError

MIN_LEVEL: Final = -7
MAX_LEVEL: Final = 19
_MAX_WINDOW_BYTES: Final = 8 << 20  # no body is longer

_NAME = re.compile(r"none|delta|lz4|zstd:(-?\d{1,2})")

_BODY_LOG: Final = 20  # of the length of a body, for which what follows was chosen
_TUNED: Final = {
    1: {"strategy": zstandard.STRATEGY_FAST, "hash_log": 13, "min_match": 5},
    2: {"strategy": zstandard.STRATEGY_FAST, "hash_log": 15, "min_match": 5},
    3: {"strategy": zstandard.STRATEGY_DFAST, "chain_log": 14, "hash_log": 15, "min_match": 5},
    4: {"strategy": zstandard.STRATEGY_DFAST, "chain_log": 14, "hash_log": 16, "min_match": 4},
}
"""Levels that are not zstandard's own: with tables that stay in a core's cache and shorter matches.
2 and 4 make pages of files smaller in less time than zstandard's 2 and 3; 1 and 3 stand between
(`bench run compression`)."""


class Method(Enum):
    """What is done to pages that the receiver does not hold yet."""

    NONE = "none"
    """Sent as they are."""
    DELTA = "delta"
    """As what changed, where that is short; else as they are."""
    LZ4 = "lz4"
    """Each in its shortest form by itself: copy of another, delta, LZ4, LZ4 with its base."""
    ZSTD = "zstd"
    """Raw, as copy or as delta, and zstandard over the whole body."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A method, and its level if it is `Method.ZSTD`: the higher, the smaller and the slower."""

    method: Method
    level: int = 0

    @classmethod
    def parse(cls, name: str) -> Codec:
        """`none`, `delta`, `lz4` or `zstd:LEVEL`. ValueError for anything else."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError("none, delta, lz4 or zstd:LEVEL")
        if match[1] is None:
            return cls(Method(name))
        level = int(match[1])
        if not MIN_LEVEL <= level <= MAX_LEVEL:
            raise ValueError(f"zstd:LEVEL with a level from {MIN_LEVEL} to {MAX_LEVEL}")
        return cls(Method.ZSTD, level)

    def __str__(self) -> str:
        return f"zstd:{self.level}" if self.method is Method.ZSTD else self.method.value


NONE: Final = Codec(Method.NONE)
DELTA: Final = Codec(Method.DELTA)
LZ4: Final = Codec(Method.LZ4)


class Packer:
    """Packs the bodies of one lane. Not thread-safe; works without the GIL."""

    def __init__(self) -> None:
        self._level: int | None = None
        self._compressor = zstandard.ZstdCompressor()

    def pack(self, body: npt.NDArray[np.uint8], level: int) -> bytes:
        """`body` (uint8, 1-D, contiguous) as a zstandard frame, which may be longer than it."""
        if level != self._level:
            # One is kept, for it holds some megabytes.
            self._compressor = _compressor(level)
            self._level = level
        return self._compressor.compress(body.data)


def _compressor(level: int) -> zstandard.ZstdCompressor:
    tuned = _TUNED.get(level)
    if tuned is None:
        return zstandard.ZstdCompressor(level=level)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=1 << _BODY_LOG, window_log=_BODY_LOG, **tuned
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def unpack_body(packed: memoryview, body_bytes: int) -> memoryview:
    """The body that was packed. `FrameError` if it is not well-formed or not `body_bytes` long.

    Allocates no more than `body_bytes`, which the caller has bounded, and a window of
    `_MAX_WINDOW_BYTES`.
    """
    try:
        said = zstandard.get_frame_parameters(packed).content_size
        if said != body_bytes:
            raise FrameError(f"a packed body of {said} bytes where {body_bytes} are announced")
        unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        body = unpacker.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FrameError(f"a packed body is broken: {error}") from None
    if len(body) != body_bytes:
        raise FrameError(f"a packed body of {len(body)} bytes where {body_bytes} are announced")
    return memoryview(body)
