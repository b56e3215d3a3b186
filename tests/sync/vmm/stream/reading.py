"""A reader under test: feeds it, answers it, and keeps what it says."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ferry.migration.kernels import STREAM_KERNEL
from sync.vmm.stream.errors import StreamNotFollowed
from sync.vmm.stream.kernel import follow_records
from sync.vmm.stream.reader import (
    Announced,
    BlockList,
    DecisionDue,
    Event,
    PageRange,
    PassEnded,
    PassOn,
    Sample,
    StreamReader,
    TailBegan,
)

HELD_BYTES = 1 << 17
TAIL_BYTES = 1 << 16

Decide = Callable[[StreamReader, Event], None]


@dataclass
class Outcome:
    passed_on: bytearray = field(default_factory=bytearray)
    announced: list[tuple[int, bool]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    due: list[str] = field(default_factory=list)
    n_pass_ends: int = 0
    tail_at: int | None = None
    """How many bytes had been passed on when the tail began."""

    def add(self, event: Event) -> None:
        match event:
            case PassOn(data):
                assert data
                self.passed_on += data
            case Announced(pages, zeros):
                assert self.tail_at is None
                self.announced += zip(pages.tolist(), zeros.tolist(), strict=True)
            case Sample():
                self.samples.append(event)
            case DecisionDue(name):
                self.due.append(name)
            case PassEnded():
                self.n_pass_ends += 1
            case TailBegan():
                assert self.tail_at is None
                self.tail_at = len(self.passed_on)


def new_reader(
    held_bytes: int = HELD_BYTES, tail_bytes: int = TAIL_BYTES, *, plain: bool = False
) -> StreamReader:
    """`plain`: with the loop as Python runs it."""
    return StreamReader(
        max_held_bytes=held_bytes,
        max_tail_bytes=tail_bytes,
        kernel=follow_records if plain else STREAM_KERNEL,
    )


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """`data` in pieces of these sizes, and the rest as one."""
    at = 0
    for size in sizes:
        if at < len(data):
            yield data[at : at + size]
        at += size
    if at < len(data):
        yield data[at:]


def every(data: bytes, n_bytes: int) -> Iterator[bytes]:
    return (data[at : at + n_bytes] for at in range(0, len(data), n_bytes))


def carry_all(reader: StreamReader, event: Event) -> None:
    if isinstance(event, BlockList):
        for block in event.blocks:
            reader.carry(block.name)


def take_all(reader: StreamReader, event: Event) -> None:
    """Takes all blocks; flat pages are counted through."""
    if isinstance(event, BlockList):
        flat = 0
        for block in event.blocks:
            reader.take(block.name, [PageRange(0, block.n_pages, flat)])
            flat += block.n_pages


def leave(reader: StreamReader, event: Event) -> None:
    """Decides nothing."""


def read(
    reader: StreamReader, pieces: Iterable[bytes], decide: Decide, outcome: Outcome | None = None
) -> Outcome:
    """Feeds all of it, and says that the stream has ended. Raises what the reader raises."""
    outcome = outcome or Outcome()
    for piece in pieces:
        # What was fed may not be used later: it is wiped.
        buffer = bytearray(piece)
        reader.feed(buffer)
        drain(reader, decide, outcome)
        buffer[:] = b"\xee" * len(buffer)
        buffer.clear()
    reader.end()
    return outcome


def drain(reader: StreamReader, decide: Decide, outcome: Outcome) -> None:
    while (event := reader.next_event()) is not None:
        outcome.add(event)
        decide(reader, event)


def read_or_close(
    reader: StreamReader, pieces: Iterable[bytes], decide: Decide
) -> tuple[Outcome, StreamNotFollowed | None]:
    """As `auto` does it: closed when it is not followed and nothing was taken over."""
    outcome = Outcome()
    pieces = iter(pieces)
    try:
        return read(reader, pieces, decide, outcome), None
    except StreamNotFollowed as error:
        reader.carry_closed()
        drain(reader, leave, outcome)
        return read(reader, pieces, leave, outcome), error
