"""Compiles all kernels to an image.

The one module that imports numba and LLVM, in a process of its own (`__main__`) that `cache`
starts. What a kernel uses of this room (`inlined` functions, C functions, instructions) is found by
numba in the globals of the kernel's module, as for any function; so they are replaced there by
numba's own objects before anything is compiled.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import traceback
from functools import cache
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.extending import intrinsic
from numba.np import arrayobj

from transport.kernels import clib
from transport.kernels.clib import CFunction
from transport.kernels.declare import (
    RAISED,
    Array,
    Inlined,
    Kernel,
    Parameter,
    Scalar,
    Struct,
    all_kernels,
)
from transport.kernels.image import Image
from transport.kernels.intrinsics import Instruction
from transport.kernels.linker import LinkError, link
from transport.kernels.processes import end_with

# Divisions are not checked, arrays belong to the caller, and nobody calls these functions from
# Python.
_OPTIONS: Final[Any] = {
    "error_model": "numpy",
    "_nrt": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
_WORD = ir.IntType(64)
_WORD_BYTES = 8
# PyArrayObject of NumPy's C API: the object's head, char *data, int nd, npy_intp *dimensions.
_DATA: Final = object.__basicsize__
_DIMENSIONS: Final = _DATA + 16

# What is called from Python: runs the function that numba made, which returns by the first pointer.
_ENTRY: Final = """
declare i32 @"{function}"(ptr, ptr, ptr)

define i64 @"{entry}"(ptr %words) {{
  %result = alloca i64
  %exception = alloca ptr
  store i64 0, ptr %result
  %status = call i32 @"{function}"(ptr %result, ptr %exception, ptr %words)
  %returned = icmp eq i32 %status, 0
  %value = load i64, ptr %result
  %answer = select i1 %returned, i64 %value, i64 {raised}
  ret i64 %answer
}}
"""


def compile_image() -> Image:
    """Compile every kernel for this machine."""
    _check_array_layout()
    # numba loads what it has compiled, which nobody calls here: any address will do.
    nowhere = ctypes.create_string_buffer(1)
    functions = clib.addresses()
    for name in functions:
        llvm.add_symbol(name, ctypes.addressof(nowhere))
    kernels = all_kernels()
    for name in [name for name in sys.modules if name.startswith(f"{__package__}.")]:
        use_numba_in(vars(sys.modules[name]))
    module = llvm.parse_assembly("")
    for text in _compile_all(kernels):
        module.link_in(llvm.parse_assembly(text), preserve=False)
    names = {each.name for each in kernels}
    image = link(_emit(module), names)
    if unknown := image.imports.keys() - functions.keys():
        raise LinkError(f"kernels call {', '.join(sorted(unknown))}, which `clib` does not know")
    return image


def use_numba_in(names: dict[str, Any]) -> None:
    """Replace what is declared for use inside kernels by what numba knows."""
    for name, value in names.items():
        if isinstance(value, Inlined):
            names[name] = _inlined(value)
        elif isinstance(value, CFunction):
            names[name] = _c_function(value)
        elif isinstance(value, Instruction):
            names[name] = _instruction(value)


@cache
def _inlined(declared: Inlined) -> Any:
    return njit(**_OPTIONS)(declared.function)


@cache
def _c_function(declared: CFunction) -> Any:
    signature = _scalar(declared.result)(*map(_scalar, declared.arguments))
    return types.ExternalFunction(declared.name, signature)


@cache
def _instruction(declared: Instruction) -> Any:
    result = types.void if declared.result is None else _scalar(declared.result)
    signature = result(*map(_scalar, declared.arguments))

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        made = declared.generate(ir, builder, *values)
        return context.get_dummy_value() if declared.result is None else made

    # numba wants to see as many parameters as there will be arguments.
    names = ", ".join(f"argument_{n}" for n in range(len(declared.arguments)))
    scope: dict[str, Any] = {"made": (signature, generate)}
    exec(f"def instruction(context, {names}):\n    return made", scope)
    return intrinsic(scope["instruction"])


def _compile_all(kernels: list[Kernel]) -> list[str]:
    """LLVM's language for each of them, which two processes make: somebody waits for it.

    Each takes the next one as it is done with one, from the largest to the smallest.
    """
    queue = sorted(kernels, key=_size, reverse=True)
    take, put = os.pipe()
    os.write(put, bytes(range(len(queue))))
    os.close(put)
    results, send = os.pipe()
    parent, helper = os.getpid(), os.fork()
    if helper == 0:
        status = 1
        try:
            end_with(parent)
            os.close(results)
            with os.fdopen(send, "wb") as pipe:
                pickle.dump(_compile_from(queue, take), pipe)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(send)
    texts = _compile_from(queue, take)
    os.close(take)
    with os.fdopen(results, "rb") as pipe:
        others = pipe.read()
    if os.waitpid(helper, 0)[1]:
        sys.exit(1)  # it has said why
    return [*texts, *pickle.loads(others)]


def _size(kernel: Kernel) -> int:
    return len(kernel.function.__code__.co_code)


def _compile_from(queue: list[Kernel], take: int) -> list[str]:
    """Of as many as this process gets; `take`: a pipe with the numbers of those that are left."""
    texts = []
    while number := os.read(take, 1):
        texts.append(_compile(queue[number[0]]))
    return texts


def _compile(kernel: Kernel) -> str:
    """LLVM's language for one kernel and all that it uses."""
    function = _inlined(Inlined(kernel.function))
    arguments = _arguments(kernel.signature)

    def entry(words):  # type: ignore[no-untyped-def]
        return function(*arguments(words))

    compiled = njit(**_OPTIONS)(entry)
    signature = (types.voidptr,)
    compiled.compile(signature)
    name = compiled.overloads[signature].fndesc.llvm_func_name
    entry_code = _ENTRY.format(function=name, entry=kernel.name, raised=RAISED)
    module = llvm.parse_assembly(compiled.inspect_llvm(signature))
    module.link_in(llvm.parse_assembly(entry_code))
    # Numbers in numba's names tell apart what one process compiles, and here are two.
    for each in (*module.functions, *module.global_variables):
        if not each.is_declaration and each.name != kernel.name:
            each.linkage = "internal"
    return str(module)


def _arguments(signature: tuple[Parameter, ...]) -> Any:
    """A function for use inside kernels: from `Kernel`'s words to a tuple of this signature."""
    result: Any = _tuple([_type(parameter) for parameter in signature], tuple)

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        words = _Words(context, builder, values[0])
        return context.make_tuple(builder, result, [words.take(kind) for kind in result])

    def arguments(_context, words):  # type: ignore[no-untyped-def]
        return result(types.voidptr), generate

    return intrinsic(arguments)


class _Words:
    """Code that takes one argument after the other from an array of words."""

    def __init__(self, context: Any, builder: Any, words: Any) -> None:
        self._context = context
        self._builder = builder
        self._address = builder.ptrtoint(words, _WORD)
        self._taken = 0

    def take(self, kind: Any) -> Any:
        if isinstance(kind, types.BaseTuple):
            fields = [self.take(each) for each in kind.types]  # type: ignore[attr-defined]
            return self._context.make_tuple(self._builder, kind, fields)
        word = self._load(self._address, self._taken * _WORD_BYTES)
        self._taken += 1
        if isinstance(kind, types.Array):
            return self._array(kind, word)
        value_type = self._context.get_value_type(kind)
        return word if value_type == _WORD else self._builder.trunc(word, value_type)

    def _array(self, kind: Any, address: Any) -> Any:
        made = self._context.make_array(kind)(self._context, self._builder)
        element = self._context.get_data_type(kind.dtype)
        item_bytes = _WORD(self._context.get_abi_sizeof(element))
        arrayobj.populate_array(  # type: ignore[no-untyped-call]
            made,
            data=self._builder.inttoptr(self._load(address, _DATA), element.as_pointer()),
            shape=[self._load(self._load(address, _DIMENSIONS), 0)],
            strides=[item_bytes],
            itemsize=item_bytes,
            meminfo=None,
        )
        return made._getvalue()

    def _load(self, address: Any, offset: int) -> Any:
        at = self._builder.add(address, _WORD(offset))
        return self._builder.load(self._builder.inttoptr(at, _WORD.as_pointer()))


def _type(parameter: Parameter) -> Any:
    if isinstance(parameter, Array):
        return types.Array(_scalar(parameter.element), 1, "C", readonly=not parameter.writable)
    if isinstance(parameter, Struct):
        fields = [_type(field) for field in parameter.fields]
        return _tuple(fields, parameter.of)
    return _scalar(parameter)


def _tuple(fields: list[Any], of: type[tuple[Any, ...]]) -> Any:
    return types.BaseTuple.from_types(fields, of)  # type: ignore[no-untyped-call]


def _scalar(kind: Scalar) -> Any:
    return from_dtype(np.dtype(kind))


def _emit(module: llvm.ModuleRef) -> bytes:
    """The object file of a module, without the functions that its entries do not use."""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="small",
    )
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return bytes(machine.emit_object(module))


def _check_array_layout() -> None:
    """That the machine code finds an array's data and length."""
    probe = np.zeros(3, np.uint16)
    data = ctypes.c_size_t.from_address(id(probe) + _DATA).value
    dimensions = ctypes.c_size_t.from_address(id(probe) + _DIMENSIONS).value
    if data != probe.ctypes.data or ctypes.c_ssize_t.from_address(dimensions).value != 3:
        raise RuntimeError("this NumPy has its arrays laid out in another way")
