"""Everything of the stream that is not a record of the `ram` section: header, sections, commands.

`Outline` says how long the next piece is and what it means; it decides nothing about pages. Its
state is small and can be copied, so that a reader may look ahead.
"""

import copy
from enum import Enum, auto
from typing import NamedTuple, Self

from sync.vmm.stream import form
from sync.vmm.stream.errors import StreamCorrupt, StreamNotFollowed
from sync.vmm.stream.kernel import AT, new_state


class Phase(Enum):
    HEADER = auto()
    CONFIGURED = auto()
    """Behind the configuration or one of its subsections."""
    BETWEEN = auto()
    """Between sections."""
    RECORDS = auto()
    """Inside of the `ram` section: `sync.vmm.stream.kernel` goes on."""
    FOOTER = auto()
    TAIL = auto()


class RamBlock(NamedTuple):
    """A block of the guest's RAM, as the VMM names it."""

    name: str
    """One character for each byte (Latin-1)."""
    n_pages: int


class Outline:
    """Where in the stream we are."""

    def __init__(self) -> None:
        self.phase = Phase.HEADER
        self.state = new_state()
        """Where in the records."""
        self._ram: int | None = None
        self._ram_ends = False

    def fork(self) -> Self:
        """A copy that goes on by itself."""
        other = copy.copy(self)
        other.state = self.state.copy()
        other.state[AT] = 0
        return other

    def step(self, data: memoryview) -> int:
        """Length of the piece at the beginning of `data`; 0 if it is not all there, or if the tail
        begins. Not to be called inside of records. Raises `StreamError`."""
        try:
            if self.phase is Phase.HEADER:
                return self._header(data)
            if self.phase is Phase.FOOTER:
                return self._footer(data)
            return self._piece(data)
        except _TooShort:
            return 0

    def end_records(self) -> None:
        """The section's records are at their end."""
        self.phase = Phase.FOOTER

    def _header(self, data: memoryview) -> int:
        magic, version = _number(data, 0, 4), _number(data, 4, 4)
        if magic == form.MULTIFD_MAGIC:
            raise StreamNotFollowed("the connection is a multifd channel")
        if magic != form.MAGIC or version != form.VERSION:
            raise StreamNotFollowed(
                f"the stream begins with {bytes(data[:8]).hex()}: it is encrypted, or of another "
                "version"
            )
        self.phase = Phase.BETWEEN
        return 8

    def _footer(self, data: memoryview) -> int:
        if _number(data, 0, 1) != form.FOOTER:
            raise StreamNotFollowed("a section has no footer")
        section = _number(data, 1, 4)
        if section != self._ram:
            raise StreamCorrupt(f"the footer of section {section} is behind section {self._ram}")
        self.phase = Phase.BETWEEN
        return 5

    def _piece(self, data: memoryview) -> int:
        kind = _number(data, 0, 1)
        if kind in (form.SECTION_PART, form.SECTION_END):
            return self._ram_goes_on(data, kind)
        if kind == form.COMMAND:
            length = _command(data)
            self.phase = Phase.BETWEEN
            return length
        if kind == form.SECTION_START:
            return self._section_start(data)
        if kind == form.CONFIGURATION:
            length = _number(data, 1, 4)
            if length > form.MAX_NAME_BYTES:
                raise StreamNotFollowed(f"the machine type's name has {length} bytes")
            return self._configured(_whole(data, 5 + length))
        if kind == form.SUBSECTION and self.phase is Phase.CONFIGURED:
            return self._configured(_subsection(data))
        if self._ram_ends and kind in (form.SECTION_FULL, form.END_OF_STREAM, form.DESCRIPTION):
            self.phase = Phase.TAIL
            return 0
        if kind == form.SECTION_FULL:
            name, _ = _name(data, 5)
            raise StreamNotFollowed(f"the state of {name!r} comes before the end of the RAM")
        if kind in (form.END_OF_STREAM, form.DESCRIPTION):
            raise StreamCorrupt("the stream ends before its RAM")
        raise StreamNotFollowed(f"a piece of the unknown type {kind:#x}")

    def _configured(self, length: int) -> int:
        self.phase = Phase.CONFIGURED
        return length

    def _section_start(self, data: memoryview) -> int:
        name, at = _name(data, 5)
        section = _number(data, 1, 4)
        instance, version = _number(data, at, 4), _number(data, at + 4, 4)
        if (name, instance, version) != (form.RAM_SECTION, 0, form.RAM_VERSION):
            raise StreamNotFollowed(
                f"section {name!r} (instance {instance}, version {version}) is sent while the "
                "guest runs"
            )
        if self._ram is not None:
            raise StreamCorrupt("the RAM's section starts twice")
        self._ram = section
        self.phase = Phase.RECORDS
        return at + 8

    def _ram_goes_on(self, data: memoryview, kind: int) -> int:
        section = _number(data, 1, 4)
        if section != self._ram or self._ram_ends:
            raise StreamCorrupt(f"section {section} goes on and is not open")
        self._ram_ends = kind == form.SECTION_END
        self.phase = Phase.RECORDS
        return 5


def read_blocks(data: memoryview) -> tuple[int, tuple[RamBlock, ...]] | None:
    """Length and content of the list of blocks at the beginning of `data`; None if it is not all
    there. Raises `StreamError`."""
    try:
        left = _number(data, 0, 8) & ~(form.PAGE_BYTES - 1)
        at, blocks = 8, dict[str, RamBlock]()
        while left:
            if len(blocks) == form.MAX_BLOCKS:
                raise StreamNotFollowed(f"the guest has more than {form.MAX_BLOCKS} RAM blocks")
            name, at = _name(data, at)
            length = _number(data, at, 8)
            at += 8
            if length % form.PAGE_BYTES or length > form.MAX_BLOCK_PAGES * form.PAGE_BYTES:
                raise StreamNotFollowed(f"RAM block {name!r} has {length} bytes")
            if length > left:
                raise StreamCorrupt("the RAM blocks are longer than all RAM")
            if name in blocks:
                raise StreamCorrupt(f"RAM block {name!r} is there twice")
            left -= length
            blocks[name] = RamBlock(name, length // form.PAGE_BYTES)
    except _TooShort:
        return None
    return at, tuple(blocks.values())


class _TooShort(Exception):
    """More bytes are needed."""


def _whole(data: memoryview, length: int) -> int:
    if len(data) < length:
        raise _TooShort
    return length


def _number(data: memoryview, at: int, n_bytes: int) -> int:
    return int.from_bytes(data[at : _whole(data, at + n_bytes)], "big")


def _name(data: memoryview, at: int) -> tuple[str, int]:
    """The name at byte `at`, and the byte behind it."""
    end = _whole(data, at + 1 + _number(data, at, 1))
    return bytes(data[at + 1 : end]).decode("latin-1"), end


def _command(data: memoryview) -> int:
    command, length = _number(data, 1, 2), _number(data, 3, 2)
    expected = form.COMMAND_BYTES.get(command)
    if expected is None:
        raise StreamNotFollowed(f"command {command} of the VMM (postcopy, COLO) is not known")
    if length != expected:
        raise StreamCorrupt(f"command {command} has {length} bytes, not {expected}")
    return _whole(data, 5 + length)


def _subsection(data: memoryview) -> int:
    name, at = _name(data, 1)
    content_bytes = form.SUBSECTION_BYTES.get(name)
    if content_bytes is None:
        raise StreamNotFollowed(f"the stream's configuration has {name!r}")
    return _whole(data, at + 4 + content_bytes)
