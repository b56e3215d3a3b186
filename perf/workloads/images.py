"""Memory images: zero pages, file-like pages and random pages, the same for the same seed."""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from perf.errors import BenchUsageError
from transport.wire.frames import PAGE_BYTES

SHARED = Path("/dev/shm")
FILE_PREFIX = "ferry-bench-"

EXTENT_PAGES = 16
"""Pages of one kind lie together, as those of a file or of a freed block do."""
_WORD_BYTES = 16
_WORDS_PER_PAGE = PAGE_BYTES // _WORD_BYTES
_VOCABULARY = 1 << 12
_PAGE_VOCABULARY = 24
"""Words that one page repeats: lz4 finds them, since they lie close together."""
_BATCH_EXTENTS = 256

Bytes = npt.NDArray[np.uint8]
MakePages = Callable[[np.random.Generator, int], Bytes]
"""What makes so many pages, uint8[n, 4096], by a generator of random numbers."""


@dataclass(frozen=True)
class Mix:
    """Shares of the pages; what is neither zero nor random is file-like."""

    zero: float = 0.42
    random: float = 0.0

    def __post_init__(self) -> None:
        if min(self.zero, self.random) < 0 or self.zero + self.random > 1:
            raise BenchUsageError(f"{self} has shares that are negative, or more than all pages")


def random_pages(rng: np.random.Generator, n_pages: int) -> Bytes:
    """uint8[n_pages, 4096] that nothing compresses."""
    words = rng.integers(0, 1 << 64, n_pages * PAGE_BYTES // 8, np.uint64)
    return words.view(np.uint8).reshape(n_pages, PAGE_BYTES)


def file_pages(rng: np.random.Generator, n_pages: int) -> Bytes:
    """uint8[n_pages, 4096] like those of files: each repeats some words of its own, and holds
    between no and only bytes that do not repeat. lz4 makes half of it, page by page."""
    vocabulary = rng.integers(32, 127, (_VOCABULARY, _WORD_BYTES), np.uint8)
    known = rng.integers(0, _VOCABULARY, (n_pages, _PAGE_VOCABULARY))
    first, second, third = rng.integers(0, 256, (3, n_pages, _WORDS_PER_PAGE), np.uint8)
    # The product of two uniform numbers prefers the words of low numbers, as texts do.
    rank = first.astype(np.uint32) * second * _PAGE_VOCABULARY >> 16
    pages = vocabulary[np.take_along_axis(known, rank.astype(np.intp), axis=1)]
    unique = third < rng.beta(0.5, 1.0, (n_pages, 1)) * 256
    n_unique = int(np.count_nonzero(unique))
    pages[unique] = random_pages(rng, -(-n_unique // _WORDS_PER_PAGE)).reshape(-1, _WORD_BYTES)[
        :n_unique
    ]
    return pages.reshape(n_pages, PAGE_BYTES)


class KeptMemory:
    """So much memory, taken at once and given back by `give_back`, for those who need it then.

    A virtual machine's host backs its memory only when that is first used, and takes back within
    seconds what is free: whoever touches it then waits for the host, which can take longer than
    what is to be measured.
    """

    def __init__(self, n_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._memory = mmap.mmap(-1, n_bytes, flags=flags)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Gives the memory back to the system; to be called right before the clock starts."""
        self._memory.close()


class FolderPages:
    """Pages of the files below a folder, in the order of their paths; at the end, from the start.

    Each file fills whole pages, as in a page cache; pages of zeros are left out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pages = self._read()
        self._left = np.empty((0, PAGE_BYTES), np.uint8)

    def __call__(self, rng: np.random.Generator, n_pages: int) -> Bytes:
        """uint8[n_pages, 4096]: the next ones. For `fill`, whose `rng` is not needed."""
        parts, found = [self._left], len(self._left)
        while found < n_pages:
            parts.append(next(self._pages))
            found += len(parts[-1])
        pages = np.concatenate(parts)
        self._left = pages[n_pages:]
        return pages[:n_pages]

    def _read(self) -> Iterator[Bytes]:
        found = True
        while found:
            found = False
            for path in sorted(self._folder.rglob("*")):
                if not path.is_file() or path.is_symlink():
                    continue
                with suppress(OSError):
                    data = path.read_bytes()
                    padded = data + bytes(-len(data) % PAGE_BYTES)
                    pages = np.frombuffer(padded, np.uint8).reshape(-1, PAGE_BYTES)
                    filled = pages[pages.any(axis=1)]
                    found = found or len(filled) > 0
                    yield filled
        raise BenchUsageError(f"no file with content can be read below {self._folder}")


def fill(memory: Bytes, mix: Mix, seed: int = 1, *, file_pages: MakePages = file_pages) -> None:
    """Fills `memory`, uint8[n_pages * 4096], which holds zeros: a zero page is not touched, so
    that it takes no room, as in a guest that never wrote it. `file_pages` makes the file-like."""
    rng = np.random.default_rng(seed)
    pages = memory.reshape(-1, PAGE_BYTES)
    n_extents = -(-len(pages) // EXTENT_PAGES)
    kinds = rng.permutation(n_extents)[round(mix.zero * n_extents) :]
    n_random = round(mix.random * n_extents)
    for extents, make in ((kinds[:n_random], random_pages), (kinds[n_random:], file_pages)):
        for start in range(0, len(extents), _BATCH_EXTENTS):
            first = np.sort(extents[start : start + _BATCH_EXTENTS]) * EXTENT_PAGES
            at = (first[:, np.newaxis] + np.arange(EXTENT_PAGES)).reshape(-1)
            at = at[at < len(pages)]
            pages[at] = make(rng, at.size)


@contextmanager
def image_file(
    n_bytes: int, mix: Mix, seed: int = 1, *, file_pages: MakePages = file_pages
) -> Iterator[Path]:
    """An image as a file in memory, for the block. Those of processes that are gone are removed.

    Arguments as of `fill`.
    """
    for path in SHARED.glob(f"{FILE_PREFIX}*"):
        if not Path("/proc", path.name.removeprefix(FILE_PREFIX)).exists():
            path.unlink(missing_ok=True)
    path = SHARED / f"{FILE_PREFIX}{os.getpid()}"
    try:
        with path.open("x+b") as file:
            file.truncate(n_bytes)
            memory = np.frombuffer(mmap.mmap(file.fileno(), n_bytes), np.uint8)
            fill(memory, mix, seed, file_pages=file_pages)
        yield path
    finally:
        path.unlink(missing_ok=True)
