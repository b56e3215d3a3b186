"""Which pages a command lets the controller write, and the rule by which they are dirty.

Owns how a data pointer is read (PRP and SGL) and how much a command transfers. Where the length of
a transfer cannot be known, more pages are named than are written, never fewer. A page that is named
wrongly costs its transfer and nothing else.

Sources: Base Specification 2.0, sections 4.1.1 (PRP) and 4.1.2 (SGL); NVM Command Set 1.0, section
3.2 (commands).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from sync.queues.errors import MemoryUnreadable
from sync.queues.interface import PAGE_BYTES, Memory
from sync.queues.nvme.specification import IDENTIFY_BYTES, Admin, Io, Sqe

MAX_LIST_ENTRIES = 1 << 17
"""Entries of one command's lists that are followed: 512 MiB of pages."""
MAX_PAGES = 1 << 18
"""Pages of one command: 1 GiB. No controller transfers as much at once."""

_DESCRIPTOR = struct.Struct("<QIxxxB")
_SEGMENTS = (2, 3)


class TransferTooLarge(Exception):
    """A command names more memory than any controller transfers."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a namespace's blocks lie in memory."""

    block_bytes: int
    """Including metadata, if that is interleaved with the data."""
    metadata_bytes: int
    """Of a block, in a buffer of its own."""


def admin_bytes(command: Sqe) -> int | None:
    """Bytes that an admin command transfers at most; None: not known."""
    if command.opcode == Admin.IDENTIFY:
        return IDENTIFY_BYTES
    if command.opcode == Admin.GET_LOG_PAGE:
        return ((command.cdw11 & 0xFFFF) << 16 | command.cdw10 >> 16) * 4 + 4
    if command.opcode == Admin.DIRECTIVE_RECEIVE:
        return command.cdw10 * 4 + 4
    if command.opcode == Admin.SECURITY_RECEIVE:
        return command.cdw11
    return None


def io_bytes(command: Sqe, form: Format | None) -> int | None:
    """Bytes that an I/O command transfers at most; None: not known."""
    if command.opcode == Io.READ and form is not None:
        return ((command.cdw12 & 0xFFFF) + 1) * form.block_bytes
    if command.opcode == Io.RESERVATION_REPORT:
        return command.cdw10 * 4 + 4
    if command.opcode == Io.ZONE_RECEIVE:
        return command.cdw12 * 4 + 4
    return None


def pages_written(
    command: Sqe, length: int | None, metadata: int | None, memory: Memory, page_bytes: int
) -> set[int]:
    """Numbers of the pages that a command to the host may write.

    `length` and `metadata` in bytes, None: not known. `page_bytes` is the controller's (CC.MPS).
    Raises `TransferTooLarge`.
    """
    found: set[int] = set()
    ranges = (
        _sgl_ranges(command, memory)
        if command.sgl
        else _prp_ranges(command.prp1, command.prp2, length, memory, page_bytes)
    )
    for address, count in ranges:
        _add(found, address, count)
    if command.mptr and metadata != 0:
        # In a buffer of its own, one piece; what is not known is at least where it begins.
        _add(found, command.mptr, metadata or PAGE_BYTES)
    return found


def _add(found: set[int], address: int, length: int) -> None:
    pages = range(address // PAGE_BYTES, (address + length - 1) // PAGE_BYTES + 1)
    if len(found) + len(pages) > MAX_PAGES:
        raise TransferTooLarge(f"more than {MAX_PAGES} pages")
    if length > 0:
        found.update(pages)


def _prp_ranges(
    prp1: int, prp2: int, length: int | None, memory: Memory, page_bytes: int
) -> Iterator[tuple[int, int]]:
    first = page_bytes - prp1 % page_bytes
    if length is None:
        yield prp1, first
        yield prp2, page_bytes - prp2 % page_bytes
        for entry in _prp_list(prp2, MAX_LIST_ENTRIES, memory, page_bytes, pointers=True):
            if entry == 0:
                return
            yield entry, page_bytes
        return
    yield prp1, min(first, length)
    left = length - first
    if left <= 0:
        return
    if left <= page_bytes:
        yield prp2, left
        return
    for entry in _prp_list(prp2, -(-left // page_bytes), memory, page_bytes):
        yield entry, min(left, page_bytes)
        left -= page_bytes


def _prp_list(
    at: int, count: int, memory: Memory, page_bytes: int, *, pointers: bool = False
) -> Iterator[int]:
    """Up to `count` entries of a list that may go on behind the last entry of each page.

    `pointers`: what may point to the next list may be an entry as well, and is among them.
    """
    count = min(count, MAX_LIST_ENTRIES)
    # The first list may have room for one entry, those behind it are whole pages: no more lists.
    for _ in range(count // (page_bytes // 8 - 1) + 2):
        room = (page_bytes - at % page_bytes) // 8
        n_read = min(room, count)
        try:
            entries = struct.unpack(f"<{n_read}Q", memory.read(at & -8, 8 * n_read))
        except MemoryUnreadable:
            return
        if count <= room:
            yield from entries
            return
        yield from entries if pointers else entries[:-1]
        count -= n_read - 1
        at = entries[-1]
        if at == 0:
            return


def _sgl_ranges(command: Sqe, memory: Memory) -> Iterator[tuple[int, int]]:
    left = MAX_LIST_ENTRIES
    descriptors = [struct.pack("<QQ", command.prp1, command.prp2)]
    while descriptors:
        raw = descriptors.pop(0)
        address, length, kind = _DESCRIPTOR.unpack(raw)
        if kind >> 4 == 0:
            yield address, length
        elif kind >> 4 in _SEGMENTS and not descriptors:
            count = min(length // 16, left)
            left -= count
            try:
                segment = memory.read(address, 16 * count)
            except MemoryUnreadable:
                return
            descriptors = [segment[at : at + 16] for at in range(0, 16 * count, 16)]


class DirtyPages:
    """Pages of commands: dirty from the doorbell until the first round after the completion."""

    def __init__(self) -> None:
        self._under_way: dict[object, set[int]] = {}
        self._ended: set[int] = set()

    def begin(self, key: object, pages: set[int]) -> None:
        """A command is about to be given to the controller."""
        if pages:
            self._under_way.setdefault(key, set()).update(pages)

    def end(self, key: object) -> None:
        """Its completion was seen."""
        self._ended |= self._under_way.pop(key, set())

    def wrote(self, pages: set[int]) -> None:
        """Pages that were written and are not written any more."""
        self._ended |= pages

    def rename_all(self, key: object) -> None:
        """What is under way, for whatever reason, ends with `key` only."""
        pages = set().union(*self._under_way.values())
        self._under_way = {key: pages} if pages else {}

    def collect(self) -> set[int]:
        """The pages of a round."""
        found = self._ended.union(*self._under_way.values())
        self._ended = set()
        return found
