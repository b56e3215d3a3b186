"""The log of the pages that a device wrote, behind VFIO's DMA logging.

Owns which pages are dirty, by IOVA, so that a page stays reportable after its region is
unmapped. Does not own when something is written: who writes calls `mark` once the bytes are in
memory and before it tells anybody (I1).

Source: vfio-user, `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `_STOP`, `_REPORT`.
"""

import threading
from collections.abc import Sequence

GRAIN_BYTES = 4096
"""What the log resolves. A device that logs more coarsely marks several grains at once."""
MAX_PAGE_BYTES = 2 << 20
"""The coarsest page; it bounds how much a single mark has to set."""

_CHUNK_GRAINS = 4096
_CHUNK_MASK = (1 << _CHUNK_GRAINS) - 1
_ADDRESS_LIMIT = 1 << 64

MAX_REPORT_BITS = 1 << 23
"""Bits in one report: a bitmap of 1 MiB, as much as one message carries by default."""
MAX_RANGES = 4096
"""Ranges that can be logged. A VMM has a few for each region of memory."""


def is_page_size(page_bytes: int) -> bool:
    """Whether a log can have pages of this size: powers of two, 4 KiB to 2 MiB."""
    return GRAIN_BYTES <= page_bytes <= MAX_PAGE_BYTES and not page_bytes & (page_bytes - 1)


class DirtyLogError(ValueError):
    """The client asked for something the log cannot do: the answer is `EINVAL`."""


class DirtyLog:
    """Read-and-clear, thread-safe.

    Chunks of the bitmap exist only where something was written: the log grows with mapped memory,
    never with what a client asks to be logged.

    `page_bytes` is the smallest page the device claims to resolve: `is_page_size`.
    """

    def __init__(self, page_bytes: int) -> None:
        if not is_page_size(page_bytes):
            raise ValueError(f"{page_bytes} bytes are no page size for a log")
        self._smallest_page_bytes = page_bytes
        self._page_bytes = page_bytes
        self._lock = threading.Lock()
        self._active = False
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._chunks: dict[int, int] = {}

    def start(self, page_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Log from now on, with nothing dirty. Returns the page size in use, in bytes.

        `page_bytes` is a hint. `ranges` are (IOVA, length in bytes); none means everything.
        Raises `DirtyLogError` if the log is active or a range makes no sense.
        """
        if page_bytes <= 0 or page_bytes & (page_bytes - 1):
            raise DirtyLogError(f"a page of {page_bytes} bytes")
        if len(ranges) > MAX_RANGES:
            raise DirtyLogError(f"{len(ranges)} ranges are more than {MAX_RANGES}")
        for iova, length in ranges:
            if length <= 0 or iova % GRAIN_BYTES or iova + length > _ADDRESS_LIMIT:
                raise DirtyLogError(f"no range to log: {length} bytes at {iova:#x}")
        with self._lock:
            if self._active:
                raise DirtyLogError("the log is active already")
            self._page_bytes = min(max(page_bytes, self._smallest_page_bytes), MAX_PAGE_BYTES)
            self._ranges = tuple((iova, iova + length) for iova, length in ranges)
            self._chunks = {}
            self._active = True
            return self._page_bytes

    def stop(self) -> None:
        """Log no longer and forget what was logged. Stopping twice is no error."""
        with self._lock:
            self._active = False
            self._chunks = {}

    def mark(self, iova: int, length: int) -> None:
        """Bytes were written. Nothing happens unless the log is active."""
        if not self._active or length <= 0:
            return
        with self._lock:
            if not self._active:
                return
            start = iova & -self._page_bytes
            end = (iova + length + self._page_bytes - 1) & -self._page_bytes
            if not self._ranges:
                self._set(start, end)
            for low, high in self._ranges:
                if start < high and low < end:
                    self._set(max(start, low), min(end, high))

    def report(self, iova: int, length: int, page_bytes: int) -> bytes:
        """The dirty pages in a range as a bitmap of u64 words; they are clean afterwards.

        Bit i stands for `page_bytes` from `iova` + i * `page_bytes`. Raises `DirtyLogError`.
        """
        if page_bytes < GRAIN_BYTES or page_bytes & (page_bytes - 1):
            raise DirtyLogError(f"pages of {page_bytes} bytes are not reported")
        if iova % GRAIN_BYTES or length <= 0 or length % GRAIN_BYTES:
            raise DirtyLogError(f"no whole pages: {length} bytes at {iova:#x}")
        if iova + length > _ADDRESS_LIMIT:
            raise DirtyLogError("the range ends behind the last address")
        n_bits = -(-length // page_bytes)
        if n_bits > MAX_REPORT_BITS:
            raise DirtyLogError(f"{n_bits} bits are more than {MAX_REPORT_BITS} in a report")
        first, end = iova // GRAIN_BYTES, (iova + length) // GRAIN_BYTES
        per_bit = page_bytes // GRAIN_BYTES
        bitmap = bytearray(-(-n_bits // 64) * 8)
        for base, bits in self._take(first, end):
            if per_bit == 1:
                _merge(bitmap, base - first, bits)
                continue
            while bits:
                bit = (base - first + (bits & -bits).bit_length() - 1) // per_bit
                bitmap[bit >> 3] |= 1 << (bit & 7)
                done = first + (bit + 1) * per_bit - base
                bits = bits >> done << done
        return bytes(bitmap)

    def _set(self, start: int, end: int) -> None:
        grain, end_grain = start // GRAIN_BYTES, -(-end // GRAIN_BYTES)
        while grain < end_grain:
            chunk, at = divmod(grain, _CHUNK_GRAINS)
            count = min(end_grain - grain, _CHUNK_GRAINS - at)
            self._chunks[chunk] = self._chunks.get(chunk, 0) | ((1 << count) - 1) << at
            grain += count

    def _take(self, first: int, end: int) -> list[tuple[int, int]]:
        """Clear the grains from `first` to `end`: (first grain of a chunk, its bits) of each."""
        taken = []
        with self._lock:
            if not self._active:
                raise DirtyLogError("the log is not active")
            low_chunk, high_chunk = first // _CHUNK_GRAINS, (end - 1) // _CHUNK_GRAINS
            for chunk in [c for c in self._chunks if low_chunk <= c <= high_chunk]:
                base = chunk * _CHUNK_GRAINS
                mask = _CHUNK_MASK
                if first > base:
                    mask &= -1 << (first - base)
                if end < base + _CHUNK_GRAINS:
                    mask &= (1 << (end - base)) - 1
                bits = self._chunks[chunk]
                if bits & mask:
                    taken.append((base, bits & mask))
                if bits & ~mask:
                    self._chunks[chunk] = bits & ~mask
                else:
                    del self._chunks[chunk]
        return taken


def _merge(bitmap: bytearray, position: int, bits: int) -> None:
    """Or `bits` into `bitmap` from bit `position` on; bits before the bitmap are not set."""
    if position < 0:
        bits >>= -position
        position = 0
    at, shift = divmod(position, 8)
    bits <<= shift
    end = at + (bits.bit_length() + 7) // 8
    bits |= int.from_bytes(bitmap[at:end], "little")
    bitmap[at:end] = bits.to_bytes(end - at, "little")
