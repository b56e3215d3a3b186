"""`vfio-ferry demo-qemu`: the demonstration as a user runs it, and its verdict."""

import io
import json
import subprocess
import sys

import pytest

from ferry.errors import Exit
from ferry.migration.report import Report
from ferry.progress import Reporter
from lab.qemu.demo import conclude
from lab.qemu.environment import Environment
from lab.qemu.machine import Guest
from lab.qemu.report import parse_line
from lab.qemu.two_hosts import Case

CASE = Case("replay", "logging")
MIGRATED = Report(
    session="5" * 32,
    verification={"checked_pages": 1, "scope": "all that was touched", "repaired_pages": 0},
)
UNNOTICED = (
    b"FERRY job what=direct disk=vda passes=3",
    b"FERRY disk longest_io_us=1500 depth=4 interrupts=msix",
    b"FERRY dmesg io_error=0 reset=0 hung=0 warning=0 interrupt=0 network=0 lines=2",
    b"FERRY end errors=0",
)


def verdict(*lines: bytes) -> tuple[Exit, str]:
    """The exit code and the report for a guest that wrote these lines after `UNNOTICED`."""
    guest, said = Guest(), io.StringIO()
    for line in (*UNNOTICED, *lines):
        event = parse_line(line)
        assert event is not None
        guest.report.add(event)
    code = conclude(MIGRATED, guest, CASE, Reporter("demo-qemu", as_json=False, stream=said))
    return code, said.getvalue()


def test_a_guest_that_noticed_nothing_is_a_success() -> None:
    code, said = verdict()
    assert code == Exit.OK
    assert "nothing was lost" in said
    assert "longest I/O 2 ms" in said


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"FERRY error what=direct-checksum detail=vda-job-1", "direct-checksum vda-job-1"),
        (
            b"FERRY dmesg io_error=0 reset=1 hung=0 warning=0 interrupt=0 network=0 lines=3",
            "dmesg: reset",
        ),
        (b"FERRY disk longest_io_us=1500 depth=4 interrupts=intx", "intx"),
    ],
)
def test_whatever_the_guest_noticed_is_a_failure(line: bytes, told: str) -> None:
    code, said = verdict(line)
    assert code == Exit.VERIFICATION
    assert told in said.splitlines()[-1]


@pytest.mark.qemu
@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("device", "methods"),
    [
        ("virtio", {"registers": "replay", "dirty": "logging"}),
        ("nvme", {"registers": "v2", "dirty": "queues"}),
    ],
)
def test_the_demonstration(environment: Environment, device: str, methods: dict[str, str]) -> None:
    words = ("demo-qemu", "--json", "--writes", "50", "--device", device)
    done = subprocess.run(
        [sys.executable, "-m", "ferry.cli", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == Exit.OK, f"{events[-3:]} {done.stderr}"
    report = events[-1]
    assert report["event"] == "report"
    assert report["sound"]
    assert report["guest"]["writes"] > 100
    assert not report["guest"]["errors"]
    assert report["methods"] == [methods]
