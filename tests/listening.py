"""When a process that a test has started takes connections."""

import subprocess
import time
from pathlib import Path
from typing import Any

ACCEPTS = 1 << 16
"""The kernel's __SO_ACCEPTCON: listen() was called."""
POLL_S = 0.005
DEADLINE_S = 60.0


def wait_until_listening(path: Path, process: "subprocess.Popen[Any]") -> None:
    """Until connecting to `path` works: its file appears a moment before that, and a connection
    made to find out would be one that the process has to serve.

    Raises AssertionError when the process ends first, or does not listen in time.
    """
    deadline = time.monotonic() + DEADLINE_S
    while not _is_listening(path):
        assert time.monotonic() < deadline, f"does not listen at {path}"
        assert process.poll() is None, f"ended before it listened at {path}: {process.returncode}"
        time.sleep(POLL_S)


def _is_listening(path: Path) -> bool:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
        if name == [str(path)] and int(flags, 16) & ACCEPTS:
            return True
    return False
