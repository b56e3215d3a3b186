"""Streams as QEMU writes them, and what is in a stream: made from the format alone.

Shares nothing with `sync.vmm.stream`. The parser is strict: whatever it does not know is a
`ValueError`. Integers are big-endian; `sync.vmm.stream.form` tells the same in other words.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

PAGE = 4096
MACHINE = b"pc-q35-11.1"


@dataclass(frozen=True)
class Block:
    name: bytes
    n_pages: int


@dataclass(frozen=True)
class Record:
    block: bytes
    page: int
    content: bytes | None
    """None: a page of zeros."""


@dataclass
class Parsed:
    blocks: tuple[Block, ...] = ()
    records: list[Record] = field(default_factory=list)
    sections: list[tuple[int, int]] = field(default_factory=list)
    """Type, and how many records."""
    commands: list[tuple[int, bytes]] = field(default_factory=list)
    tail: bytes = b""


class StreamWriter:
    """Writes a stream piece by piece; CONTINUE wherever QEMU would have it."""

    def __init__(self, blocks: Sequence[Block], section: int = 2) -> None:
        self.blocks = tuple(blocks)
        self._section = struct.pack(">I", section)
        self._last: bytes | None = None

    def header(self, uuid: bytes | None = None) -> bytes:
        data = b"QEVM" + struct.pack(">IBI", 3, 7, len(MACHINE)) + MACHINE
        if uuid is not None:
            name = b"configuration/uuid"
            data += bytes([5, len(name)]) + name + struct.pack(">I", 1) + uuid
        return data

    def setup(self, name: bytes = b"ram", instance: int = 0, version: int = 4) -> bytes:
        start = b"\1" + self._section + bytes([len(name)]) + name
        start += struct.pack(">II", instance, version)
        return start + self.block_list() + self.records_end() + self.footer()

    def block_list(self) -> bytes:
        total = sum(block.n_pages for block in self.blocks) * PAGE
        data = struct.pack(">Q", total | 4)
        for block in self.blocks:
            data += bytes([len(block.name)]) + block.name
            data += struct.pack(">Q", block.n_pages * PAGE)
        return data

    def part(self, records: Sequence[Record], kind: int = 2) -> bytes:
        data = b"".join(map(self.record, records))
        return self.opening(kind) + data + self.records_end() + self.footer()

    def opening(self, kind: int) -> bytes:
        return bytes([kind]) + self._section

    def record(self, record: Record) -> bytes:
        flags = 2 if record.content is None else 8
        name = b""
        if record.block == self._last:
            flags |= 0x20
        else:
            name = bytes([len(record.block)]) + record.block
        self._last = record.block
        body = b"\0" if record.content is None else record.content
        return struct.pack(">Q", record.page * PAGE | flags) + name + body

    def records_end(self) -> bytes:
        return struct.pack(">Q", 0x10)

    def footer(self) -> bytes:
        return b"\x7e" + self._section

    def command(self, number: int, data: bytes = b"") -> bytes:
        return b"\x08" + struct.pack(">HH", number, len(data)) + data


class _Input:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n_bytes: int) -> bytes:
        part = self.data[self.at : self.at + n_bytes]
        if len(part) < n_bytes:
            raise ValueError("the stream ends too early")
        self.at += n_bytes
        return part

    def number(self, n_bytes: int) -> int:
        return int.from_bytes(self.take(n_bytes), "big")

    def name(self) -> bytes:
        return self.take(self.number(1))


def parse(data: bytes) -> Parsed:
    """What is in a whole stream."""
    i, parsed = _Input(data), Parsed()
    _expect(i.take(8) == b"QEVM\0\0\0\3", "header")
    section = -1
    last: list[bytes] = []
    ended = configured = False
    while True:
        start = i.at
        kind = i.number(1)
        if kind == 7:
            length = i.number(4)
            _expect(length < 256, "machine")
            i.take(length)
            configured = True
            continue
        if kind == 5:
            _expect(configured and i.name() == b"configuration/uuid", "subsection")
            i.take(20)
            continue
        configured = False
        if kind == 8:
            command, length = i.number(2), i.number(2)
            _expect((command, length) in ((1, 0), (2, 4), (11, 0)), "command")
            parsed.commands.append((command, i.take(length)))
        elif kind == 1:
            _expect(section < 0, "second start")
            section = i.number(4)
            _expect((i.name(), i.number(4), i.number(4)) == (b"ram", 0, 4), "section")
            _section(i, parsed, kind, section, last)
        elif kind in (2, 3):
            _expect(i.number(4) == section and not ended, "section goes on")
            ended = kind == 3
            _section(i, parsed, kind, section, last)
        elif kind in (0, 4, 6) and ended:
            parsed.tail = data[start:]
            return parsed
        else:
            raise ValueError(f"type {kind}")


def _section(i: _Input, parsed: Parsed, kind: int, section: int, last: list[bytes]) -> None:
    n_before = len(parsed.records)
    lengths = {block.name: block.n_pages for block in parsed.blocks}
    while True:
        head = i.number(8)
        flags, page = head & 0xFFF, head >> 12
        if flags == 0x10:
            _expect(page == 0, "end of records")
            break
        if flags == 4:
            _expect(not parsed.blocks, "second list")
            blocks = list[Block]()
            while page:
                name, length = i.name(), i.number(8)
                _expect(length % PAGE == 0 and length // PAGE <= page, "length")
                _expect(name not in [block.name for block in blocks], "same name")
                _expect(len(blocks) < 512, "number of blocks")
                page -= length // PAGE
                blocks.append(Block(name, length // PAGE))
            parsed.blocks = tuple(blocks)
            lengths = {block.name: block.n_pages for block in blocks}
            continue
        _expect(flags & ~0x20 in (2, 8), "flags")
        if not flags & 0x20:
            last[:] = [i.name()]
        _expect(bool(last) and page < lengths.get(last[0], 0), "page")
        content = None
        if flags & 8:
            content = i.take(PAGE)
        else:
            _expect(i.number(1) == 0, "zero")
        parsed.records.append(Record(last[0], page, content))
    _expect(i.number(1) == 0x7E and i.number(4) == section, "footer")
    parsed.sections.append((kind, len(parsed.records) - n_before))


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
