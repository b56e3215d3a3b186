"""What kernels call that is not Python: C functions by their names, and machine instructions.

`clib` says where the C functions are. Addresses are passed as integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_ADDRESS: Final = types.uintp
_INT: Final = types.int32


def _c_function(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(name, result(*arguments))


lz4_compress = _c_function(
    "LZ4_compress_fast_extState", _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT, _INT
)
"""(state, source, destination, source bytes, room, acceleration) -> bytes, 0: did not fit"""
lz4_load_dictionary = _c_function("LZ4_loadDict", _INT, _ADDRESS, _ADDRESS, _INT)
"""(state, dictionary, bytes) -> bytes loaded"""
lz4_compress_with_dictionary = _c_function(
    "LZ4_compress_fast_continue", _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT, _INT
)
"""As `lz4_compress`, with the state that `lz4_load_dictionary` left."""
lz4_decompress = _c_function(
    "LZ4_decompress_safe_usingDict", _INT, _ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS, _INT
)
"""(source, destination, source bytes, room, dictionary, its bytes) -> bytes, negative: malformed"""
xxh3_64 = _c_function("XXH3_64bits_withSeed", types.uint64, _ADDRESS, types.uintp, types.uint64)
"""(data, bytes, seed) -> digest"""
memcpy = _c_function("memcpy", _ADDRESS, _ADDRESS, _ADDRESS, types.uintp)
"""(destination, source, bytes)"""
lseek = _c_function("lseek", types.int64, _INT, types.int64, _INT)
"""(descriptor, offset, whence) -> offset, negative: error. It also moves the file's position."""
pwrite = _c_function("pwrite", types.int64, _INT, _ADDRESS, types.uintp, types.int64)
"""(descriptor, source, bytes, offset) -> bytes written, negative: error"""


def _instruction(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


@_instruction
def count_ones(_context, word):  # type: ignore[no-untyped-def]
    """Number of set bits of a uint64, as int64."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.ctpop(values[0])

    return types.int64(types.uint64), generate


@_instruction
def trailing_zeros(_context, word):  # type: ignore[no-untyped-def]
    """Number of zero bits below the lowest set bit of a uint64, as int64; 64 for 0."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@_instruction
def prefetch(_context, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at `address` (uintp) in the second-level cache; never faults."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        at = builder.inttoptr(values[0], pointer)
        builder.call(function, [at, i32(0), i32(2), i32(1)])
        return context.get_dummy_value()

    return types.void(types.uintp), generate
