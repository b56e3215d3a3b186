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
_COMPRESS = "llvm.x86.avx512.mask.compress.v16i32"

HAS_COMPRESS: Final[bool] = bool(llvm.get_host_cpu_features().get("avx512f"))
"""Whether this processor has `compress_numbers` (AVX-512)."""


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
    """Store `first` + i for each set bit i of the low 16 of `bits`, ascending, as uint32.

    (address uintp, first uint32, bits uint64). 64 bytes are written, whatever the bits. Only where
    `HAS_COMPRESS`.
    """

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, first, bits = arguments
        numbers = ir.VectorType(_I32, 16)
        mask = ir.VectorType(ir.IntType(1), 16)
        lane = builder.insert_element(ir.Constant(numbers, ir.Undefined), first, _I32(0))
        splat = builder.shuffle_vector(
            lane, ir.Constant(numbers, ir.Undefined), ir.Constant(numbers, [0] * 16)
        )
        candidates = builder.add(splat, ir.Constant(numbers, list(range(16))))
        wanted = builder.bitcast(builder.trunc(bits, ir.IntType(16)), mask)
        kind = ir.FunctionType(numbers, [numbers, numbers, mask])
        compress = builder.module.declare_intrinsic(_COMPRESS, (), kind)
        found = builder.call(compress, [candidates, candidates, wanted])
        pointer = builder.inttoptr(address, numbers.as_pointer())
        builder.store(found, pointer, align=4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

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
