"""The proof that both memories are equal, against two arrays instead of a link."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio

from ferry.errors import NotEqual
from ferry.verification import prove_equal
from transport.sender import RegionComparison

N_PAGES = 64
ALL = np.arange(N_PAGES, dtype=np.uint32)


class Link:
    """Both sides' pages as numbers; what is sent arrives, unless something writes there again."""

    def __init__(self, differing: set[int], *, busy: bool = False) -> None:
        self.sender = self
        self.here = np.arange(N_PAGES)
        self.there = self.here.copy()
        self.there[[*differing]] += 1000
        self._busy = busy

    async def verify(self, indices: np.ndarray | None) -> np.ndarray:
        asked = ALL if indices is None else indices
        return asked[self.here[asked] != self.there[asked]]

    async def compare_regions(self, regions: list[tuple[int, int]]) -> list[RegionComparison]:
        return [
            RegionComparison(
                first,
                count,
                str(self.here[first : first + count]),
                str(self.there[first : first + count]),
            )
            for first, count in regions
        ]

    async def send_pages(self, indices: np.ndarray) -> None:
        self.there[indices] = self.here[indices]
        if self._busy:
            self.there[5] += 1


MEMORY = SimpleNamespace(
    n_pages=N_PAGES,
    layout=[(0, 16 * 4096), (1 << 32, 48 * 4096)],
    page_of=lambda iova: 16 if iova else 0,
)


def prove(link: Link, touched: list[int], *, everything: bool) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        pages = np.array(touched, np.uint32)
        return await prove_equal(link, MEMORY, pages, everything=everything)  # type: ignore[arg-type]

    return trio.run(run)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("differing", [set(), {3, 20}])
def test_i6_what_differs_is_repaired_and_told(everything: bool, differing: set[int]) -> None:
    link = Link(differing)
    section = prove(link, [3, 4, 20], everything=everything)
    assert section["repaired_pages"] == len(differing)
    assert section["checked_pages"] == (N_PAGES if everything else 3)
    assert np.array_equal(link.here, link.there)
    assert len(section["regions"]) == (2 if everything else 0)


def test_i6_everything_includes_what_nobody_touched() -> None:
    link = Link({40})
    assert prove(link, [3], everything=True)["repaired_pages"] == 1
    assert np.array_equal(link.here, link.there)


@pytest.mark.parametrize("everything", [False, True])
def test_i6_pages_that_stay_different_are_an_error(everything: bool) -> None:
    with pytest.raises(NotEqual):
        prove(Link({5}, busy=True), [5], everything=everything)
