"""The proof that both copies of the guest's memory are equal (I6), once nothing writes to either.

Owns the order of comparison and repair, and what the report says of it.
"""

import numpy as np
from numpy.typing import NDArray

from ferry.errors import NotEqual
from ferry.source_link import SourceLink
from sync.memory import PAGE_BYTES, GuestMemory

REPAIR_ROUNDS = 3
"""Both memories are quiet when they are compared: one repair is enough if nothing is wrong."""


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
    """Every region with its digest, and whether all of them are equal on both sides."""
    layout = memory.layout
    ranges = [(memory.page_of(iova), length // PAGE_BYTES) for iova, length in layout]
    compared = await link.sender.compare_regions(ranges)
    regions: list[dict[str, object]] = [
        {"iova": iova, "length": length, "digest": region.local}
        for (iova, length), region in zip(layout, compared, strict=True)
    ]
    return regions, all(region.equal for region in compared)
