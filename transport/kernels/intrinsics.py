"""Machine instructions that numba has no name for, as functions for use inside kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Calls are made by compiled code and lack the first argument, which mypy cannot know.
_intrinsic: Callable[[Any], Any] = intrinsic

_BYTE_POINTER = ir.IntType(8).as_pointer()
_I32 = ir.IntType(32)
_LANES = 16
_COMPRESS = "llvm.x86.avx512.mask.compress.v64i8"

HAS_COMPRESS: Final[bool] = bool(llvm.get_host_cpu_features().get("avx512vbmi2"))
"""Whether this processor has `compress_numbers` (AVX-512 VBMI2: since Ice Lake, and Zen 4)."""


@_intrinsic
def count_ones(_context: Any, word: Any) -> Any:
    """Number of set bits of a uint64, as int64."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@_intrinsic
def trailing_zeros(_context: Any, word: Any) -> Any:
    """Number of zero bits below the lowest set bit of a uint64, as int64; 64 for 0."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@_intrinsic
def compress_numbers(_context: Any, address: Any, first: Any, bits: Any) -> Any:
    """Store `first` + i for each set bit i of `bits`, ascending, as uint32.

    (address uintp, first uint32, bits uint64). 256 bytes are written, whatever the bits. Only where
    `HAS_COMPRESS`. The positions are compressed as bytes, all at once, and then widened.
    """

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, first, bits = arguments
        positions = ir.VectorType(ir.IntType(8), 64)
        numbers = ir.VectorType(_I32, _LANES)
        mask = ir.VectorType(ir.IntType(1), 64)
        kind = ir.FunctionType(positions, [positions, positions, mask])
        compress = builder.module.declare_intrinsic(_COMPRESS, (), kind)
        everything = ir.Constant(positions, list(range(64)))
        found = builder.call(compress, [everything, everything, builder.bitcast(bits, mask)])
        nothing = ir.Constant(numbers, ir.Undefined)
        lane = builder.insert_element(nothing, first, _I32(0))
        splat = builder.shuffle_vector(lane, nothing, ir.Constant(numbers, [0] * _LANES))
        for start in range(0, 64, _LANES):
            part = ir.Constant(numbers, list(range(start, start + _LANES)))
            some = builder.shuffle_vector(found, ir.Constant(positions, ir.Undefined), part)
            wide = builder.add(builder.zext(some, numbers), splat)
            at = builder.add(address, ir.Constant(address.type, 4 * start))
            builder.store(wide, builder.inttoptr(at, numbers.as_pointer()), align=4)
        return ir.Constant(_BYTE_POINTER, None)

    return types.void(types.uintp, types.uint32, types.uint64), generate


@_intrinsic
def prefetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line at `address` (uintp) in the second-level cache; never faults."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE_POINTER], kind)
        pointer = builder.inttoptr(arguments[0], _BYTE_POINTER)
        return builder.call(function, [pointer, _I32(0), _I32(2), _I32(1)])

    return types.void(types.uintp), generate
