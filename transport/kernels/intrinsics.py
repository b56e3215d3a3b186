"""Machine instructions that numba has no name for, as functions for use inside kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Calls are made by compiled code and lack the first argument, which mypy cannot know.
_intrinsic: Callable[[Any], Any] = intrinsic

_BYTE_POINTER = ir.IntType(8).as_pointer()
_I32 = ir.IntType(32)


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
def prefetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line at `address` (uintp) in the second-level cache; never faults."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE_POINTER], kind)
        pointer = builder.inttoptr(arguments[0], _BYTE_POINTER)
        return builder.call(function, [pointer, _I32(0), _I32(2), _I32(1)])

    return types.void(types.uintp), generate
