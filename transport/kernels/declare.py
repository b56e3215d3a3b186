"""How a kernel is declared, made ready and called.

A kernel is a function in the part of Python that numba compiles, with one explicit signature.
`compiler` compiles all of them at once, in a process of its own, to an image of machine code
(`image`), which `cache` keeps for the processes to come. Whoever only calls kernels imports neither
numba nor LLVM, which would take longer and need more memory than all the rest of `send` does, and
importing this room loads nothing: whoever starts a migration wants to say how long a first
compilation takes.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from transport.kernels import cache, clib
from transport.kernels.image import LoadedImage

Scalar = type[np.generic]

RAISED: Final = -(1 << 63)
"""What the machine code of a kernel returns if the kernel raised an exception. None should."""


@dataclass(frozen=True)
class Array:
    """A 1-D contiguous array."""

    element: Scalar
    writable: bool


@dataclass(frozen=True)
class Struct:
    """A NamedTuple of arrays."""

    fields: tuple[Array, ...]
    of: type[tuple[Any, ...]]


Parameter = Scalar | Array | Struct


def readonly(element: Scalar) -> Array:
    """A 1-D contiguous array that the kernel only reads; takes writable arrays, too."""
    return Array(element, writable=False)


def writable(element: Scalar) -> Array:
    """A 1-D contiguous array that the kernel writes."""
    return Array(element, writable=True)


def named_tuple(fields: tuple[Array, ...], of: type[tuple[Any, ...]]) -> Struct:
    """A NamedTuple class with fields of these types."""
    return Struct(fields, of)


@dataclass(frozen=True)
class Inlined:
    """A function that only kernels call; see `inlined`."""

    function: Callable[..., Any]


def inlined(function: Callable[..., Any]) -> Any:
    """Declare a module-level function for use inside kernels, which have a copy of it each."""
    return Inlined(function)


class Kernel:
    """A compiled function with one signature, without the GIL; compiled when first needed.

    Integers come back as integers, for what returns nothing 0. Raises TypeError for an argument
    that is not of the signature.
    """

    def __init__(self, function: Callable[..., Any], signature: tuple[Parameter, ...]) -> None:
        self.function = function
        self.signature = signature
        self._entry: Callable[[bytes], int] | None = None
        flat: list[Scalar | Array] = []
        for parameter in signature:
            flat += parameter.fields if isinstance(parameter, Struct) else [parameter]
        self._n_words = len(flat)
        self._arrays = [
            (position, np.dtype(word.element), word.writable)
            for position, word in enumerate(flat)
            if isinstance(word, Array)
        ]
        # An array is passed as the address of NumPy's object, where the machine code finds data
        # and length: to ask for these here would take longer than all the rest of the call.
        formats = ("Q" if isinstance(word, Array) else _FORMAT[word] for word in flat)
        self._words = struct.Struct("".join(formats))

    @property
    def name(self) -> str:
        """Unique among kernels."""
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"

    def bind(self, address: int) -> None:
        """The machine code is at `address`: `int64_t entry(const uint64_t *words)`."""
        self._entry = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(address)

    def __call__(self, *arguments: Any) -> int:
        if self._entry is None:
            warm_up()
            assert self._entry is not None
        words: list[Any] = []
        for argument in arguments:
            if isinstance(argument, tuple):
                words += argument
            else:
                words.append(argument)
        if len(words) != self._n_words:
            raise TypeError(f"{self.name}: {len(words)} arguments for {self._n_words}")
        for position, dtype, written in self._arrays:
            array = words[position]
            if (
                not isinstance(array, np.ndarray)
                or array.dtype != dtype
                or array.ndim != 1
                or not (flags := array.flags).c_contiguous
                or (written and not flags.writeable)
            ):
                raise TypeError(f"{self.name}: argument {position} is no array as it was declared")
            words[position] = id(array)
        try:
            packed = self._words.pack(*words)
        except struct.error as error:
            raise TypeError(f"{self.name}: {error}") from error
        result = self._entry(packed)
        if result == RAISED:
            raise RuntimeError(f"{self.name} raised an exception")
        return result


_FORMAT: Final[dict[Scalar, str]] = {np.int64: "q", np.uint64: "Q", np.bool_: "Q"}
_kernels: list[Kernel] = []
_lock = threading.Lock()
_loaded: LoadedImage | None = None


def kernel(*signature: Parameter) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare a module-level function as a kernel with these argument types."""

    def declare(function: Callable[..., Any]) -> Kernel:
        declared = Kernel(function, signature)
        _kernels.append(declared)
        return declared

    return declare


def all_kernels() -> list[Kernel]:
    """Every kernel of this room."""
    # Imported here because these modules declare their kernels by this one.
    from transport.kernels import bitmap, digests, pages, tables, unpack  # noqa: F401

    return _kernels


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What `warm_up` has done."""

    seconds: float
    """Time it took: milliseconds from the cache, some seconds for a first compilation."""
    kernels: int
    """Kernels that are ready now."""
    cache_hit: bool
    """Nothing had to be compiled."""


def warm_up(compiling: Callable[[], None] | None = None) -> WarmUp:
    """Load every kernel, or compile them; may be called again and from any thread.

    `compiling` is called once before they are compiled, or before another process is waited for
    that compiles them already. Raises `NativeLibraryError` if the C libraries are missing or too
    old, `CompilationFailed` if there is no image in the cache and none can be made.
    """
    global _loaded
    began = time.monotonic()
    hit = True

    def missing() -> None:
        nonlocal hit
        hit = False
        if compiling is not None:
            compiling()

    with _lock:
        kernels = all_kernels()
        if _loaded is None:
            functions = clib.addresses()
            _loaded = cache.get_image(missing).load(functions)
            for each in kernels:
                each.bind(_loaded.address + _loaded.entries[each.name])
    return WarmUp(time.monotonic() - began, len(kernels), hit)
