"""How a kernel is declared, and when it is compiled.

Owns the `kernel` decorator and `warm_up`. A kernel has one explicit signature and is loaded from
numba's cache, or compiled, at its first call or by `warm_up`, never at import: importing this room
must cost nothing to a command that only prints its help, and whoever starts a migration wants to
say how long a first compilation takes.

Numba looks at the time stamp of a kernel's own file to tell whether its cache is stale. What a
kernel takes from other files (`intrinsics`, `clib`, the constants of `frames`) does not count: who
edits those deletes the cache (`__pycache__/*.nb?`).
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from numba import njit, types
from numba.core.runtime import _nrt_python  # type: ignore[attr-defined]  # in C, without types
from numba.core.types import Type

from transport.kernels import clib


def readonly(element: Type) -> Type:
    """A 1-D contiguous array that the kernel only reads; takes writable arrays, too."""
    return types.Array(element, 1, "C", readonly=True)


def writable(element: Type) -> Type:
    """A 1-D contiguous array that the kernel writes."""
    return types.Array(element, 1, "C")


def named_tuple(fields: tuple[Type, ...], of: type[tuple[Any, ...]]) -> Type:
    """A NamedTuple class with fields of these types."""
    kind: Type
    if len(set(fields)) == 1:  # numba tells these apart
        kind = types.NamedUniTuple(fields[0], len(fields), of)  # type: ignore[no-untyped-call]
    else:
        kind = types.NamedTuple(fields, of)  # type: ignore[no-untyped-call]
    return kind


class Kernel:
    """A compiled function with one signature, without the GIL; compiled when first needed."""

    def __init__(self, function: Callable[..., Any], signature: tuple[Type, ...]) -> None:
        self._function = function
        self._signature = signature
        self._compiled: Any = None

    def load(self, compiling: Callable[[], None] | None = None) -> bool:
        """Make the kernel ready. True if it had to be compiled, False if it was there already.

        `compiling` is called before it is compiled.
        """
        with _lock:
            if self._compiled is not None:
                return False
            clib.bind()
            compiled = njit(nogil=True, cache=True)(self._function)
            cached = _load_from_cache(compiled, self._signature)
            if not cached:
                if compiling is not None:
                    compiling()
                compiled.compile(self._signature)
            compiled.disable_compile()
            self._compiled = compiled
            return not cached

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            self.load()
        return self._compiled(*arguments)


def _load_from_cache(dispatcher: Any, signature: tuple[Type, ...]) -> bool:
    """What `dispatcher.compile` does first, but for one thing: numba makes all that it can compile
    known to itself before it looks into its cache. Code that is compiled already needs none of it,
    and it would take as long as importing numba does, and 15 MiB. Nor is numba's runtime compiled,
    since kernels neither allocate nor return arrays: its functions in C have to be known, no more.
    """
    try:
        context, cache = dispatcher.targetctx, dispatcher._cache
        for name, address in _nrt_python.c_helpers.items():
            llvm.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)
        found = cache._load_overload(signature, context)
        if found is None:
            return False
        context.insert_user_function(found.entry_point, found.fndesc, [found.library])
        dispatcher.add_overload(found)
    except AttributeError:  # these are internals: a numba without them loads it as it sees fit
        return False
    return True


_kernels: list[Kernel] = []
_lock = threading.Lock()
_frozen = False


def kernel(*signature: Type) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare a module-level function as a kernel with these argument types."""

    def declare(function: Callable[..., Any]) -> Kernel:
        declared = Kernel(function, signature)
        _kernels.append(declared)
        return declared

    return declare


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What `warm_up` has done."""

    seconds: float
    """Time it took: well under a second from cache, tens of seconds for a first compilation."""
    kernels: int
    """Kernels that are ready now."""
    compiled: int
    """Those that were compiled because the cache did not hold them."""

    @property
    def cache_hit(self) -> bool:
        """Nothing had to be compiled."""
        return self.compiled == 0


def warm_up(compiling: Callable[[], None] | None = None) -> WarmUp:
    """Load or compile every kernel; may be called again and from any thread.

    `compiling` is called once before the first one that has to be compiled, if any has to.
    Raises `NativeLibraryError` if the C libraries are missing or too old.
    """
    # Imported here because these modules declare their kernels by this one.
    from transport.kernels import bitmap, digests, pages, unpack  # noqa: F401

    global _frozen
    began = time.monotonic()
    compiled = 0
    for each in _kernels:
        compiled += each.load(None if compiled else compiling)
    if not _frozen:
        # numba's hundred thousands of objects stay; the collector need not look at them each time.
        gc.freeze()
        _frozen = True
    return WarmUp(time.monotonic() - began, len(_kernels), compiled)
