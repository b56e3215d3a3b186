"""Whole migrations with real processes: everything arrives, by every method, and back again."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ferry.cli import main
from ferry.errors import Exit
from ferry.migration.verification import ProofTime
from tests.e2e.two_hosts import (
    METHODS,
    MIGRATION_S,
    Method,
    assert_sound,
    migrate,
    new_bed,
    run_resolve,
    small_setup,
    start_both,
    start_migration,
)


@pytest.mark.parametrize(
    "method",
    [
        METHODS[0],
        *(pytest.param(method, marks=pytest.mark.full) for method in METHODS[1:-1]),
        METHODS[-1],
    ],
    ids=str,
)
def test_a_device_moves_with_its_running_guest(tmp_path: Path, method: Method) -> None:
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        report = migrate(bed, a, b, method, "--verify", "all")
        assert report["methods"] == [{"registers": method.registers, "dirty": method.dirty}]
        assert report["rounds"]
        assert report["verification"]["scope"].startswith("all")
        assert sum(region["length"] for region in report["verification"]["regions"]) > 40 << 20
        assert set(report["downtime_ms"]) == {
            *("vmm_stop", "pause", "device_stop", "vmm_transfer", "final_state", "verify"),
            *("pci_restore", "ready", "release", "own", "device_start", "vmm_resume", "commit"),
        }
        parts = report["downtime_own_ms"] + report["downtime_vmm_ms"]
        assert parts == pytest.approx(sum(report["downtime_ms"].values()))
        assert parts == pytest.approx(report["downtime_total_ms"])
        guest = assert_sound(bed, b)
        assert guest["device_resets"] == 0
        assert guest["device_reconnects"] == 0
        assert bed.status(a) != "running"


@pytest.mark.parametrize("verify", [pytest.param("touched", marks=pytest.mark.full), "all"])
def test_each_round_predicts_the_proof_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verify: str,
) -> None:
    asked: list[bool] = []

    async def predict(_self: ProofTime, _touched: Any, *, everything: bool) -> int:
        asked.append(everything)
        return 10**12

    monkeypatch.setattr(ProofTime, "predict_ns", predict)
    method = Method("replay", "logging")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b)
        to = ("--to", f"ipc://{b.folder}/link.sock", "--qmp", str(a.qmp_socket))
        flags = (*map(str, a.control_flags), *method.flags, "--verify", verify, "--json")
        assert main(["send", *to, *flags]) == Exit.OK
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [e["predicted_downtime_ms"] for e in events if e["event"] == "round"]
    judged = [ms for ms in told if ms is not None]
    assert judged and all(ms > 10**6 for ms in judged)
    assert asked == [verify == "all"] * len(judged)


@pytest.mark.parametrize("registers", [pytest.param("v2", marks=pytest.mark.full), "replay"])
def test_intx(tmp_path: Path, registers: str) -> None:
    method = Method(registers, "logging")
    with new_bed(tmp_path, small_setup(method, "--irq", "intx")) as bed:
        a, b = start_both(bed)
        migrate(bed, a, b, method)
        assert_sound(bed, b)


@pytest.mark.full
def test_a_device_that_logs_coarse_pages(tmp_path: Path) -> None:
    method = Method("replay", "logging")
    with new_bed(tmp_path, small_setup(method, device=("--logging", "64K"))) as bed:
        a, b = start_both(bed)
        migrate(bed, a, b, method, "--verify", "all")
        assert_sound(bed, b)


def test_there_and_back_again(tmp_path: Path) -> None:
    method = Method("replay", "message")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        migrate(bed, a, b, method)
        bed.wait_operations(b, 100)
        assert a.guest is not None
        a.guest.kill()
        bed.start_guest(a, incoming=True)
        migrate(bed, b, a, method)
        assert_sound(bed, a)


@pytest.mark.full
def test_a_sender_whose_output_nobody_takes(tmp_path: Path) -> None:
    method = Method("replay", "logging")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b)
        words = ("send", "--to", f"ipc://{b.folder}/link.sock", *map(str, a.control_flags))
        with Path("/dev/full").open("w") as full:
            sender = subprocess.run(
                [sys.executable, "-m", "ferry.cli", *words, "--qmp", a.qmp_socket],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=MIGRATION_S,
                check=False,
            )
        assert sender.returncode == Exit.OK, sender.stderr
        assert sender.stderr == (
            "vfio-ferry send: goes on without output: No space left on device\n"
        )
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)


@pytest.mark.full
def test_a_link_with_a_bandwidth_limit(tmp_path: Path) -> None:
    method = Method("replay", "logging")
    with new_bed(tmp_path, small_setup(method, "--iops", "300")) as bed:
        a, b = start_both(bed)
        migrate(bed, a, b, method, "--bandwidth", "40M")
        assert_sound(bed, b)


def test_several_lanes_over_tcp(tmp_path: Path) -> None:
    method = Method("replay", "scan")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        receiver = bed.start(
            "receive b",
            *("receive", "--listen", "tcp://127.0.0.1:0", "--json"),
            *("--gateway", b.control_socket, "--qmp", b.qmp_socket),
        )
        url = receiver.wait_event("listening")["url"]
        sender = bed.start(
            "send a",
            *("send", "--to", url, "--json", "--lanes", "4", *method.flags),
            *("--gateway", a.control_socket, "--qmp", a.qmp_socket),
        )
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)


def test_a_migration_is_asked_slowed_down_and_cancelled_while_it_runs(tmp_path: Path) -> None:
    method = Method("replay", "logging")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        control = tmp_path / "control.sock"
        at = ("--control-socket", str(control), "--json")
        sender, receiver = start_migration(
            *(bed, a, b, method, "--control-socket", str(control), "--bandwidth", "1M")
        )
        sender.wait_event("progress")
        for words in (("status",), ("set", "--bandwidth", "2M"), ("cancel",)):
            process = bed.start(words[0], *words, *at)
            assert process.wait(MIGRATION_S) == Exit.OK, process.tail()
            if words[0] == "status":
                found = process.wait_event("status")
                assert found["phase"] == "precopy"
                assert found["settings"]["bandwidth"] == 1 << 20
        assert sender.wait(MIGRATION_S) == Exit.INTERRUPTED, sender.tail()
        assert "vfio-ferry cancel" in sender.wait_event("error")["message"]
        assert receiver.wait(MIGRATION_S) == Exit.PEER_ABORTED, receiver.tail()
        assert not control.exists()
        assert_sound(bed, a)


@pytest.mark.full
def test_a_receiver_that_keeps_on_takes_the_next_guest_too(tmp_path: Path) -> None:
    method = Method("replay", "logging")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b, "--keep")
        sender = bed.send(a, b, *method.flags)
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        receiver.wait_event("message", where=lambda event: "next VMM" in event["text"])
        assert_sound(bed, b)
        for host in (b, a):
            if host is a:
                # Its gateway stays shut as long as the guest that left may run elsewhere.
                taken = run_resolve(bed, a, "--vouch-the-other-host-is-gone")
                assert taken["outcome"] == "owned"
            for process in (host.guest, host.units[0].gateway, host.units[0].device):
                assert process is not None
                process.kill()
            bed.start_host(host, incoming=host is b)
        bed.wait_operations(a, 200)
        first = receiver.wait_event("listening")
        receiver.wait_event("listening", where=lambda event: event is not first)
        sender = bed.send(a, b, *method.flags)
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert_sound(bed, b)
        receiver.signal(signal.SIGTERM)
        assert receiver.wait(MIGRATION_S) == Exit.INTERRUPTED, receiver.tail()
