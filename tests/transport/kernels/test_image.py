"""From an object file to code that is called."""

import ctypes
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest

from transport.kernels.image import Image, LoadedImage
from transport.kernels.linker import LinkError, link

LIBC = ctypes.CDLL(None)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def object_file(text: str, reloc: str = "pic", codemodel: str = "small") -> bytes:
    machine = llvm.Target.from_default_triple().create_target_machine(
        opt=2, reloc=reloc, codemodel=codemodel
    )
    return bytes(machine.emit_object(llvm.parse_assembly(text)))


def function(loaded: LoadedImage, name: str) -> Any:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    return kind(loaded.address + loaded.entries[name])


def test_code_finds_its_constants_its_functions_and_those_of_c() -> None:
    text = """
    @bytes = internal constant [4 x i8] c"\\05\\06\\07\\08"
    @numbers = internal constant [3 x i64] [i64 100, i64 200, i64 300], align 64
    declare i64 @labs(i64)
    declare i64 @llabs(i64)
    define internal i64 @inner(i64 %n) noinline {
      %at = getelementptr [4 x i8], ptr @bytes, i64 0, i64 %n
      %byte = load i8, ptr %at
      %wide = zext i8 %byte to i64
      ret i64 %wide
    }
    define i64 @one(i64 %n) {
      %m = call i64 @labs(i64 %n)
      %a = call i64 @inner(i64 %m)
      %at = getelementptr [3 x i64], ptr @numbers, i64 0, i64 %m
      %b = load i64, ptr %at
      %c = add i64 %a, %b
      ret i64 %c
    }
    define i64 @two(i64 %n) {
      %m = call i64 @llabs(i64 %n)
      %k = call i64 @labs(i64 %m)
      ret i64 %k
    }
    """
    image = link(object_file(text), {"one", "two"})
    assert image.entries.keys() == {"one", "two"}
    assert image.imports.keys() == {"labs", "llabs"}
    image = Image.from_bytes(image.to_bytes())
    addresses = {
        name: ctypes.cast(getattr(LIBC, name), ctypes.c_void_p).value or 0 for name in image.imports
    }
    for _ in range(2):  # at another address each time
        loaded = image.load(addresses)
        assert [function(loaded, "one")(-n) for n in range(3)] == [105, 206, 307]
        assert function(loaded, "two")(-(1 << 40)) == 1 << 40


def test_code_in_memory_cannot_be_written() -> None:
    loaded = link(object_file("define i64 @one(i64 %n) { ret i64 %n }"), {"one"}).load({})
    ranges = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    for where, access in ranges:
        start, end = (int(number, 16) for number in where.split("-"))
        if start <= loaded.address < end:
            assert access == "r-xp"


def test_data_that_can_be_written_is_refused() -> None:
    text = """
    @counter = global i64 0
    define i64 @one(i64 %n) { store i64 %n, ptr @counter ret i64 %n }
    """
    with pytest.raises(LinkError):
        link(object_file(text), {"one"})
    with pytest.raises(LinkError, match="written"):
        link(object_file(text.replace("i64 0", "i64 1")), {"one"})


def test_code_that_needs_to_know_its_address_is_refused() -> None:
    text = """
    declare i64 @labs(i64)
    define i64 @one(i64 %n) { %m = call i64 @labs(i64 %n) ret i64 %m }
    """
    with pytest.raises(LinkError, match="relocation of type 1"):
        link(object_file(text, "static", "large"), {"one"})
