"""One round of the guest's migration: from dirty RAM to records, and from records to RAM."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from lab.guest.errors import StreamError
from lab.guest.ram import Ram
from lab.guest.stream import CHUNK_PAGES, Hello, PageData, Record, StreamWriter, ZeroPages


class Chunk(NamedTuple):
    """What goes over the wire at once, and how many pages it was made of."""

    records: bytes
    filled_pages: int
    zero_pages: int
    remaining_pages: int
    """How many are left of this round."""


def dirty_chunks(ram: Ram, writer: StreamWriter) -> Iterator[Chunk]:
    """The pages that are dirty now, `CHUNK_PAGES` at a time. What the CPU writes while this runs
    is dirty for the next round."""
    dirty = ram.dirty_indices()
    for start in range(0, len(dirty), CHUNK_PAGES):
        pages = dirty[start : start + CHUNK_PAGES]
        ram.clean(pages)
        records, filled = writer.pages(pages, ram.copy_pages(pages))
        remaining = len(dirty) - start - len(pages)
        yield Chunk(records, filled, len(pages) - filled, remaining)


def apply_record(ram: Ram, geometry: dict[str, Any], record: Record) -> None:
    """Loads pages, and checks that HELLO tells of a guest with this `geometry`.

    Raises `StreamError` for another geometry, `RamError` for a page that is not there.
    """
    if isinstance(record, PageData):
        ram.put_pages(record.pages, record.data)
    elif isinstance(record, ZeroPages):
        ram.zero_pages(record.pages)
    elif isinstance(record, Hello):
        wrong = sorted(name for name in geometry if record.geometry.get(name) != geometry[name])
        if wrong:
            raise StreamError(f"the source's guest is built differently: {', '.join(wrong)}")
