"""Children of a benchmark: whatever takes part as a process of its own, and what that consumes.

A child ends with the harness, also when that is killed.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.children import start_child
from perf.errors import BenchmarkFailed

MAX_LINE_BYTES = 4096
ANSWER_S = 90.0
"""How long a child may take to print a line: a first start compiles the kernels."""
END_S = 10.0
_PROC_STAT = Path("/proc/stat")
_STEAL = 8  # the field of its first line


class Child:
    """A running process whose standard input and output are ours."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.pid = process.pid
        self._process = process
        self._name = name

    def line(self, deadline_s: float = ANSWER_S) -> str:
        """The next line that it prints: where it listens, or what it found.

        Raises `BenchmarkFailed` if it ends first, or prints nothing in time.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], deadline_s)
        line = self._process.stdout.readline(MAX_LINE_BYTES) if ready else b""
        if not line.endswith(b"\n"):
            why = "ended too early" if ready else f"was silent for {deadline_s:g} s"
            raise BenchmarkFailed(f"{self._name} {why}")
        return line.decode().strip()

    def go(self) -> None:
        """Writes an empty line to it: what it waits for before it goes on."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
        except BrokenPipeError:
            raise BenchmarkFailed(f"{self._name} ended too early") from None


@contextmanager
def child(
    module: str, *arguments: str, quiet: bool = False, prefix: Sequence[str] = ()
) -> Iterator[Child]:
    """Runs `python -m module arguments`, as `process` does."""
    command = [sys.executable, "-m", module, *arguments]
    with process(
        command, name=" ".join([module, *arguments[:1]]), quiet=quiet, prefix=prefix
    ) as it:
        yield it


@contextmanager
def process(
    command: Sequence[str | Path],
    *,
    name: str,
    quiet: bool = False,
    prefix: Sequence[str] = (),
    end: signal.Signals = signal.SIGTERM,
) -> Iterator[Child]:
    """Runs `command` behind `prefix`; asks it to end (signal `end`), then kills it, at the exit.
    `quiet`: what it says on stderr is dropped."""
    with start_child(
        command,
        prefix=prefix,
        # Unbuffered: `select` has to see what `readline` left.
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
    ) as started:
        try:
            yield Child(started, name)
        finally:
            started.send_signal(end)
            try:
                started.wait(END_S)
            except subprocess.TimeoutExpired:
                started.kill()


@dataclass(frozen=True)
class Cost:
    """What some work took."""

    wall_s: float
    cpu_s_of: dict[int, float]
    """Seconds of CPU time, by process id."""

    @property
    def cpu_s(self) -> float:
        """CPU time of all processes together."""
        return sum(self.cpu_s_of.values())


class Stopwatch:
    """Measures time, and the CPU time of some processes, from its making on."""

    def __init__(self, *pids: int) -> None:
        self._cpu = {pid: cpu_seconds_of(pid) for pid in pids}
        self._wall = time.perf_counter()

    def stop(self) -> Cost:
        wall_s = time.perf_counter() - self._wall
        return Cost(wall_s, {pid: cpu_seconds_of(pid) - was for pid, was in self._cpu.items()})


def stolen_seconds() -> float:
    """For how long so far this machine's processors, all together, had work and did not run because
    their host ran something else; 0 where there is no host (proc_stat(5), steal)."""
    fields = _PROC_STAT.read_text().splitlines()[0].split()
    return int(fields[_STEAL]) / os.sysconf("SC_CLK_TCK")


def cpu_seconds_of(pid: int) -> float:
    """User and system time of all threads of a process so far, those that have ended included.

    /proc/PID/stat has ticks; the CPU-time clock of the process has nanoseconds. Python does not
    offer clock_getcpuclockid(3), which computes the clock's number: the complement of the process
    id, shifted by three bits, and 2 for the scheduler's figures.
    """
    return time.clock_gettime((~pid << 3) | 2)
