"""`list` and `run`: settings, sweeps, needs, verdicts, and benchmarks that are run once."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ferry.cli import main
from ferry.errors import Exit
from perf import runner
from perf.benchmark import Bar, Benchmark, Context, Measurement
from perf.errors import BenchUsageError, NeedMissing
from perf.needs import NEEDS
from perf.results import read
from perf.table import BENCHMARKS

MODULE = "tests_perf_benchmark"
BY_DEFAULT = {"gateway", "last-round", "precopy"}
"""Of those that measure; `make test-full` runs all."""
FAKE = Benchmark(
    MODULE,
    "nothing of interest",
    settings={"lanes": 2, "share": 0.5, "url": "ipc"},
    quick={"lanes": 1},
    bars=(
        Bar(5, "rate", 2, "higher"),
        Bar(7, "delay", 3, "lower", {"case": "zero"}, at=0.99),
    ),
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """A benchmark named fake, alone in the table; gives what it was run with."""
    contexts: list[Context] = []

    def run(context: Context) -> Iterator[Measurement]:
        contexts.append(context)
        for seconds in context.alternate(ours=lambda: 1.0, peer=lambda: 4.0):
            yield Measurement("rate", seconds["peer"] / seconds["ours"], "x", "higher")
            yield Measurement("delay", 4, "ms", "lower", {"case": "zero"})
            yield Measurement("delay", 4, "ms", "lower", {"case": "text"})

    module = ModuleType(MODULE)
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(runner, "BENCHMARKS", {"fake": FAKE})
    monkeypatch.setattr(runner.choose, "__defaults__", ({"fake": FAKE},))
    return contexts


def test_every_entry_of_the_table_is_complete() -> None:
    assert BENCHMARKS.keys() >= BY_DEFAULT
    for name, entry in BENCHMARKS.items():
        assert entry.quick.keys() <= entry.settings.keys(), name
        assert set(entry.needs) <= set(NEEDS), name
        assert all(1 <= bar.number <= 17 for bar in entry.bars), name


def test_list_names_every_benchmark_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "list"]) == Exit.OK
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in BENCHMARKS)
    assert "cannot run: --set trace=... has to be given" in printed


def test_run_prints_medians_and_verdicts_and_writes_samples(
    fake: list[Context], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "run", "fake", "--repeat", "3", "--out", str(out)]) == Exit.OK
    printed = capsys.readouterr().out
    assert "fake: nothing of interest (lanes=2 share=0.5 url=ipc)" in printed
    assert "bar 5: 4 >= 2 met" in printed
    assert printed.count("bar 7: p99 4 > 3 missed") == 1
    samples = read(out)
    assert len(samples) == 10
    assert samples[0].dimensions == {"lanes": 2, "share": 0.5, "url": "ipc"}
    assert samples[1].dimensions == {"lanes": 2, "share": 0.5, "url": "ipc", "case": "zero"}
    assert main(["bench", "run", "fake", "--repeat", "3", "--out", str(out)]) == Exit.OK
    assert len(read(out)) == 20


def test_json_prints_the_samples_alone(
    fake: list[Context], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "run", "--json", "--quick"]) == Exit.OK
    (tmp_path / "printed").write_text(capsys.readouterr().out)
    metrics = [each.metric for each in read(tmp_path / "printed")]
    assert metrics == ["rate", "delay", "delay", "stolen"]
    assert fake[0].settings["lanes"] == 1


def test_a_run_says_how_much_of_the_processors_its_host_took(
    fake: list[Context], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, stolen = iter([10.0, 14.0]), iter([7.0, 7.5])
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(runner, "stolen_seconds", lambda: next(stolen))
    monkeypatch.setattr(runner, "os", SimpleNamespace(cpu_count=lambda: 2))
    assert main(["bench", "run", "fake", "--quick"]) == Exit.OK
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["stolen", "6.25", "%"]


def test_a_list_of_values_is_a_sweep(fake: list[Context]) -> None:
    given = ["--set", "lanes=1,4", "--set", "share=0.25", "--set", "url=a,b"]
    assert main(["bench", "run", "fake", "--repeat", "1", *given]) == Exit.OK
    found = [tuple(context.settings.values()) for context in fake]
    assert found == [(1, 0.25, "a"), (1, 0.25, "b"), (4, 0.25, "a"), (4, 0.25, "b")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none"], "no benchmark 'none'; there are fake"),
        (["fake", "--set", "speed=1"], "has a setting 'speed'; they have lanes, share, url"),
        (["fake", "--set", "lanes=many"], "lanes='many' has to be a whole number from 1 to 16"),
        (["fake", "--set", "lanes=17"], "lanes='17' has to be a whole number from 1 to 16"),
        (["fake", "--set", "share=-1"], "share='-1' has to be a number of 0 or more"),
        (["fake", "--set", "share=nan"], "share='nan' has to be a number of 0 or more"),
        (["fake", "--set", "lanes"], "NAME=VALUE"),
    ],
)
def test_what_there_is_not(
    fake: list[Context], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["bench", "run", *arguments]) == Exit.USAGE
    assert says in capsys.readouterr().err


def test_a_benchmark_that_cannot_run_is_left_out_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(NEEDS, "root", lambda: "root is needed")
    table = {"plain": Benchmark("m", "w"), "needy": Benchmark("m", "w", needs=("root",))}
    assert [*runner.choose([], {}, table)] == ["plain"]
    with pytest.raises(NeedMissing, match="needy cannot run: root is needed"):
        runner.choose(["needy"], {}, table)
    wants = {"wants": Benchmark("m", "w", settings={"file": ""})}
    assert [*runner.choose(["wants"], {"file": "x"}, wants)] == ["wants"]
    with pytest.raises(NeedMissing, match="--set file="):
        runner.choose(["wants"], {}, wants)
    with pytest.raises(BenchUsageError):
        runner.choose(["plain"], {"file": "x"}, table)


def test_alternation_reverses_each_time_and_drops_the_first() -> None:
    order: list[str] = []

    def work(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = list(Context({}, 2).alternate(a=lambda: work("a"), b=lambda: work("b")))
    assert order in (["a", "b", "b", "a", "a", "b"], ["b", "a", "a", "b", "b", "a"])
    assert len(found) == 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.full)
        for name, entry in BENCHMARKS.items()
        if not runner.obstacle(entry, {})
    ],
)
def test_it_runs(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "run", name, "--quick", "--out", str(out), "--debug"]) == Exit.OK
    samples = read(out)
    measured = {sample.metric for sample in samples}
    assert {bar.metric for bar in BENCHMARKS[name].bars} <= measured
    assert f"{name}: " in capfd.readouterr().out
