"""Children of a benchmark: what they say and cost, and that they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf import child
from perf.child import Stopwatch, cpu_seconds_of, process, stolen_seconds
from perf.errors import BenchmarkFailed

HARNESS = """
import sys, time
from perf.child import process
with process(["sh", "-c", "echo; exec sleep 60"], name="sleep") as child:
    child.line()
    print(child.pid, flush=True)
    time.sleep(60)
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_it_goes_on_when_told_and_answers() -> None:
    echo = "import sys; print('here', flush=True); sys.stdin.readline(); print('there')"
    with process(python(echo), name="echo") as child:
        assert child.line() == "here"
        child.go()
        assert child.line() == "there"
        with pytest.raises(BenchmarkFailed, match="echo ended too early"):
            child.line()


def test_time_that_the_host_took_is_that_of_all_processors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 2 3 4 5 6 7 800 9 10\ncpu0 1 2 3 4 5 6 7 300 9 10\nintr 4\n")
    monkeypatch.setattr(child, "_PROC_STAT", stat)
    assert stolen_seconds() == 800 / os.sysconf("SC_CLK_TCK")


def test_silence_is_an_error() -> None:
    with (
        process(["sleep", "60"], name="sleeper") as child,
        pytest.raises(BenchmarkFailed, match="sleeper was silent"),
    ):
        child.line(deadline_s=0.01)


def test_the_stopwatch_sees_the_cpu_time_of_another_process() -> None:
    burn = "import time\nprint(flush=True)\nwhile time.process_time() < 0.2: pass\nprint()\ninput()"
    with process(python(burn), name="burner") as child:
        child.line()
        watch = Stopwatch(child.pid, os.getpid())
        child.line()
        cost = watch.stop()
        # What it had used before the first line does not count.
        assert 0 < cost.cpu_s_of[child.pid] <= cpu_seconds_of(child.pid)
        assert cost.cpu_s == sum(cost.cpu_s_of.values())


def test_a_child_dies_with_a_harness_that_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(python(HARNESS), stdout=subprocess.PIPE, env=environment) as harness:
        assert harness.stdout is not None
        child = int(harness.stdout.readline())
        harness.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
