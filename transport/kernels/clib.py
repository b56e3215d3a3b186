"""Where the C functions are that kernels call: LZ4 blocks, XXH3, memcpy, two system calls on files.

They are declared in `externals`. They come out of the extension modules of the `lz4` and
`xxhash` packages, which export the C libraries that they contain (or link to); calling them there
spares the microsecond, and the GIL, that the Python functions cost for each page. Only functions of
the libraries' stable public API are used (lz4.h and xxhash.h).
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Final

from transport.wire.errors import TransportError

LZ4_STATE_WORDS: Final = 2056
"""uint64 words, a little more than what LZ4 asks for its state (16416 bytes since 1.9)."""

_LZ4_FUNCTIONS = (
    "LZ4_compress_fast_extState",
    "LZ4_loadDict",
    "LZ4_compress_fast_continue",
    "LZ4_decompress_safe_usingDict",
)


class NativeLibraryError(TransportError):
    """A C function that is called for pages is missing. Install binary wheels of the packages.

    `python -m pip install --force-reinstall --only-binary=:all: 'lz4>=4.3' 'xxhash>=3.4'`
    """

    exit_name = "local"

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; install binary wheels: python -m pip install --force-reinstall"
            " --only-binary=:all: 'lz4>=4.3' 'xxhash>=3.4'"
        )


def addresses() -> dict[str, int]:
    """Where each of the functions is that are not libc's, which every process finds by their
    names. Raises `NativeLibraryError`."""
    lz4 = load_library("lz4.block._block")
    xxhash = load_library("xxhash._xxhash")
    found = {name: address_of(lz4, name) for name in _LZ4_FUNCTIONS}
    # The plain function is compiled for any processor of its kind; where the package chooses a
    # faster one by what this processor has (xxh_x86dispatch.h), so do we.
    fast = "XXH3_64bits_withSeed_dispatch"
    name = fast if hasattr(xxhash, fast) else "XXH3_64bits_withSeed"
    found["XXH3_64bits_withSeed"] = address_of(xxhash, name)
    # A larger state would let LZ4 write behind ours.
    address_of(lz4, "LZ4_sizeofState")
    state_bytes = lz4.LZ4_sizeofState()
    if not 0 < state_bytes <= LZ4_STATE_WORDS * 8:
        raise NativeLibraryError(f"LZ4 wants a state of {state_bytes} bytes")
    return found


def load_library(module: str) -> ctypes.CDLL:
    """The shared library that an extension module is, or is linked to. `NativeLibraryError`."""
    try:
        file = importlib.import_module(module).__file__
        if file is None:
            raise NativeLibraryError(f"{module} is no shared library")
        return ctypes.CDLL(file)
    except (ImportError, OSError) as error:
        raise NativeLibraryError(f"{module} cannot be loaded ({error})") from error


def address_of(library: ctypes.CDLL, name: str) -> int:
    """Where a function of it is. `NativeLibraryError`: it exports none of that name."""
    try:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        address = None
    if not address:
        raise NativeLibraryError(f"{library._name} does not export {name}")
    return address
