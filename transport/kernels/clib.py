"""The C functions that kernels call: LZ4 blocks, XXH3, memcpy, and two system calls on files.

Owns their declaration for numba and their address. They come out of the extension modules of the
`lz4` and `xxhash` packages, which export the C libraries that they contain (or link to); calling
them there spares the microsecond, and the GIL, that the Python functions cost for each page. Only
functions of the libraries' stable public API are used (lz4.h and xxhash.h).

Addresses are passed as integers. The symbols get names of our own, so that another copy of the
same library in the process cannot be taken for it, and are defined before any code that needs them
is loaded: LLVM would end the process if it could not find one.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Final

import llvmlite.binding as llvm
from numba import types

from transport.errors import TransportError

LZ4_STATE_WORDS: Final = 2056
"""uint64 words, a little more than what LZ4 asks for its state (16416 bytes since 1.9)."""

_PREFIX = "vfio_ferry_"
_ADDRESS = types.uintp
_INT = types.int32

_LZ4_FUNCTIONS = (
    "LZ4_compress_fast_extState",
    "LZ4_loadDict",
    "LZ4_compress_fast_continue",
    "LZ4_decompress_safe_usingDict",
)
_LIBC_FUNCTIONS = ("memcpy", "lseek", "pwrite")

lz4_compress: Any = types.ExternalFunction(
    _PREFIX + "LZ4_compress_fast_extState",
    _INT(_ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT, _INT),
)
"""(state, source, destination, source bytes, room, acceleration) -> bytes, 0: did not fit"""
lz4_load_dictionary: Any = types.ExternalFunction(
    _PREFIX + "LZ4_loadDict", _INT(_ADDRESS, _ADDRESS, _INT)
)
"""(state, dictionary, bytes) -> bytes loaded"""
lz4_compress_with_dictionary: Any = types.ExternalFunction(
    _PREFIX + "LZ4_compress_fast_continue",
    _INT(_ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT, _INT),
)
"""As `lz4_compress`, with the state that `lz4_load_dictionary` left."""
lz4_decompress: Any = types.ExternalFunction(
    _PREFIX + "LZ4_decompress_safe_usingDict",
    _INT(_ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS, _INT),
)
"""(source, destination, source bytes, room, dictionary, its bytes) -> bytes, negative: malformed"""
xxh3_64: Any = types.ExternalFunction(
    _PREFIX + "XXH3_64bits_withSeed", types.uint64(_ADDRESS, types.uintp, types.uint64)
)
"""(data, bytes, seed) -> digest"""
memcpy: Any = types.ExternalFunction(_PREFIX + "memcpy", _ADDRESS(_ADDRESS, _ADDRESS, types.uintp))
"""(destination, source, bytes)"""
lseek: Any = types.ExternalFunction(_PREFIX + "lseek", types.int64(_INT, types.int64, _INT))
"""(descriptor, offset, whence) -> offset, negative: error. It also moves the file's position."""
pwrite: Any = types.ExternalFunction(
    _PREFIX + "pwrite", types.int64(_INT, _ADDRESS, types.uintp, types.int64)
)
"""(descriptor, source, bytes, offset) -> bytes written, negative: error"""


class NativeLibraryError(TransportError):
    """A C function that the page kernels call is missing. Install binary wheels of lz4 and xxhash.

    `python -m pip install --force-reinstall --only-binary=:all: 'lz4>=4.3' 'xxhash>=3.4'`
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; install binary wheels: python -m pip install --force-reinstall"
            " --only-binary=:all: 'lz4>=4.3' 'xxhash>=3.4'"
        )


_bound = False


def bind() -> None:
    """Make the symbols known to LLVM; later calls do nothing. Raises `NativeLibraryError`."""
    global _bound
    if _bound:
        return
    lz4 = _load("lz4.block._block")
    xxhash = _load("xxhash._xxhash")
    addresses = {name: _address(lz4, name) for name in _LZ4_FUNCTIONS}
    # The plain function is compiled for any x86-64; where the package chooses a faster one by the
    # processor (xxh_x86dispatch.h), so do we.
    fast = "XXH3_64bits_withSeed_dispatch"
    name = fast if hasattr(xxhash, fast) else "XXH3_64bits_withSeed"
    addresses["XXH3_64bits_withSeed"] = _address(xxhash, name)
    libc = ctypes.CDLL(None)
    addresses |= {name: _address(libc, name) for name in _LIBC_FUNCTIONS}
    # A larger state would let LZ4 write behind ours.
    _address(lz4, "LZ4_sizeofState")
    state_bytes = lz4.LZ4_sizeofState()
    if not 0 < state_bytes <= LZ4_STATE_WORDS * 8:
        raise NativeLibraryError(f"LZ4 wants a state of {state_bytes} bytes")
    for name, address in addresses.items():
        llvm.add_symbol(_PREFIX + name, address)
    _bound = True


def _load(module: str) -> ctypes.CDLL:
    try:
        file = importlib.import_module(module).__file__
        if file is None:
            raise NativeLibraryError(f"{module} is no shared library")
        return ctypes.CDLL(file)
    except (ImportError, OSError) as error:
        raise NativeLibraryError(f"{module} cannot be loaded ({error})") from error


def _address(library: ctypes.CDLL, name: str) -> int:
    try:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        address = None
    if not address:
        raise NativeLibraryError(f"{library._name} does not export {name}")
    return address
