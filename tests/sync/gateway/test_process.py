"""The gateway as a process of its own: what it loads, what it prints, how it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.children import start_child
from sync.gateway.log import Log

START = """
import sys
from pathlib import Path
from sync.gateway.main import GatewayOptions, run
folder = Path(sys.argv[1])
run(GatewayOptions(folder / "vmm", folder / "device", folder / "control", json=sys.argv[2] == "j"))
heavy = {"numpy", "numba", "trio", "zmq"} & set(sys.modules)
sys.exit(f"loaded: {heavy}" if heavy else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing_but_its_records_behind(
    tmp_path: Path, number: int
) -> None:
    process = start_child(
        [sys.executable, "-c", START, str(tmp_path), "j"], stdout=subprocess.PIPE, text=True
    )
    first = json.loads(process.stdout.readline())
    assert first["event"] == "listening"
    assert first["control"] == str(tmp_path / "control")
    process.send_signal(number)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert json.loads(rest.splitlines()[-1])["event"] == "ended"
    assert [*tmp_path.iterdir()] == [tmp_path / "control.records"]


def test_sockets_of_a_killed_gateway_are_replaced(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, str(tmp_path), "t"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start_child(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr.readline().startswith("gateway: listening")
        process.send_signal(number)
        process.communicate(timeout=20)
    assert [*tmp_path.iterdir()] == [tmp_path / "control.records"]


def test_i10_a_log_that_nobody_reads_is_dropped() -> None:
    reading, writing = os.pipe()
    log = Log(writing, as_json=True)
    for _ in range(10000):
        log("event", text="x" * 100)
        if log.dropped:
            break
    assert log.dropped
    assert json.loads(os.read(reading, 1 << 20).splitlines()[0])["text"] == "x" * 100
    os.close(reading)
    dropped = log.dropped
    log("event")
    assert log.dropped == dropped + 1
    os.close(writing)
