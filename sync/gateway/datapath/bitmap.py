"""The dirty bitmap: two halves in a memfd, one written here, one read by the controller.

Owned here: the layout at the time tracking began, setting bits by address, and the swap. The
controller maps the same memfd: `swap` hands it the half that was written so far, and by the next
`swap` it has read that half and put zeros over it.

    +---------------------+---------------------+
    | half 0: half_bytes  | half 1: half_bytes  |   bit i of word w (u64, little-endian) =
    +---------------------+---------------------+   page 64 * w + i of the flat page space
"""

import bisect
import fcntl
import mmap
import os
from collections.abc import Iterable

from sync.gateway.datapath.dma import FlatRegion
from sync.memory import PAGE_BYTES

_WORD_BYTES = 8
_WORD_PAGES = 64
_PIECE_BYTES = 4096
"""So much of the bitmap is handled as one number: what an operation takes grows with its length."""
_ZEROS = bytes(_PIECE_BYTES)


class DirtyBitmap:
    """Which pages of `layout` (not empty) were written. A write outside of it leaves no mark."""

    def __init__(self, layout: list[FlatRegion]) -> None:
        self.layout = layout
        self._starts = [region.iova for region in layout]
        self.n_pages = layout[-1].first_page + layout[-1].length // PAGE_BYTES
        self.half_bytes = -(-self.n_pages // _WORD_PAGES) * _WORD_BYTES
        self.descriptor = os.memfd_create("dirty-bitmap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, 2 * self.half_bytes)
            # Whoever gets the descriptor must not be able to take the file away under our mapping.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            self._bits = mmap.mmap(self.descriptor, 2 * self.half_bytes)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._active = 0

    def mark(self, address: int, count: int) -> None:
        """Sets the bits of the pages of `count` bytes (at least 1) at `address`.

        Called behind the copy: a reader that took the bit first finds the page marked again (I1).
        """
        end = address + count
        index = max(bisect.bisect_right(self._starts, address) - 1, 0)
        for region in self.layout[index:]:
            if region.iova >= end:
                break
            low = max(address, region.iova) - region.iova
            high = min(end, region.iova + region.length) - region.iova
            if low < high:
                first = region.first_page + low // PAGE_BYTES
                last = region.first_page + (high - 1) // PAGE_BYTES
                self._set(first, last - first + 1)

    def mark_pages(self, numbers: Iterable[int]) -> None:
        """Sets the bits of the pages of these numbers (IOVA / 4096), which are in order."""
        pages = list(numbers)
        bits, base = self._bits, self._active * self.half_bytes
        for region in self.layout:
            start = region.iova // PAGE_BYTES
            low = bisect.bisect_left(pages, start)
            high = bisect.bisect_left(pages, start + region.length // PAGE_BYTES)
            for number in pages[low:high]:
                page = region.first_page + number - start
                bits[base + (page >> 3)] |= 1 << (page & 7)

    def merge(self, region: FlatRegion, offset: int, bitmap: bytes, page_bytes: int) -> None:
        """Sets the bits that a device reported for `region` from byte `offset` on.

        Bit i of `bitmap` stands for the `page_bytes` (a power of two, at least 4096) at
        `offset + i * page_bytes`; `offset` is a multiple of 4096. Where no bit is set, a comparison
        is all it takes.
        """
        factor = page_bytes // PAGE_BYTES
        first = region.first_page + offset // PAGE_BYTES
        end = region.first_page + region.length // PAGE_BYTES
        size = max(_PIECE_BYTES // factor, 1)
        for start in range(0, len(bitmap), size):
            piece = bitmap[start : start + size]
            if piece == _ZEROS[: len(piece)]:
                continue
            page = first + start * 8 * factor
            if factor > _PIECE_BYTES:
                for bit in range(8):
                    if piece[0] >> bit & 1:
                        written = page + bit * factor
                        self._set(written, min(factor, end - written))
                continue
            bits = int.from_bytes(_widen(piece, factor) if factor > 1 else piece, "little")
            if page + 8 * len(piece) * factor > end:
                bits &= (1 << max(end - page, 0)) - 1
            if bits:
                self._or(page, bits)

    def swap(self) -> int:
        """Returns the half (0 or 1) that was written so far; from here on it is left alone."""
        quiet = self._active
        self._active ^= 1
        return quiet

    def close(self) -> None:
        self._bits.close()
        os.close(self.descriptor)

    def _set(self, page: int, count: int) -> None:
        if count == 1:
            position = self._active * self.half_bytes + (page >> 3)
            self._bits[position] |= 1 << (page & 7)
            return
        for start in range(0, count, 8 * _PIECE_BYTES):
            self._or(page + start, (1 << min(count - start, 8 * _PIECE_BYTES)) - 1)

    def _or(self, page: int, bits: int) -> None:
        shift = page & 7
        bits <<= shift
        start = self._active * self.half_bytes + (page >> 3)
        size = (bits.bit_length() + 7) // 8
        bits |= int.from_bytes(self._bits[start : start + size], "little")
        self._bits[start : start + size] = bits.to_bytes(size, "little")


def _widen(bitmap: bytes, factor: int) -> bytes:
    """A bitmap with every bit of `bitmap` repeated `factor` times."""
    ones = (1 << factor) - 1
    known: dict[int, bytes] = {}
    parts: list[bytes] = []
    for byte in bitmap:
        part = known.get(byte)
        if part is None:
            wide = sum(ones << (bit * factor) for bit in range(8) if byte >> bit & 1)
            part = known[byte] = wide.to_bytes(factor, "little")
        parts.append(part)
    return b"".join(parts)
