"""What a page of content costs with each codec of a ladder: seconds to encode, and bytes.

Owns the averages of what a lane's frames have cost, and what follows from them for codecs that were
not used lately. Pure, and for one lane. `choice` decides by it, and `short_rounds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from transport.wire.codec import DELTA, LZ4, NONE, Codec, Method

_TYPICAL: Final = {
    NONE: (1.2, 4104.0),
    DELTA: (1.9, 4104.0),
    LZ4: (8.5, 2350),
    Codec(Method.ZSTD, 1): (11.5, 1730),
    Codec(Method.ZSTD, 2): (13.0, 1690),
    Codec(Method.ZSTD, 3): (15.0, 1650),
    Codec(Method.ZSTD, 4): (17.5, 1610),
    Codec(Method.ZSTD, 5): (37.0, 1570),
    Codec(Method.ZSTD, 7): (62.0, 1540),
    Codec(Method.ZSTD, 9): (78.0, 1530),
}
"""Microseconds and bytes of a page, of files: only their proportions count."""
LADDER: Final = tuple(_TYPICAL)
"""Each takes longer than the one in front of it, as a rule for fewer bytes."""

PRICE: Final = 0.25
"""Of a second of encoding beside sending: others could have used it."""
GAIN: Final = 0.98
"""What is not at least so much cheaper is no reason to change."""
DELTA_COSTS: Final = 1.5
"""Of the codec in use: what deltas may take, if pages turn out to have no bases."""
_WEIGHT: Final = 0.125  # of the newest frame in an average
_STALE_FRAMES: Final = 32
_UNTRIED_FRAMES: Final = 128  # then a single one: where nothing is compressed, it is long


@dataclass(slots=True)
class _Seen:
    """What frames of one codec have cost, a page."""

    seconds: float
    n_bytes: float
    at: int
    """The lane's number of the newest."""


class PageCosts:
    """Of one lane, by the codecs' numbers in a ladder. Not thread-safe."""

    def __init__(self, ladder: Sequence[Codec]) -> None:
        """More than one have to be of `LADDER`."""
        # By number: to look a codec up takes a microsecond, and short rounds wait for the choice.
        self._typical = [_TYPICAL[codec] for codec in ladder] if len(ladder) > 1 else []
        self._seen: dict[int, _Seen] = {}
        self._number = 0

    def count_frame(self) -> None:
        """The lane has made one more, whatever it holds."""
        self._number += 1

    def note(self, rung: int, seconds: float, n_bytes: float) -> None:
        """What the newest frame has cost, a page."""
        seen = self._seen.get(rung)
        if seen is None or not self._is_fresh(seen):
            self.replace(rung, seconds, n_bytes)
            return
        seen.seconds += (seconds - seen.seconds) * _WEIGHT
        seen.n_bytes += (n_bytes - seen.n_bytes) * _WEIGHT
        seen.at = self._number

    def replace(self, rung: int, seconds: float, n_bytes: float) -> None:
        """What is known better than by its frames so far."""
        self._seen[rung] = _Seen(seconds, n_bytes, self._number)

    def forget(self, rung: int) -> None:
        """What its frames have cost says nothing about the next ones."""
        self._seen.pop(rung, None)

    def was_tried(self, rung: int) -> bool:
        """Whether it was used lately, or not so long ago that it has to be tried again."""
        seen = self._seen.get(rung)
        return seen is not None and self._number - seen.at <= _UNTRIED_FRAMES

    def was_used(self, rung: int) -> bool:
        """Whether it was lately, so that `estimate` is of its own frames."""
        seen = self._seen.get(rung)
        return seen is not None and self._is_fresh(seen)

    def estimate(self, rung: int) -> tuple[float, float]:
        """Seconds and bytes of a page: as seen, or in proportion to what was seen nearest to it."""
        return next(self._estimates((rung,)))

    def seconds(self) -> list[float]:
        """The seconds of `estimate` for all codecs, in one pass, since short rounds wait for it."""
        return [seconds for seconds, _ in self._estimates(range(len(self._typical)))]

    def _estimates(self, rungs: Iterable[int]) -> Iterator[tuple[float, float]]:
        fresh = [(rung, seen) for rung, seen in self._seen.items() if self._is_fresh(seen)]
        for rung in rungs:
            seconds, n_bytes = self._typical[rung]
            if not fresh:
                yield seconds / 1e6, n_bytes
                continue
            nearest, there = fresh[0]
            for each, seen in fresh:
                if abs(each - rung) < abs(nearest - rung):
                    nearest, there = each, seen
            seconds_there, bytes_there = self._typical[nearest]
            yield there.seconds * (seconds / seconds_there), there.n_bytes * (n_bytes / bytes_there)

    def typical_bytes(self, rung: int) -> float:
        """Of a page of files: only the proportion to another one's counts."""
        return self._typical[rung][1]

    def _is_fresh(self, seen: _Seen) -> bool:
        return self._number - seen.at <= _STALE_FRAMES
