"""The example of `transport` used alone, run as its first lines say."""

import os
import subprocess
import sys
from pathlib import Path

HOUSE = Path(__file__).parents[2]


def test_the_example_moves_a_memory_between_two_processes() -> None:
    done = subprocess.run(
        [sys.executable, HOUSE / "examples" / "transport_alone.py"],
        env={**os.environ, "PYTHONPATH": str(HOUSE)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "round 1: 4096 pages" in done.stdout
    assert "0 now" in done.stdout
