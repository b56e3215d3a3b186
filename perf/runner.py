"""`bench run`: runs benchmarks, writes their samples, and says what they amount to."""

import importlib
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from perf.benchmark import Benchmark, Context, Measurement, Run, Settings
from perf.child import stolen_seconds
from perf.errors import BenchUsageError, NeedMissing
from perf.needs import missing
from perf.results import Dimension, Sample, dimensions_text, machine, number_text, revision, series
from perf.statistics import summarize
from perf.table import BENCHMARKS, RANGES


def choose(
    names: Iterable[str], given: Mapping[str, str], table: Mapping[str, Benchmark] = BENCHMARKS
) -> dict[str, Benchmark]:
    """The benchmarks of these names; without names, all that can run here as things are given.

    Raises `BenchUsageError` for a name or a setting that there is not, `NeedMissing` for a named
    benchmark that cannot run here.
    """
    chosen = {}
    for name in names:
        if name not in table:
            raise BenchUsageError(f"there is no benchmark {name!r}; there are {', '.join(table)}")
        if reason := obstacle(table[name], given):
            raise NeedMissing(f"{name} cannot run: {reason}")
        chosen[name] = table[name]
    chosen = chosen or {name: each for name, each in table.items() if not obstacle(each, given)}
    known = {name: None for each in chosen.values() for name in each.settings}
    for name in given:
        if name not in known:
            raise BenchUsageError(
                f"none of these benchmarks has a setting {name!r}; they have {', '.join(known)}"
            )
    return chosen


def obstacle(benchmark: Benchmark, given: Mapping[str, str]) -> str | None:
    """Why a benchmark cannot run: the machine lacks something, or a setting without a default is
    not given. None: nothing is in the way."""
    for name, default in benchmark.settings.items():
        if default == "" and name not in given:
            return f"--set {name}=... has to be given"
    return missing(benchmark.needs)


def sweep(benchmark: Benchmark, given: Mapping[str, str], *, quick: bool) -> Iterator[Settings]:
    """The settings of each run: the defaults, `quick`'s over them, the given ones over both.

    A given value may be a list, `1,2,4`: every combination is run. Settings that this benchmark
    does not know are another's. Raises `BenchUsageError` for what is no number, or out of range,
    where one belongs.
    """
    settings = {**benchmark.settings, **(benchmark.quick if quick else {})}
    wanted: dict[str, list[Dimension]] = {name: [value] for name, value in settings.items()}
    for name in given.keys() & settings.keys():
        wanted[name] = [_typed(name, text, settings[name]) for text in given[name].split(",")]
    for values in itertools.product(*wanted.values()):
        yield dict(zip(wanted, values, strict=True))


def _typed(name: str, text: str, like: Dimension) -> Dimension:
    if isinstance(like, str):
        return text
    low, high = RANGES.get(name, (int(isinstance(like, int)), math.inf))
    try:
        value = type(like)(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        kind = "a whole number" if isinstance(like, int) else "a number"
        bounds = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise BenchUsageError(f"{name}={text!r} has to be {kind} {bounds}")
    return value


def samples_of(name: str, benchmark: Benchmark, context: Context) -> Iterator[Sample]:
    """Runs a benchmark; gives its samples as they come."""
    for found in _measurements(benchmark, context):
        yield Sample(
            benchmark=name,
            metric=found.metric,
            value=float(found.value),
            unit=found.unit,
            better=found.better,
            dimensions={**context.settings, **found.dimensions},
            machine=machine(),
            revision=revision(),
        )


def _measurements(benchmark: Benchmark, context: Context) -> Iterator[Measurement]:
    """The benchmark's own measurements, then how much the machine was disturbed meanwhile."""
    run: Run = importlib.import_module(benchmark.module).run
    began, stolen_s = time.monotonic(), stolen_seconds()
    yield from run(context)
    had_s = (time.monotonic() - began) * (os.cpu_count() or 1)
    yield Measurement("stolen", 100 * (stolen_seconds() - stolen_s) / had_s, "%", "neither")


def run(
    names: Iterable[str],
    given: Mapping[str, str],
    *,
    repeat: int,
    quick: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Runs the benchmarks of these names and prints figures and verdicts, or the samples
    themselves; appends the samples to `out`."""
    chosen = choose(names, given)
    if out is not None:
        out.open("a").close()  # what cannot be written is told before hours of measuring
    for name, benchmark in chosen.items():
        for settings in sweep(benchmark, given, quick=quick):
            if not as_json:
                print(f"{name}: {benchmark.what} ({dimensions_text(settings)})")
            samples = []
            for sample in samples_of(name, benchmark, Context(settings, 1 if quick else repeat)):
                samples.append(sample)
                if as_json:
                    print(sample.to_line(), flush=True)
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.writelines(f"{sample.to_line()}\n" for sample in samples)
            if not as_json:
                for line in report(benchmark, samples, settings):
                    print(f"  {line}", flush=True)


def report(benchmark: Benchmark, samples: list[Sample], settings: Settings) -> Iterator[str]:
    """A line for each series: median, quartiles, and the verdict of each bar."""
    for several in series(samples).values():
        first = several[0]
        own = {k: v for k, v in first.dimensions.items() if k not in settings}
        values = [sample.value for sample in several]
        s = summarize(values)
        line = f"{first.metric} {dimensions_text(own)}".strip()
        median, lower, upper = map(number_text, (s.median, s.lower, s.upper))
        yield f"{line:<48} {median:>10} {first.unit:<8} [{lower} .. {upper}] n={s.n}"
        for bar in benchmark.bars:
            if bar.concerns(first.metric, first.dimensions):
                yield f"    {bar.verdict(values)[1]}"


def listing(table: Mapping[str, Benchmark] = BENCHMARKS) -> Iterator[str]:
    """`bench list`: what there is, what can be set, and what is missing here."""
    for name, each in table.items():
        yield f"{name:<12} {each.what}"
        bars = sorted({bar.number for bar in each.bars})
        details = {
            "settings": dimensions_text(each.settings),
            "bars": ", ".join(map(str, bars)),
            "cannot run": obstacle(each, {}),
        }
        for label, detail in details.items():
            if detail:
                yield f"{'':<12} {label}: {detail}"
