"""The proof that both memories are equal, against two arrays instead of a link."""

import mmap
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from ferry.errors import NotEqual
from ferry.migration import verification
from ferry.migration.verification import ProofTime, RollingProof, prove_equal
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
        differ: NDArray[np.uint32] = asked[self.here[asked] != self.there[asked]]
        return differ

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


def bitmap(pages: list[int], n_pages: int) -> Any:
    bits = np.zeros(-(-n_pages // 64) * 64, np.uint8)
    bits[pages] = 1
    return np.packbits(bits, bitorder="little").view(np.uint64)


def test_the_time_of_the_proof_is_that_of_all_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only digests advance; the first ones are slow, as those of a busy machine."""
    n_pages = 100_000
    now_ns, ns_per_page = 0, 5000
    digested: list[int] = []

    def digest(_memory: Any, pages: Any, _seed: int, _files: Any) -> None:
        nonlocal now_ns
        assert pages.max() < n_pages
        digested.append(pages.size)
        now_ns += ns_per_page * pages.size

    monkeypatch.setattr(verification, "digest_pages", digest)
    clock = SimpleNamespace(perf_counter_ns=lambda: now_ns)
    monkeypatch.setattr(verification, "time", clock)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    memory: Any = SimpleNamespace(array=None, files=(), n_pages=n_pages)
    proof = ProofTime(memory, lanes=2)

    def predict(pages: list[int], *, everything: bool = False) -> int:
        async def ask() -> int:
            return await proof.predict_ns(bitmap(pages, n_pages), everything=everything)

        return trio.run(ask)

    assert predict([]) == 0
    assert predict(list(range(3, 600, 5))) == 120 * 5000 // 2
    ns_per_page = 1000
    assert predict([99_999]) == 1000 // 2
    ns_per_page = 3000
    assert predict(list(range(0, 90_000, 3))) == 30_000 * 1000 // 2
    assert predict([7], everything=True) == -(-n_pages // 64) * 64 * 1000 // 2
    assert max(digested) < 2 * verification.SAMPLE_PAGES


def test_to_predict_the_proof_leaves_the_guests_holes() -> None:
    n_pages = 1024
    descriptor = os.memfd_create("guest")
    os.ftruncate(descriptor, n_pages * 4096)
    for page in (5, 6, 700):
        os.pwrite(descriptor, b"x", page * 4096)
    array = np.frombuffer(mmap.mmap(descriptor, n_pages * 4096), np.uint8)
    extents = [(0, n_pages, descriptor, 0)]
    memory: Any = SimpleNamespace(array=array, files=extents, n_pages=n_pages)

    async def predict() -> int:
        return await ProofTime(memory, 1).predict_ns(bitmap([5], n_pages), everything=True)

    assert trio.run(predict) > 0
    # Next to data, up to 16 pages may be touched (transport/kernels/files.py).
    assert os.fstat(descriptor).st_blocks * 512 <= 2 * 16 * 4096
    os.close(descriptor)


def bits_of(pages: set[int], n_pages: int = 1024) -> NDArray[np.uint64]:
    flags = np.zeros(n_pages, np.uint8)
    flags[sorted(pages)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint64)


def pages_of(bits: NDArray[np.uint64]) -> set[int]:
    return {*np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()}


class Rolling:
    """Answers comparisons: `differing` differ. `meanwhile` is done before the answer."""

    def __init__(self, differing: set[int], meanwhile: Callable[[], None] = lambda: None) -> None:
        self.sender = self
        self._differing = np.array(sorted(differing), np.uint32)
        self._meanwhile = meanwhile

    async def verify(self, indices: NDArray[np.uint32]) -> NDArray[np.uint32]:
        self._meanwhile()
        return self._differing[np.isin(self._differing, indices)]


def test_i6_only_what_was_equal_and_not_written_since_is_proven() -> None:
    proof = RollingProof(1024)

    async def main() -> None:
        proof.collected(bits_of({300, 301, 302, 303}))
        proof.sent(bits_of({300, 301, 302}))
        proof.collected(bits_of({301}))  # written again, before it is compared
        await proof.roll(Rolling({302}))  # type: ignore[arg-type]
        assert pages_of(proof.left(bits_of(set()))) == {301, 302, 303}
        proof.collected(bits_of({300}))  # written again, after it was compared

    trio.run(main)
    assert pages_of(proof.left(bits_of(set()))) == {300, 301, 302, 303}


def test_i6_what_is_written_while_it_is_compared_is_not_proven_by_that() -> None:
    proof = RollingProof(1024)

    def write() -> None:
        proof.collected(bits_of({301}))

    async def main() -> None:
        proof.collected(bits_of({300, 301}))
        proof.sent(bits_of({300, 301}))
        await proof.roll(Rolling(set(), write))  # type: ignore[arg-type]
        assert pages_of(proof.left(bits_of(set()))) == {301}
        proof.sent(bits_of({301}))
        await proof.roll(Rolling(set()))  # type: ignore[arg-type]

    trio.run(main)
    assert not pages_of(proof.left(bits_of(set())))


def test_i6_what_hooks_of_the_vmm_may_write_is_compared_after_it_has_loaded() -> None:
    proof = RollingProof(1024)

    async def main() -> None:
        proof.collected(bits_of({5, 600, 700}))
        proof.sent(bits_of({5, 600, 700}))
        await proof.roll(Rolling(set()))  # type: ignore[arg-type]

    trio.run(main)
    assert pages_of(proof.left(bits_of({700}))) == {5, 700}
