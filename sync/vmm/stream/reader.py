"""Reads QEMU's migration stream and rewrites it: bytes in, events out. Does no I/O.

Pages of blocks that the caller takes over are announced by their numbers, and left out of the
bytes to pass on; everything else is passed on. Before any record of a block is passed on or left
out, the block has to be decided (`take`, `carry`). Until then the stream is held back and looked
through: each page of an undecided block is handed out as a `Sample`. When no more can be held, the
caller is asked a last time (`DecisionDue`), and the block is carried if it stays undecided.

    feed(bytes), then until there is none:  next_event()

    BlockList ── Sample* ── DecisionDue? ── Announced, PassOn, PassEnded ... ── TailBegan ── PassOn*

What has been passed on is what came in, byte by byte, as long as no page was taken over. So after
`StreamNotFollowed`, unless `has_taken`, the caller may go on with `carry_closed`.

The bytes of a page that is taken over are not looked at: QEMU clears the page's dirty bit before it
reads the page, so whoever reads the page after its announcement reads a state at least as new.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sync.memory import MAX_PAGES
from sync.vmm.stream import form
from sync.vmm.stream.errors import StreamCorrupt, StreamError, StreamNotFollowed, TailTooLong
from sync.vmm.stream.kernel import (
    ASKED,
    AT,
    BLOCK_PAGES,
    END_RANGE,
    FATE,
    FIRST_RANGE,
    N_DROPPED,
    N_OUT,
    N_PAGES,
    NAME_BYTES,
    SAMPLE_AT,
    SAMPLE_PAGE,
    Bytes,
    Fate,
    Status,
)
from sync.vmm.stream.sections import Outline, Phase, RamBlock, read_blocks

BATCH_PAGES = 1 << 16
"""Pages of one `Announced` at most."""
PASS_ON_BYTES = 1 << 18
"""Bytes of one `PassOn` at most, but for the tail's."""
MIN_HELD_BYTES = 1 << 16
"""A record, and the headers of sections in front of it."""


_NOTHING: Bytes = np.empty(0, np.uint8)


class PageRange(NamedTuple):
    """`n_pages` of a block from its page `first` on are the guest's pages from `flat` on."""

    first: int
    n_pages: int
    flat: int


@dataclass(frozen=True, slots=True)
class BlockList:
    """The guest's RAM blocks. Comes once, before any page."""

    blocks: tuple[RamBlock, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A page of an undecided block, as the VMM has read it not long ago.

    From a block's first record to its decision, each of its records that has content gives one.
    """

    block: str
    page: int
    """Counted from the block's beginning."""
    content: bytes


@dataclass(frozen=True, slots=True)
class DecisionDue:
    """The last time to decide `block` before it is carried."""

    block: str


@dataclass(frozen=True, slots=True)
class Announced:
    """Pages to be read from the guest's memory after this, in the order of the stream."""

    pages: npt.NDArray[np.uint32]
    """By the flat numbers that `take` gave them."""
    zeros: npt.NDArray[np.bool_]
    """Which were all zeros when the VMM looked at them."""


@dataclass(frozen=True, slots=True)
class PassOn:
    """The next bytes for the other VMM."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PassEnded:
    """The VMM has begun again at its first dirty page."""


@dataclass(frozen=True, slots=True)
class TailBegan:
    """All pages have been announced; what is passed on from here to the end is device state."""


Event = BlockList | Sample | DecisionDue | Announced | PassOn | PassEnded | TailBegan


class _Mode(Enum):
    FOLLOWING = auto()
    HOLDING = auto()
    """The record at the window's beginning is of an undecided block."""
    UNREAD = auto()
    """The tail, or a stream that is carried closed."""


class StreamReader:
    """One stream. After a `StreamError` it is broken, but for `carry_closed`.

    Takes about `max_held_bytes` while a block is undecided, and a few hundred KiB besides. A page
    takes 4096 bytes there and a page of zeros 9.
    """

    def __init__(
        self,
        *,
        max_held_bytes: int,
        max_tail_bytes: int,
        kernel: Callable[..., int],
    ) -> None:
        """`kernel` is `follow_records`, compiled. ValueError for too few bytes."""
        if max_held_bytes < MIN_HELD_BYTES:
            raise ValueError(f"fewer than {MIN_HELD_BYTES} bytes cannot hold a record")
        self._kernel = kernel
        self._max_held_bytes = max_held_bytes
        self._max_tail_bytes: int | None = max_tail_bytes
        self._mode = _Mode.FOLLOWING
        self._outline = Outline()
        self._error: StreamError | None = None
        self._events = deque[Event]()

        # The window is what is gone through; what was fed and does not fit into it is behind it.
        self._window = self._fed = _NOTHING
        self._at = 0

        self._look: Outline | None = None
        """Goes ahead of `_outline` while there are undecided blocks."""
        self._look_at = 0
        self._held: Bytes | None = None
        self._asked = -1
        self._due = False

        self._blocks: tuple[RamBlock, ...] | None = None
        self._table = np.empty((0, 5), np.int64)
        self._names = np.empty((0, form.MAX_NAME_BYTES), np.uint8)
        self._ranges = np.empty((0, 3), np.int64)

        self._pages = np.empty(BATCH_PAGES, np.uint32)
        self._zeros = np.empty(BATCH_PAGES, np.bool_)
        self._out = np.empty(PASS_ON_BYTES, np.uint8)
        self._tail_bytes = 0

    @property
    def has_taken(self) -> bool:
        """Whether a page was left out, so that the stream cannot be carried closed any more."""
        return bool(self._outline.state[N_DROPPED])

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes the next bytes, which must stay as they are until `next_event` has none.

        ValueError if it has not come to that with the bytes before.
        """
        if self._fed.size or self._events:
            raise ValueError("the bytes before have not been gone through")
        self._fed = np.frombuffer(data, np.uint8)

    def next_event(self) -> Event | None:
        """The next event, or None if more bytes are needed. Raises `StreamError`."""
        if self._error:
            raise self._error
        try:
            while not self._events:
                if not self._step():
                    self._flush()
                    break
        except StreamError as error:
            self._error = error
            raise
        return self._events.popleft() if self._events else None

    def end(self) -> None:
        """The stream has ended. Raises `StreamCorrupt` if it must not end here."""
        if self._mode is not _Mode.UNREAD:
            raise StreamCorrupt("the stream ends before the state of the guest's devices")

    def take(self, block: str, ranges: Sequence[PageRange]) -> None:
        """From now on, pages of `block` are announced if they are in `ranges`, and else passed on.

        ValueError for ranges that overlap or reach behind the block, for a block that is not
        there, and for one that is decided.
        """
        index = self._undecided(block)
        rows = np.array([(r.first, r.first + r.n_pages, r.flat) for r in sorted(ranges)], np.int64)
        rows = rows.reshape(-1, 3)
        edges = [0, *rows[:, :2].flatten().tolist(), self._table[index, BLOCK_PAGES]]
        fits = all(0 <= r.flat <= MAX_PAGES - r.n_pages for r in ranges)
        if edges != sorted(edges) or not fits:
            raise ValueError(f"the ranges of {block!r} overlap or reach too far: {ranges}")
        self._table[index, FIRST_RANGE] = len(self._ranges)
        self._ranges = np.concatenate([self._ranges, rows])
        self._table[index, END_RANGE] = len(self._ranges)
        self._table[index, FATE] = Fate.TAKEN

    def carry(self, block: str) -> None:
        """From now on, all pages of `block` are passed on. ValueError as `take`."""
        self._table[self._undecided(block), FATE] = Fate.CARRIED

    def carry_closed(self) -> None:
        """Passes on everything from now on, unread, beginning with what is held.

        Raises the `StreamError` that broke the reader, if that was none that can be got over:
        a page was taken over, or the stream is corrupt.
        """
        if self._error and not isinstance(self._error, StreamNotFollowed):
            raise self._error
        if self.has_taken:
            raise self._error or StreamNotFollowed("pages have been taken over already")
        self._error = None
        self._mode = _Mode.UNREAD
        self._max_tail_bytes = None
        self._held = None
        self._flush()

    def _undecided(self, block: str) -> int:
        for index, known in enumerate(self._blocks or ()):
            if known.name == block and self._table[index, FATE] == Fate.UNDECIDED:
                return index
        raise ValueError(f"there is no undecided block {block!r}")

    def _step(self) -> bool:
        """Goes on by a piece; whether anything changed."""
        if self._mode is _Mode.UNREAD:
            return self._pass_unread()
        if self._mode is _Mode.HOLDING:
            if self._table[self._asked, FATE] == Fate.UNDECIDED:
                return self._look_ahead()
            self._due = False
            self._mode = _Mode.FOLLOWING
        if self._outline.phase is Phase.RECORDS:
            return self._follow_records()
        view = self._window[self._at :].data
        length = self._outline.step(view)
        if self._outline.phase is Phase.TAIL:
            self._flush()
            self._events.append(TailBegan())
            self._mode = _Mode.UNREAD
            return True
        if not length:
            return self._widen()
        self._pass_on(length)
        return True

    def _follow_records(self) -> bool:
        status, self._at = self._run(self._outline, self._at, look=False)
        if status is Status.NEEDS_BYTES:
            return self._widen()
        if status is Status.RECORDS_END:
            self._outline.end_records()
        elif status is Status.BLOCK_LIST:
            return self._take_blocks()
        elif status in (Status.PAGES_FULL, Status.OUT_FULL):
            self._flush()
        elif status is Status.PASS_ENDED:
            self._flush()
            self._events.append(PassEnded())
        elif status is Status.UNDECIDED:
            self._flush()
            self._hold(int(self._outline.state[ASKED]))
        else:
            raise self._explain(status, self._at)
        return True

    def _run(self, outline: Outline, at: int, *, look: bool) -> tuple[Status, int]:
        state = outline.state
        state[AT] = at
        status = self._kernel(
            self._window,
            state,
            self._table,
            self._names,
            self._ranges,
            look,
            self._pages,
            self._zeros,
            self._out,
        )
        return Status(status), int(state[AT])

    def _take_blocks(self) -> bool:
        if self._blocks is not None:
            raise StreamCorrupt("there is a second list of RAM blocks")
        found = read_blocks(self._window[self._at :].data)
        if found is None:
            return self._widen()
        length, self._blocks = found
        self._table = np.zeros((len(self._blocks), 5), np.int64)
        self._names = np.zeros((len(self._blocks), form.MAX_NAME_BYTES), np.uint8)
        for row, letters, block in zip(self._table, self._names, self._blocks, strict=True):
            name = block.name.encode("latin-1")
            row[BLOCK_PAGES], row[NAME_BYTES] = block.n_pages, len(name)
            letters[: len(name)] = np.frombuffer(name, np.uint8)
        self._pass_on(length)
        self._events.append(BlockList(self._blocks))
        return True

    def _hold(self, block: int) -> None:
        """The window begins at the record at `_at` from now on, and is memory of our own."""
        if self._held is None:
            self._held = np.empty(self._max_held_bytes, np.uint8)
        rest = self._window[self._at :]
        n_held = min(rest.size, self._held.size)
        if n_held < rest.size:
            self._fed = rest[n_held:]  # it is the caller's chunk, and nothing is behind it
        self._held[:n_held] = rest[:n_held]
        self._window = self._held[:n_held]
        self._look_at -= self._at
        if self._look is None or self._look_at < 0:
            self._look, self._look_at = self._outline.fork(), 0
        self._at = 0
        self._asked = block
        self._mode = _Mode.HOLDING

    def _look_ahead(self) -> bool:
        if self._due:
            self._table[self._asked, FATE] = Fate.CARRIED
            return True
        look = self._look
        assert look is not None
        if look.phase is Phase.RECORDS:
            status, self._look_at = self._run(look, self._look_at, look=True)
            if status is Status.SAMPLE:
                at, page = int(look.state[SAMPLE_AT]), int(look.state[SAMPLE_PAGE])
                content = self._window[at : at + form.PAGE_BYTES].tobytes()
                self._events.append(Sample(self._name_of(int(look.state[ASKED])), page, content))
                return True
            if status is Status.RECORDS_END:
                look.end_records()
                return True
            if status is not Status.NEEDS_BYTES:
                raise self._explain(status, self._look_at)
        else:
            length = look.step(self._window[self._look_at :].data)
            self._look_at += length
            if length:
                return True
        if look.phase is Phase.TAIL or self._window.size == self._max_held_bytes:
            self._due = True
            self._events.append(DecisionDue(self._name_of(self._asked)))
            return True
        return self._hold_more()

    def _hold_more(self) -> bool:
        assert self._held is not None
        n_held = self._window.size
        n_more = min(self._fed.size, self._held.size - n_held)
        self._held[n_held : n_held + n_more] = self._fed[:n_more]
        self._fed = self._fed[n_more:] if n_more < self._fed.size else _NOTHING
        self._window = self._held[: n_held + n_more]
        return n_more > 0

    def _widen(self) -> bool:
        """The window is what is left of it and what was fed; whether that is more than before."""
        rest = self._window[self._at :]
        more = self._fed.size > 0
        if not more:
            self._window = rest.copy()  # nothing of the caller's is kept
        elif rest.size:
            self._window = np.concatenate([rest, self._fed])
        else:
            self._window = self._fed
        self._fed = _NOTHING
        self._at = 0
        self._look = self._held = None
        return more

    def _pass_on(self, length: int) -> None:
        """Passes on the window's next bytes."""
        state, out = self._outline.state, self._out
        if out.size - state[N_OUT] < length:
            self._flush()
        out[state[N_OUT] : state[N_OUT] + length] = self._window[self._at : self._at + length]
        state[N_OUT] += length
        self._at += length

    def _pass_unread(self) -> bool:
        data = self._window[self._at :]
        self._window, self._at, self._fed = self._fed, 0, _NOTHING
        if data.size:
            self._tail_bytes += data.size
            limit = self._max_tail_bytes
            if limit is not None and self._tail_bytes > limit:
                raise TailTooLong(
                    f"the state of the guest's devices has more than {limit} bytes; raise the "
                    "limit, or carry the stream closed"
                )
            self._events.append(PassOn(data.tobytes()))
        return bool(data.size or self._window.size)

    def _flush(self) -> None:
        state = self._outline.state
        if n_pages := int(state[N_PAGES]):
            self._events.append(
                Announced(self._pages[:n_pages].copy(), self._zeros[:n_pages].copy())
            )
        if n_out := int(state[N_OUT]):
            self._events.append(PassOn(self._out[:n_out].tobytes()))
        state[N_PAGES] = state[N_OUT] = 0

    def _name_of(self, block: int) -> str:
        assert self._blocks is not None
        return self._blocks[block].name

    def _explain(self, status: Status, at: int) -> StreamError:
        """What is wrong with the record at byte `at` of the window."""
        head = int.from_bytes(self._window[at : at + 8].tobytes(), "big")
        flags, offset = head & form.PAGE_BYTES - 1, head & ~(form.PAGE_BYTES - 1)
        if status is Status.UNKNOWN_FLAGS:
            known = [text for flag, text in form.OTHER_FLAGS.items() if flags & flag]
            return StreamNotFollowed(
                f"a record has the flags {flags:#x}: {known[0] if known else 'not known'}"
            )
        what = {
            Status.BLOCK_LIST: "is a second list of RAM blocks",
            Status.UNKNOWN_BLOCK: "names a RAM block that is not in the list",
            Status.OUTSIDE_BLOCK: "is behind the end of its RAM block",
            Status.CONTINUES_NOTHING: "names no RAM block, and none is before it",
            Status.NOT_ZERO: "says that it is of zeros, and is not",
        }[status]
        return StreamCorrupt(f"the record of the page at {offset:#x} {what}")
