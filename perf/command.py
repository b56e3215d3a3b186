"""The command line of the harness: `vfio-ferry bench list | run | compare | plot`."""

import argparse
from pathlib import Path

from ferry.config import positive, share
from ferry.errors import Exit
from perf.compare import Criteria, compare, lines
from perf.errors import BenchUsageError
from perf.plot import is_events, read_events, sweep, timeline
from perf.results import read
from perf.runner import listing, run


def main(arguments: list[str]) -> int:
    """Runs a sub-command; returns the exit code. Raises `FerryError` for a user to read."""
    parsed = _parser().parse_args(arguments)
    return int(parsed.do(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vfio-ferry bench", description="Measures vfio-ferry against its peers and limits."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sub = commands.add_parser("list", help="print what can be measured")
    sub.set_defaults(do=_list)

    sub = commands.add_parser("run", help="measure; without a name, all that this machine can run")
    sub.add_argument("name", nargs="*")
    sub.add_argument("--repeat", type=positive, default=5, help="repetitions that count (5)")
    sub.add_argument("--quick", action="store_true", help="a short try-out; figures say little")
    sub.add_argument("--out", type=Path, help="append the samples to this file, as JSON lines")
    sub.add_argument("--json", action="store_true", help="print the samples, not the summary")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the benchmarks; VALUE,VALUE,... runs each",
    )
    sub.add_argument("--trace", metavar="FILE", help="a recorded guest; short for --set trace=FILE")
    sub.set_defaults(do=_run)

    sub = commands.add_parser(
        "compare",
        help="say whether two result files differ",
        epilog=f"Ends with {int(Exit.REGRESSED)} if something got worse.",
    )
    sub.add_argument("a", type=Path, metavar="A.json")
    sub.add_argument("b", type=Path, metavar="B.json")
    default = Criteria()
    sub.add_argument(
        "--alpha", type=share, default=default.alpha, help=f"greatest p value ({default.alpha})"
    )
    sub.add_argument(
        "--relevant",
        type=share,
        default=default.relevant,
        help=f"least change that matters, as a share ({default.relevant})",
    )
    sub.add_argument("--statistic", choices=("mean", "median"), default=default.statistic)
    sub.set_defaults(do=_compare)

    sub = commands.add_parser("plot", help="draw a migration's timeline, or a sweep")
    sub.add_argument("file", type=Path, nargs="+", help="events of `send --json`, or result files")
    sub.add_argument("--out", type=Path, required=True, help="the PNG to write")
    sub.add_argument("--metric", help="of a sweep: what is drawn")
    sub.add_argument("--over", help="of a sweep: the setting or dimension that it is drawn over")
    sub.set_defaults(do=_plot)
    return parser


def _list(_: argparse.Namespace) -> int:
    for line in listing():
        print(line)
    return Exit.OK


def _run(parsed: argparse.Namespace) -> int:
    given = {}
    for item in parsed.set + ([f"trace={parsed.trace}"] if parsed.trace else []):
        name, equals, value = item.partition("=")
        if not equals:
            raise BenchUsageError(f"--set {item!r} has to be NAME=VALUE")
        given[name] = value
    run(
        parsed.name,
        given,
        repeat=parsed.repeat,
        quick=parsed.quick,
        out=parsed.out,
        as_json=parsed.json,
    )
    return Exit.OK


def _compare(parsed: argparse.Namespace) -> int:
    a, b = read(parsed.a), read(parsed.b)
    found = compare(a, b, Criteria(parsed.alpha, parsed.relevant, parsed.statistic))
    for line in lines(a, b, found):
        print(line)
    worse = any(each.verdict == "worse" for each in found)
    return Exit.REGRESSED if worse else Exit.OK


def _plot(parsed: argparse.Namespace) -> int:
    if is_events(parsed.file[0]):
        timeline(read_events(parsed.file[0]), parsed.out)
        return Exit.OK
    if not (parsed.metric and parsed.over):
        raise BenchUsageError("a sweep needs --metric and --over")
    samples = [sample for path in parsed.file for sample in read(path)]
    sweep(samples, parsed.metric, parsed.over, parsed.out)
    return Exit.OK
