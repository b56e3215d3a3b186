"""What a benchmark is: a function that yields measurements, its settings, needs and bars.

`perf.table` lists them; a benchmark's module has a function `run(context)`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from perf.errors import BenchUsageError
from perf.results import Better, Dimension, number_text
from perf.statistics import quantile
from transport.wire.codec import Codec

Settings = Mapping[str, Dimension]
T = TypeVar("T")


class Measurement(NamedTuple):
    """One value of one repetition. `better` is "neither" for a peer and for a limit."""

    metric: str
    value: float
    unit: str
    better: Better
    dimensions: Mapping[str, Dimension] = {}


@dataclass(frozen=True)
class Context:
    """What a benchmark is run with."""

    settings: Settings
    """Values of every setting that the benchmark's entry in the table has, by name."""
    repeat: int
    """Repetitions that count: each gives one measurement of every metric."""

    def number(self, name: str) -> int:
        return int(self.settings[name])

    def text(self, name: str) -> str:
        return str(self.settings[name])

    def codecs(self, name: str) -> list[str]:
        """The names that a setting holds, `lz4+zstd:3`. Raises `BenchUsageError`."""
        names = self.text(name).split("+")
        for codec in names:
            try:
                Codec.parse(codec)
            except ValueError as error:
                raise BenchUsageError(f"{name}: {codec!r} is no codec: {error}") from None
        return names

    def alternate(self, **works: Callable[[], T]) -> Iterator[dict[str, T]]:
        """Runs ours and its peers in turn, so that what disturbs one disturbs the other; yields
        what each returned, once for each repetition. A first one, which warms up, does not count;
        every other one runs backwards, because whoever comes second finds warm caches."""
        names = [*works]
        for number in range(self.repeat + 1):
            names.reverse()
            values = {name: works[name]() for name in names}
            if number:
                yield values


@dataclass(frozen=True)
class Bar:
    """A threshold of the project's, on a quantile of one metric's samples."""

    number: int
    metric: str
    limit: float
    wants: Better
    """Whether the quantile has to be at least `limit` (`higher`) or at most (`lower`)."""
    where: Settings = field(default_factory=dict)
    """The bar holds for the series that have these dimensions, each of them."""
    at: float = 0.5
    """The quantile of the samples."""

    def concerns(self, metric: str, dimensions: Mapping[str, Dimension]) -> bool:
        return metric == self.metric and self.where.items() <= dimensions.items()

    def verdict(self, values: list[float]) -> tuple[bool, str]:
        """Whether the bar is met by these values, and a line that says so."""
        value = quantile(values, self.at)
        if self.wants == "higher":
            met = value >= self.limit
            sign = ">=" if met else "<"
        else:
            met = value <= self.limit
            sign = "<=" if met else ">"
        of = "" if self.at == 0.5 else f" p{self.at * 100:g}"
        figures = f"{number_text(value)} {sign} {number_text(self.limit)}"
        return met, f"bar {self.number}:{of} {figures} {'met' if met else 'missed'}"


@dataclass(frozen=True)
class Benchmark:
    """An entry of the table."""

    module: str
    """The module that has a function `run(context: Context) -> Iterable[Measurement]`; it is
    imported when the benchmark is run."""
    what: str
    """What it measures, in one line."""
    settings: Settings = field(default_factory=dict)
    """What can be set, with the defaults; each becomes a dimension of every sample."""
    quick: Settings = field(default_factory=dict)
    """Smaller settings: a try-out of a second or two, whose figures say little."""
    needs: tuple[str, ...] = ()
    """What the machine has to have: names of `perf.needs`."""
    bars: tuple[Bar, ...] = ()


Run = Callable[[Context], Iterable[Measurement]]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of `work` in this thread: disturbed less by a busy machine than the clock."""
    began = time.thread_time()
    work()
    return time.thread_time() - began
