"""`bench plot`: a migration's timeline, and sweeps over a setting, as PNG.

A timeline is drawn from the events that `send --json` prints, a sweep from result files.
matplotlib is imported when something is drawn; it comes with the extra `perf`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.errors import BenchUsageError, NeedMissing
from perf.results import Sample, dimensions_text
from perf.statistics import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 1 << 20
PHASE_LABEL_SHARE = 0.04
"""Phases that follow closer than this, of the time that is drawn, have a line and no name."""
MAX_TICKS = 12
"""More values of what is swept over than these are not each named."""
AT_TOP = ("data", "axes fraction")
Event = dict[str, Any]


def read_events(path: Path) -> list[Event]:
    """The sender's events, and the report, in a file that `send` or `demo` wrote with `--json`.

    Raises `BenchUsageError` where it did not.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise BenchUsageError(f"{path} holds no events: {error}") from error
    events: list[Event] = [
        each
        for each in lines
        if isinstance(each, dict) and (each.get("role") == "send" or each.get("event") == "report")
    ]
    if not any(each["event"] == "round" for each in events):
        raise BenchUsageError(f"{path} has no round of a migration; is it of `send --json`?")
    return events


def is_events(path: Path) -> bool:
    """Whether the file begins with an event rather than a result."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline() or "null")
    except (OSError, ValueError) as error:
        raise BenchUsageError(f"{path} holds neither events nor results: {error}") from error
    return isinstance(first, dict) and "event" in first


def timeline(events: Sequence[Event], out: Path) -> None:
    """Rounds and their dirty set, rates, and the downtime by phase. What came before the rounds
    is left out but for its end; seconds count from the first event."""
    begin = min(event["time"] for event in events)
    rounds = [event for event in events if event["event"] == "round"]
    ends = [event["time"] - begin for event in rounds]
    widths = [event["duration_ms"] / 1e3 for event in rounds]
    starts = [end - width for end, width in zip(ends, widths, strict=True)]

    figure, (pages, rates, downtime) = _figure(3, (9, 8.5))
    from matplotlib import colormaps

    bottom = [0.0] * len(rounds)
    for kind in ("zero", "same", "delta", "copy", "lz4", "raw"):
        counts = [float(event.get(kind, 0)) for event in rounds]
        pages.bar(starts, counts, widths, bottom, align="edge", label=kind)
        bottom = [low + count for low, count in zip(bottom, counts, strict=True)]
    _plot_known(pages, ends, rounds, "remaining_pages", 1, "dirty after the round")
    pages.set_ylabel("pages of a round")
    pages.set_yscale("symlog", linthresh=10)
    sent = [event["throughput_bytes_per_s"] / MIB for event in rounds]
    rates.bar(starts, sent, widths, align="edge", color="tab:blue", label="sent")
    _plot_known(rates, ends, rounds, "dirty_pages_per_s", 4096 / MIB, "dirtied")
    rates.set_ylabel("MiB/s")
    rates.set_xlabel("seconds since the start")
    rates.set_yscale("symlog", linthresh=1)
    span = ends[-1] - starts[0]
    rates.sharex(pages)
    pages.set_xlim(starts[0] - span / 10, ends[-1] + span / 10)
    phases = {
        event["time"] - begin: event["phase"] for event in events if event["event"] == "phase"
    }
    _mark_phases(pages, phases)
    for axes in (pages, rates):
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))

    report = next((event for event in events if event["event"] == "report"), {})
    at = 0.0
    for number, (phase, ms) in enumerate(report.get("downtime_ms", {}).items()):
        color = colormaps["tab20"](number % 20)
        downtime.barh([0], [ms], left=at, label=f"{phase} {ms:.1f} ms", color=color)
        at += ms
    downtime.set_yticks([])
    downtime.set_xlabel(f"downtime: {at:.1f} ms" if at else "no downtime: not switched over")
    if at:
        downtime.legend(fontsize="small", ncols=4, loc="upper center")
        downtime.set_ylim(-0.5, 1.5)
    figure.savefig(out, format="png")


def _plot_known(
    axes: "Axes", ends: list[float], rounds: list[Event], key: str, scale: float, label: str
) -> None:
    """Draws a line through what is known of the rounds; what is not known (None) is left out."""
    known = [(end, event[key]) for end, event in zip(ends, rounds, strict=True) if event[key]]
    if known:
        x, y = zip(*known, strict=True)
        axes.plot(x, [value * scale for value in y], "o-k", label=label)


def _mark_phases(axes: "Axes", phases: Mapping[float, str]) -> None:
    left, right = axes.get_xlim()
    last = -math.inf
    for x, phase in phases.items():
        if not left <= x <= right:
            continue
        axes.axvline(x, color="0.6", linewidth=0.8)
        if x - last > (right - left) * PHASE_LABEL_SHARE:
            axes.annotate(phase, (x, 1.02), xycoords=AT_TOP, rotation=60, fontsize=7)
            last = x


def sweep(samples: Sequence[Sample], metric: str, over: str, out: Path) -> None:
    """`metric` over the dimension `over`: median and quartiles, a line for each combination of the
    other dimensions. Raises `BenchUsageError` when no sample has both."""
    wanted = [each for each in samples if each.metric == metric and over in each.dimensions]
    if not wanted:
        metrics = ", ".join(sorted({each.metric for each in samples if over in each.dimensions}))
        raise BenchUsageError(
            f"no sample of {metric!r} has {over!r}; these metrics have it: {metrics or 'none'}"
        )
    varying = {
        name
        for name in wanted[0].dimensions
        if name != over and len({each.dimensions.get(name) for each in wanted}) > 1
    }
    found: dict[str, dict[Any, list[float]]] = {}
    for each in wanted:
        label = dimensions_text({k: v for k, v in each.dimensions.items() if k in varying})
        found.setdefault(label, {}).setdefault(each.dimensions[over], []).append(each.value)
    figure, (axes,) = _figure(1, (7, 4.5))
    for label, points in sorted(found.items()):
        x = sorted(points)
        summaries = [summarize(points[value]) for value in x]
        middle = [s.median for s in summaries]
        spread = [
            [s.median - s.lower for s in summaries],
            [s.upper - s.median for s in summaries],
        ]
        axes.errorbar(x, middle, spread, fmt="o-", capsize=3, label=label or None)
    if len(values := sorted({each.dimensions[over] for each in wanted}, key=str)) <= MAX_TICKS:
        axes.set_xticks(values)
    axes.set_xlabel(over)
    axes.set_ylabel(f"{metric}, {wanted[0].unit}")
    axes.set_title(wanted[0].machine, fontsize="small")
    if varying:
        axes.legend(fontsize="small")
    figure.savefig(out, format="png")


def _figure(rows: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """An empty figure for a file, which needs neither pyplot nor a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NeedMissing("plots need matplotlib: pip install 'vfio-ferry[perf]'") from None
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    return figure, [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
