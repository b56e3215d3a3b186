"""The proof that both copies of the guest's memory are equal (I6), once nothing writes to either.

Owns the order of comparison and repair, what the report says of it, and the prediction of how long
it takes: it is part of the downtime.
"""

import math
import os
import time

import numpy as np
import trio
from numpy.typing import NDArray

from ferry.errors import NotEqual
from ferry.migration.source_link import SourceLink
from sync.dirty.tracker import Bitmap, n_words
from sync.memory import PAGE_BYTES, GuestMemory
from transport.kernels.bitmap import bitmap_to_indices, indices_to_bitmap
from transport.kernels.digests import digest_pages
from transport.kernels.files import new_files

LOW_PAGES = 256
REPAIR_ROUNDS = 3
"""Both memories are quiet when they are compared: one repair is enough if nothing is wrong."""
SAMPLE_PAGES = 8192
"""So many are digested to learn how long all of them will take: some 4 ms."""


async def prove_equal(
    link: SourceLink, memory: GuestMemory, touched: NDArray[np.uint32], *, everything: bool
) -> dict[str, object]:
    """Compares, repairs and compares again the pages `touched`, or, if `everything`, every region;
    the report's section. Raises `NotEqual`."""
    regions: list[dict[str, object]] = []
    if everything:
        repaired = 0
        regions, equal = await _compare_regions(link, memory)
        if not equal:
            repaired = await _make_equal(link, None)
            regions, equal = await _compare_regions(link, memory)
            if not equal:
                raise NotEqual("a region differs although all of its pages were equal")
    else:
        repaired = await _make_equal(link, touched)
    return {
        "scope": "all of the guest's memory" if everything else "all that was touched",
        "checked_pages": memory.n_pages if everything else int(touched.size),
        "touched_pages": int(touched.size),
        "repaired_pages": repaired,
        "regions": regions,
    }


async def _make_equal(link: SourceLink, indices: NDArray[np.uint32] | None) -> int:
    """Repairs the pages (None: all) that differ; returns how many there were."""
    repaired = 0
    for _ in range(REPAIR_ROUNDS):
        differ = await link.sender.verify(indices)
        if not differ.size:
            return repaired
        repaired += int(differ.size)
        await link.send_pages(differ)
    raise NotEqual(
        f"pages still differ after {REPAIR_ROUNDS} repairs: something writes to the guest's "
        "memory on one of the hosts"
    )


async def _compare_regions(
    link: SourceLink, memory: GuestMemory
) -> tuple[list[dict[str, object]], bool]:
    """Compares every region by digest: the report's rows, and whether all of them are equal."""
    layout = memory.layout
    ranges = [(memory.page_of(iova), length // PAGE_BYTES) for iova, length in layout]
    compared = await link.sender.compare_regions(ranges)
    regions: list[dict[str, object]] = [
        {"iova": iova, "length": length, "digest": region.local}
        for (iova, length), region in zip(layout, compared, strict=True)
    ]
    return regions, all(region.equal for region in compared)


class RollingProof:
    """The pages that are still to be proven equal, while rounds go on.

    What was compared during pre-copy and not written since is proven: nothing but our lanes writes
    to the target's memory until the VMM there loads the tail of its stream. What its devices may
    write while they load it is compared after that in any case: the pages that devices have
    touched, and the first megabyte, which holds their ROMs.
    """

    def __init__(self, n_pages: int) -> None:
        self._unproven: Bitmap = np.zeros(n_words(n_pages), np.uint64)
        self._rolling: Bitmap = np.zeros_like(self._unproven)
        """Sent, and to be compared at the next occasion."""
        self._written: Bitmap = np.zeros_like(self._unproven)
        """Collected since the comparison began that is under way."""
        low = np.zeros(self._unproven.size * 64, np.bool_)
        low[: min(LOW_PAGES, n_pages)] = True
        self._low: Bitmap = np.packbits(low, bitorder="little").view(np.uint64)
        self._touched: Bitmap = np.zeros_like(self._unproven)
        self.rolled_pages = 0
        """Compared during pre-copy, a page each time."""

    def collected(self, bits: Bitmap) -> None:
        """These pages have been written since they were compared."""
        self._unproven |= bits
        self._touched |= bits
        self._written |= bits
        self._rolling &= ~bits

    def sent(self, bits: Bitmap) -> None:
        """The target has these pages."""
        self._rolling |= bits

    @property
    def n_rolling(self) -> int:
        return int(np.bitwise_count(self._rolling).sum())

    async def roll(self, link: SourceLink) -> None:
        """Compares what was sent and not compared yet. What differs, or is collected meanwhile, is
        not proven by it: that will be sent again at the latest when all else stands still."""
        bits = self._rolling.copy()
        pages = bitmap_to_indices(bits)
        self._rolling[:] = 0
        self._written[:] = 0
        if pages.size:
            differing = await link.sender.verify(pages)
            self.rolled_pages += int(pages.size)
            equal = bits & ~indices_to_bitmap(differing, bits.size * 64)
            self._unproven &= ~equal | self._written

    def left(self, devices: Bitmap) -> Bitmap:
        """What is to be compared when nothing writes any more; `devices`: what these touched."""
        return self._unproven | devices | (self._touched & self._low)

    @property
    def touched(self) -> Bitmap:
        """All that was ever written since the rounds began."""
        return self._touched


class ProofTime:
    """How long `prove_equal` would take, told by pages that are digested here.

    The other host, which digests at the same time, is taken to be as fast.
    """

    def __init__(self, memory: GuestMemory, lanes: int) -> None:
        self._memory = memory
        self._files = new_files(memory.files, memory.n_pages)
        self._threads = min(lanes, len(os.sched_getaffinity(0)))
        self._random = np.random.default_rng()
        self._ns_per_page = math.inf

    async def predict_ns(self, touched: Bitmap, *, everything: bool) -> int:
        """Nanoseconds that a proof of the pages of this bitmap, or of all, will take: by the
        fastest of the samples so far."""
        if everything:
            touched = np.full(n_words(self._memory.n_pages), ~np.uint64(0))
        n_pages = int(np.bitwise_count(touched).sum())
        if not n_pages:
            return 0
        took_ns = await trio.to_thread.run_sync(self._sample, touched, n_pages)
        self._ns_per_page = min(self._ns_per_page, took_ns)
        return int(n_pages * self._ns_per_page / self._threads)

    def _sample(self, bitmap: Bitmap, n_pages: int) -> float:
        """Nanoseconds a page on one processor. Other pages each time: these were in its cache."""
        words = np.flatnonzero(bitmap)
        wanted = min(words.size, -(-SAMPLE_PAGES * words.size // n_pages))
        chosen = np.zeros_like(bitmap)
        at = self._random.choice(words, wanted, replace=False)
        chosen[at] = bitmap[at]
        pages = bitmap_to_indices(chosen)
        pages = pages[pages < self._memory.n_pages]
        began = time.perf_counter_ns()
        digest_pages(self._memory.array, pages, 0, self._files)
        return (time.perf_counter_ns() - began) / max(1, pages.size)
