"""From an object file to an image: ELF for x86-64, as LLVM writes it for position-independent code.

Such code finds its constants and functions by their distance, so what one image holds needs no
address. Each C function outside gets a stub in the image, which jumps to an address that is filled
in when the image is loaded. Names and numbers are those of the ELF specification (elf(5)) and of
the System V ABI for x86-64.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any, Final, NamedTuple

from transport.kernels.image import Image

_HEADER = struct.Struct("<40xQ10xHHH")  # e_shoff, e_shentsize, e_shnum, e_shstrndx
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_DISTANCE = struct.Struct("<i")

_PROGBITS: Final = 1
_SYMTAB: Final = 2
_RELA: Final = 4
_WRITE: Final = 1
_ALLOC: Final = 2
_UNDEFINED: Final = 0
_PC32: Final = 2
_PLT32: Final = 4

# `jmp *2(%rip)`, two bytes of nothing, and the address, at a multiple of 8.
_JUMP: Final = bytes.fromhex("ff2502000000 cccc")
_STUB_BYTES: Final = len(_JUMP) + 8


class LinkError(Exception):
    """The object file has something in it that an image cannot have."""


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


class _Symbol(NamedTuple):
    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


def link(data: bytes, entries: Collection[str]) -> Image:
    """The image of an object file, with these functions to be called from outside.

    Raises `LinkError`, also for data that can be written: an image has none.
    """
    start, _, count, _ = _HEADER.unpack_from(data)
    sections = _table(data, start, count, _SECTION, _Section)
    code, place = _lay_out(data, sections)
    table = next(each for each in sections if each.type == _SYMTAB)
    symbols = _table(data, table.offset, table.size // _SYMBOL.size, _SYMBOL, _Symbol)
    strings = sections[table.link]

    def name_of(symbol: _Symbol) -> str:
        begin = strings.offset + symbol.name
        return data[begin : data.index(0, begin)].decode()

    stubs: dict[str, int] = {}

    def where(symbol: _Symbol) -> int:
        if symbol.section in place:
            return place[symbol.section] + symbol.value
        name = name_of(symbol)
        if symbol.section != _UNDEFINED:
            raise LinkError(f"{name} is in no section of the image")
        if name not in stubs:
            code.extend(bytes(-len(code) % 8))
            stubs[name] = len(code)
            code.extend(_JUMP + bytes(8))
        return stubs[name]

    for section in sections:
        if section.type != _RELA or section.info not in place:
            continue
        entries_of = range(section.offset, section.offset + section.size, _RELOCATION.size)
        for offset, info, addend in (_RELOCATION.unpack_from(data, at) for at in entries_of):
            if info & 0xFFFFFFFF not in (_PC32, _PLT32):
                raise LinkError(f"relocation of type {info & 0xFFFFFFFF}")
            at = place[section.info] + offset
            _DISTANCE.pack_into(code, at, where(symbols[info >> 32]) + addend - at)
    return Image(
        bytes(code),
        {name_of(each): where(each) for each in symbols if name_of(each) in entries},
        {name: at + len(_JUMP) for name, at in stubs.items()},
    )


def _table(data: bytes, start: int, count: int, layout: struct.Struct, kind: Any) -> list[Any]:
    return [kind(*layout.unpack_from(data, start + n * layout.size)) for n in range(count)]


def _lay_out(data: bytes, sections: list[_Section]) -> tuple[bytearray, dict[int, int]]:
    """Code and constants one after the other, and where each section is, by its number."""
    code, place = bytearray(), {}
    for number, section in enumerate(sections):
        # What is of another type (SHT_X86_64_UNWIND) is for debuggers and exceptions of C++.
        if not section.flags & _ALLOC or section.type != _PROGBITS:
            continue
        if section.flags & _WRITE:
            raise LinkError("there is data that can be written")
        code.extend(bytes(-len(code) % max(section.alignment, 1)))
        place[number] = len(code)
        code += data[section.offset : section.offset + section.size]
    return code, place
