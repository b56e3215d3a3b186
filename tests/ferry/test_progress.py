"""What a person reads while a migration runs: a line that fits the terminal, or one with a time."""

import fcntl
import os
import pty
import re
import struct
import termios
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.progress import Reporter, parts_of, time_to_go_s, to_go_text
from ferry.progress_line import fitted

MIB = 1 << 20
VALUES: dict[str, Any] = {
    "round": 3,
    "vmm_round": 2,
    "total_bytes": 1024 * MIB,
    "downtime_limit_ms": 300,
    "remaining_bytes": 400 * MIB,
    "own_remaining_bytes": 100 * MIB,
    "vmm_remaining_bytes": 300 * MIB,
    "dirty_bytes_per_s": 20 * MIB,
    "own_dirty_bytes_per_s": 5 * MIB,
    "vmm_dirty_bytes_per_s": 15 * MIB,
    "throughput_bytes_per_s": 40 * MIB,
    "predicted_downtime_ms": 89.4,
}


def test_the_line_says_all_that_there_is_to_know() -> None:
    line = fitted(parts_of("precopy", VALUES), 300)
    assert line == (
        "precopy  400.0 MiB left of 1.0 GiB  40.0 MiB/s  10 s to 20 s to go  downtime 89 of 300 ms"
        "  dirtying 20.0 MiB/s (devices 5.0 MiB/s, VMM 15.0 MiB/s)"
        "  left of devices 100.0 MiB, of the VMM 300.0 MiB  round 3 (VMM 2)"
    )


@given(st.integers(1, 300))
def test_a_line_is_never_wider_than_the_terminal(columns: int) -> None:
    line = fitted(parts_of("precopy", VALUES), columns)
    assert 0 < len(line) <= columns
    assert fitted(parts_of("precopy", VALUES), 300).startswith(line)


@pytest.mark.parametrize(
    ("rate", "dirty", "says"),
    [
        (100.0, 0.0, "10 s to go"),
        (100.0, 50.0, "10 s to 20 s to go"),
        (100.0, 100.0, "10 s or more to go"),
        (0.0, 0.0, "no end in sight"),
        (1.0, 0.9, "17 min to 2 h 47 min to go"),
    ],
)
def test_the_time_to_go_is_a_range(rate: float, dirty: float, says: str) -> None:
    assert to_go_text(*time_to_go_s(1000.0, rate, dirty)) == says


def test_without_a_terminal_each_line_has_its_time() -> None:
    stream = StringIO()
    reporter = Reporter("send", as_json=False, stream=stream)
    reporter.event("phase", phase="precopy")
    reporter.event("progress", **VALUES)
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d send: precopy", first)
    assert re.match(r"\d\d:\d\d:\d\d progress:  400.0 MiB left of 1.0 GiB  ", second)


def test_on_a_terminal_one_line_is_redrawn_and_the_rest_is_above_it() -> None:
    pytest.importorskip("tqdm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        reporter = Reporter("send", as_json=False, stream=terminal)
        reporter.event("phase", phase="precopy")
        reporter.event("progress", **VALUES)
        reporter.event("message", text="something is told")
        reporter.event("progress", **VALUES | {"remaining_bytes": MIB})
        reporter.event("phase", phase="pausing")
        terminal.flush()
        shown = ""
        while "send: pausing\r\n" not in shown:
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    lines = [line.split("\r")[-1].strip() for line in shown.split("\r\n")]
    assert lines == ["send: precopy", "something is told", "send: pausing", ""]
    drawn = [text.strip() for text in re.split(r"[\r\n]", shown) if " left of " in text]
    assert drawn[0].startswith("precopy  400.0 MiB left of 1.0 GiB")
    assert drawn[-1].startswith("precopy  1.0 MiB left of 1.0 GiB")
    assert all(len(text) < 60 for text in re.split(r"[\r\n]", shown))
