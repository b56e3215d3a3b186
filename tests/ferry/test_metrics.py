"""Metrics: named as Prometheus has it, written in one piece, and telling what events told."""

import os
import socket
import threading
import time
import urllib.request
from io import StringIO
from pathlib import Path

import pytest

from ferry.errors import LocalError
from ferry.metrics import GatewayMetrics, MigrationMetrics
from ferry.progress import Reporter
from sync.gateway.control.info import GatewayInfo
from sync.gateway.engine.core import Core, Limits
from tests.ferry.test_html_report import EVENTS
from tests.ferry.test_progress import VALUES

parser = pytest.importorskip("prometheus_client.parser")


def test_a_migration_as_a_textfile(tmp_path: Path) -> None:
    path = tmp_path / "ferry.prom"
    reporter = Reporter("send", as_json=True, stream=StringIO())
    reporter.observe(MigrationMetrics("send", str(path)).take)
    assert "vfio_ferry_send_rounds_total 0.0" in path.read_text()
    for event in EVENTS:
        values = {key: value for key, value in event.items() if key != "event"}
        if event["event"] == "success":
            values |= {"exit_code": 16, "duration_s": 3.5}
            reporter.event("progress", **VALUES)
        reporter.event(event["event"], **values)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    assert found["vfio_ferry_send_rounds_total",] == 2
    assert found["vfio_ferry_send_pages_total", "zero"] == 6
    assert found["vfio_ferry_send_round_bytes_total",] == 8192
    assert found["vfio_ferry_send_downtime_seconds",] == pytest.approx(0.031)
    assert found["vfio_ferry_send_downtime_phase_seconds", "verify"] == pytest.approx(0.03)
    assert found["vfio_ferry_send_wire_bytes", "pages"] == 9000
    assert found["vfio_ferry_send_exit_code",] == 16
    assert found["vfio_ferry_send_remaining_bytes",] == VALUES["remaining_bytes"]
    assert [key for key in found if key[0].endswith("_phase")] == [
        ("vfio_ferry_send_phase", "pausing")
    ]
    assert not [each for each in tmp_path.iterdir() if each != path]


def test_a_file_that_cannot_be_written_any_more_ends_no_migration(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    output = StringIO()
    reporter = Reporter("send", as_json=True, stream=output)
    reporter.observe(MigrationMetrics("send", f"{folder}/ferry.prom").take)
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()
    reporter.event("phase", phase="committing")
    assert "committing" in output.getvalue()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_migration_at_a_port_of_this_host(tmp_path: Path) -> None:
    port = free_port()
    reporter = Reporter("receive", as_json=True, stream=StringIO())
    reporter.observe(MigrationMetrics("receive", None, port).take)
    reporter.event("phase", phase="listening")
    assert 'vfio_ferry_receive_phase{phase="listening"} 1.0' in scrape(port)
    reporter.event("phase", phase="receiving")
    found = scrape(port)
    assert 'phase="receiving"' in found and "listening" not in found
    with pytest.raises(OSError, match="in use"):
        MigrationMetrics("receive", None, port)
    listening = Path("/proc/net/tcp").read_text()
    assert f" 0100007F:{port:04X} " in listening and f" 00000000:{port:04X} " not in listening


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="none/f: No such file"):
        MigrationMetrics("send", str(tmp_path / "none" / "f"))


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LocalError, match="pipe: there is something else"):
        MigrationMetrics("send", str(tmp_path / "pipe"))
    assert (tmp_path / "pipe").is_fifo()


def test_a_gateway_is_asked_now_and_then_and_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)  # this test writes by itself
    path = tmp_path / "gateway.prom"
    metrics = GatewayMetrics(str(path))
    core = Core(Limits(), time.monotonic, lambda *_, **__: None, lambda *_: None)
    asked: list[GatewayInfo] = []

    def status() -> GatewayInfo:
        asked.append(core.info())
        return asked[-1]

    for now in (100.0, 105.0, 109.9, 110.0):
        metrics.take(now, status)
    assert len(asked) == 2
    metrics.write(asked[0])
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    assert (
        found["vfio_ferry_gateway_state", core.custody.owner.value, core.custody.state.value] == 1
    )
    assert found["vfio_ferry_gateway_vmm_connected",] == 0
    path.unlink()
    path.mkdir()
    metrics.write(asked[0])  # no reason to end
