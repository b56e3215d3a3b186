"""A stream with the proof of its mapping: what `send` reads its VMM's migration with."""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from sync.vmm.stream.errors import MappingRefuted
from sync.vmm.stream.mapping import FileRange, MappingProof
from sync.vmm.stream.reader import (
    Announced,
    BlockList,
    DecisionDue,
    PassEnded,
    PassOn,
    Sample,
    StreamReader,
    TailBegan,
)


class OpenedStream:
    """`StreamReader`, with its questions answered by `MappingProof`.

    `feed` and `next_event` are the reader's. `mapped` has the names of the blocks that were taken
    over, `carried` those that had candidates and could not be proven. What devices have written by
    the time the guest was paused has to be told to `proof` before the tail is fed.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        files: Iterable[FileRange],
        *,
        max_held_bytes: int,
        max_tail_bytes: int,
        kernel: Callable[..., int],
    ) -> None:
        """`kernel`: see `StreamReader`."""
        self.reader = StreamReader(
            max_held_bytes=max_held_bytes, max_tail_bytes=max_tail_bytes, kernel=kernel
        )
        self.proof = MappingProof(memory, files)
        self.mapped = set[str]()
        self.carried = set[str]()
        self._refuted: MappingRefuted | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self.reader.feed(data)

    def next_event(self) -> Announced | PassOn | PassEnded | TailBegan | None:
        """The next event, or None if more bytes are needed. Raises `StreamError`."""
        if self._refuted:
            raise self._refuted
        while (event := self.reader.next_event()) is not None:
            match event:
                case BlockList(blocks):
                    for block in blocks:
                        if not self.proof.add(block):
                            self.reader.carry(block.name)
                case Sample(name):
                    if ranges := self.proof.sample(event):
                        self.reader.take(name, ranges)
                        self.mapped.add(name)
                case DecisionDue(name):
                    self.carried.add(name)
                case Announced():
                    self.proof.announced(event)
                    return event
                case TailBegan():
                    try:
                        self.proof.check()
                    except MappingRefuted as error:
                        self._refuted = error
                        raise
                    return event
                case _:
                    return event
        return None
