"""Machine instructions that numba has no name for, as functions for use inside kernels.

Each is written in LLVM's language. Its function gets `llvmlite.ir`, a builder and the arguments'
values: only the compiler's process has these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from transport.kernels.cache import processor

_LANES = 16
_COMPRESS = "llvm.x86.avx512.mask.compress.v64i8"

HAS_COMPRESS: Final = any("avx512_vbmi2" in line.split() for line in processor())
"""Whether this processor has `compress_numbers` (AVX-512 VBMI2: since Ice Lake, and Zen 4)."""


@dataclass(frozen=True)
class Instruction:
    """What `generate(ir, builder, *values)` makes, as a function; `result` None for nothing."""

    result: type[np.generic] | None
    arguments: tuple[type[np.generic], ...]
    generate: Callable[..., Any]


def _instruction(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    return lambda generate: Instruction(result, arguments, generate)


@_instruction(np.int64, np.uint64)
def count_ones(_ir: Any, builder: Any, word: Any) -> Any:
    """Number of set bits of a uint64, as int64."""
    return builder.ctpop(word)


@_instruction(np.int64, np.uint64)
def trailing_zeros(ir: Any, builder: Any, word: Any) -> Any:
    """Number of zero bits below the lowest set bit of a uint64, as int64; 64 for 0."""
    return builder.cttz(word, ir.Constant(ir.IntType(1), 0))


@_instruction(None, np.uintp, np.uint32, np.uint64)
def compress_numbers(ir: Any, builder: Any, address: Any, first: Any, bits: Any) -> None:
    """Store `first` + i for each set bit i of `bits`, ascending, as uint32.

    (address uintp, first uint32, bits uint64). 256 bytes are written, whatever the bits. Only where
    `HAS_COMPRESS`. The positions are compressed as bytes, all at once, and then widened.
    """
    i32 = ir.IntType(32)
    positions = ir.VectorType(ir.IntType(8), 64)
    numbers = ir.VectorType(i32, _LANES)
    mask = ir.VectorType(ir.IntType(1), 64)
    kind = ir.FunctionType(positions, [positions, positions, mask])
    compress = builder.module.declare_intrinsic(_COMPRESS, (), kind)
    everything = ir.Constant(positions, list(range(64)))
    found = builder.call(compress, [everything, everything, builder.bitcast(bits, mask)])
    nothing = ir.Constant(numbers, ir.Undefined)
    lane = builder.insert_element(nothing, first, i32(0))
    splat = builder.shuffle_vector(lane, nothing, ir.Constant(numbers, [0] * _LANES))
    for start in range(0, 64, _LANES):
        part = ir.Constant(numbers, list(range(start, start + _LANES)))
        some = builder.shuffle_vector(found, ir.Constant(positions, ir.Undefined), part)
        wide = builder.add(builder.zext(some, numbers), splat)
        at = builder.add(address, ir.Constant(address.type, 4 * start))
        builder.store(wide, builder.inttoptr(at, numbers.as_pointer()), align=4)


@_instruction(None, np.uintp)
def prefetch(ir: Any, builder: Any, address: Any) -> None:
    """Ask for the cache line at `address` (uintp) in the second-level cache; never faults."""
    i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    builder.call(function, [builder.inttoptr(address, pointer), i32(0), i32(2), i32(1)])
