"""What every kernel can rely on: no GIL, and instructions of any processor."""

import os
import threading
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba import njit, types

from transport.kernels import externals
from transport.kernels.declare import Kernel, readonly

SEEK_SET, SEEK_CUR = os.SEEK_SET, os.SEEK_CUR
MANY = 50_000_000


def wait_for_a_seek(descriptor: Any) -> Any:
    """Seeks to 1, and returns the position that another thread has then sought; 1 if none does."""
    position = externals.lseek(descriptor[0], 1, SEEK_SET)
    for _ in range(MANY):
        if position != 1:
            break
        position = externals.lseek(descriptor[0], 0, SEEK_CUR)
    return position


def test_other_threads_run_while_a_kernel_does() -> None:
    kernel = Kernel(wait_for_a_seek, (readonly(types.int64),))
    kernel.load(None)
    descriptor = os.memfd_create("seek")
    found = []
    thread = threading.Thread(target=lambda: found.append(kernel(np.array([descriptor]))))
    thread.start()
    while os.lseek(descriptor, 0, SEEK_CUR) == 0:
        pass
    os.lseek(descriptor, 7, SEEK_SET)
    thread.join()
    os.close(descriptor)
    assert found == [7]


def uses_every_instruction(word: Any) -> Any:
    externals.prefetch(word)
    return externals.count_ones(word) * 100 + externals.trailing_zeros(word)


@pytest.fixture(scope="module")
def dispatcher() -> Any:
    made = njit(uses_every_instruction)
    made.compile((types.uint64,))
    return made


@pytest.mark.parametrize(
    ("word", "expected"), [(0, 64), (1, 100), (0b10100, 202), (1 << 63, 163), ((1 << 64) - 1, 6400)]
)
def test_instructions_count_bits(dispatcher: Any, word: int, expected: int) -> None:
    assert dispatcher(np.uint64(word)) == expected


@pytest.mark.parametrize("triple", ["x86_64-linux-gnu", "aarch64-linux-gnu"])
def test_instructions_are_those_of_any_processor(dispatcher: Any, triple: str) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    [text] = dispatcher.inspect_llvm().values()
    module = llvm.parse_assembly(text)
    module.triple = triple
    machine = llvm.Target.from_triple(triple).create_target_machine()
    assert machine.emit_object(module)
