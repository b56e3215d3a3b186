"""Children of a benchmark: parties in processes of their own, and what they and we consume."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_LINE_BYTES = 4096
END_S = 10.0


@dataclass(frozen=True)
class Child:
    """A running process; `stdout` gives what it prints."""

    pid: int
    stdout: IO[bytes]

    def line(self) -> str:
        """The next line that it prints: where it listens, or what it found."""
        return self.stdout.readline(MAX_LINE_BYTES).decode().strip()


@contextmanager
def child(module: str, *arguments: str, quiet: bool = False) -> Iterator[Child]:
    """Runs `python -m module arguments`; asks it to end (SIGTERM), then kills it, at the exit.
    `quiet`: what it says on stderr is dropped."""
    command = [sys.executable, "-m", module, *arguments]
    stderr = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        try:
            yield Child(process.pid, process.stdout)
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True)
class Cost:
    """What some work took."""

    wall_s: float
    cpu_s: float
    """Of all processes together."""


class Stopwatch:
    """Measures this process and others from its making on."""

    def __init__(self, *others: int) -> None:
        """`others`: process ids."""
        self._stats = [Path(f"/proc/{other}/stat") for other in others]
        self._wall, self._cpu = time.perf_counter(), self._cpu_s()

    def stop(self) -> Cost:
        return Cost(time.perf_counter() - self._wall, self._cpu_s() - self._cpu)

    def _cpu_s(self) -> float:
        ticks = 0
        for stat in self._stats:
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
