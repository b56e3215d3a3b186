"""All kernels at once: whoever starts a migration has them ready before it counts the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transport.kernels import bitmap, digests, pages, tables, unpack
from transport.kernels.cache import open_folder
from transport.kernels.declare import Kernel, Origin


def all_kernels() -> list[Kernel]:
    """Every kernel of this room."""
    rooms = (bitmap, digests, pages, tables, unpack)
    return [each for room in rooms for each in vars(room).values() if isinstance(each, Kernel)]


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What `warm_up` has done."""

    seconds: float
    """Time it took: tenths of a second from the cache, many seconds for a first compilation."""
    kernels: int
    """Kernels that are ready now."""
    cache_hit: bool
    """Nothing had to be compiled by this call."""
    not_kept: str
    """Why the next process has to compile as well; empty if it need not."""


def warm_up(compiling: Callable[[], None] | None = None, others: Sequence[Kernel] = ()) -> WarmUp:
    """Load every kernel, or compile them, and `others`, which are kept in the same folder; may be
    called again and from any thread.

    `compiling` is called once before they are compiled, or before another process is waited for
    that compiles them already. Raises `NativeLibraryError` if the C
    libraries are missing or too old, `CompilationFailed` if numba cannot compile a kernel.
    """
    began = time.monotonic()
    kernels = [*all_kernels(), *others]
    missing = [each for each in kernels if each.origin is None]
    not_kept = ""
    if missing:
        with open_folder() as folder:
            if not folder.is_complete():
                if compiling is not None:
                    compiling()
                folder.wait_for_turn()
            for each in missing:
                each.load(folder.path)
            if folder.path is None:
                not_kept = folder.why_not
            elif any(each.origin is Origin.IN_MEMORY for each in missing):
                not_kept = "the folder is damaged, or full"
            else:
                folder.mark_complete()
    hit = all(each.origin is Origin.FOUND for each in missing)
    return WarmUp(time.monotonic() - began, len(kernels), hit, not_kept)
