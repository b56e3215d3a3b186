"""How a kernel is declared and called.

A kernel is a function in the part of Python that numba compiles, with one explicit signature. It
is loaded from numba's cache, or compiled, when it is first called, or with all the others by
`load.warm_up`: importing the file that declares it does neither.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Final

import llvmlite.binding as llvm
from numba import config, njit, types

from transport.kernels import clib
from transport.kernels.cache import open_folder
from transport.wire.errors import TransportError

Type = Any
"""A type of numba's."""

_OPTIONS: Final[Any] = {"nogil": True, "error_model": "numpy"}
"""Without the GIL; divisions are not checked."""
_config: Final[Any] = config  # what numba sets there has no types
_lock: Final = threading.Lock()
"""Held to load or compile, and while numba's cache is directed to our folder."""


class CompilationFailed(TransportError):
    """A kernel cannot be compiled."""

    exit_name = "local"


class Origin(Enum):
    """Where the machine code of a kernel has come from."""

    FOUND = "found in the cache"
    KEPT = "compiled, and put into the cache"
    IN_MEMORY = "compiled for this process alone"


def readonly(element: Type) -> Type:
    """A 1-D contiguous array that the kernel only reads; takes writable arrays, too."""
    return types.Array(element, 1, "C", readonly=True)


def writable(element: Type) -> Type:
    """A 1-D contiguous array that the kernel writes."""
    return types.Array(element, 1, "C")


def named_tuple(fields: tuple[Type, ...], of: type[tuple[Any, ...]]) -> Type:
    """A NamedTuple class with fields of these types."""
    return types.BaseTuple.from_types(fields, of)  # type: ignore[no-untyped-call]


def inlined(function: Callable[..., Any]) -> Any:
    """Declare a module-level function for use inside kernels, which have a copy of it each."""
    return njit(inline="always", **_OPTIONS)(function)


class Kernel:
    """A compiled function with one signature, without the GIL.

    Raises TypeError for what is not of the signature; numbers are converted as C does.
    """

    def __init__(self, function: Callable[..., Any], signature: tuple[Type, ...]) -> None:
        self._function = function
        self._signature = signature
        self._compiled: Any = None
        self.origin: Origin | None = None
        """None: it is not ready."""

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            with open_folder() as folder:
                self.load(folder.path)
        return self._compiled(*arguments)

    def load(self, folder: Path | None) -> None:
        """Make it ready: out of numba's cache in `folder`, or by compiling it to there.

        A folder that is damaged or full is no reason to fail. Raises `CompilationFailed`, and
        `NativeLibraryError` if the C libraries are missing or too old.
        """
        with _lock:
            if self._compiled is not None:
                return
            _name_c_functions()
            made, origin = None, Origin.IN_MEMORY
            if folder is not None:
                made, origin = self._by_cache(folder)
            if made is None:
                made = njit(**_OPTIONS)(self._function)
                try:
                    made.compile(self._signature)
                except Exception as error:
                    reason = " ".join(str(error).splitlines()[:2])
                    raise CompilationFailed(
                        f"{self._function.__name__} cannot be compiled: {reason}"
                    ) from error
            made.disable_compile()
            self._compiled, self.origin = made, origin

    def _by_cache(self, folder: Path) -> tuple[Any, Origin]:
        """What numba has made; None if it could not, this way."""
        made = njit(**_OPTIONS)(self._function)
        before, _config.CACHE_DIR = _config.CACHE_DIR, str(folder)
        try:
            made.enable_caching()
        except RuntimeError:
            return None, Origin.IN_MEMORY
        finally:
            _config.CACHE_DIR = before
        if not Path(made.stats.cache_path).is_relative_to(folder):
            return None, Origin.IN_MEMORY  # numba has looked for another place to write to
        try:
            made.compile(self._signature)
        except Exception as error:
            if not isinstance(error, OSError):
                _forget(folder, self._function.__name__)
            return made if made.signatures else None, Origin.IN_MEMORY
        return made, Origin.FOUND if made.stats.cache_hits else Origin.KEPT


@functools.cache
def _name_c_functions() -> None:
    for name, address in clib.addresses().items():
        llvm.add_symbol(name, address)


def _forget(folder: Path, name: str) -> None:
    """What numba has kept of this kernel is damaged: the next process makes it anew."""
    with suppress(OSError):
        for index in folder.rglob(f"*.{name}-*.nbi"):
            index.unlink()


def kernel(*signature: Type) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare a module-level function as a kernel with these argument types."""
    return lambda function: Kernel(function, signature)
