"""`vfio-ferry doctor` with real processes: what it finds, and that nothing notices it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.errors import Exit
from lab.testbed import Host, Testbed
from sync.vmm.driver import Vmm
from tests.e2e.two_hosts import (
    MIGRATION_S,
    Method,
    assert_sound,
    new_bed,
    small_setup,
    start_both,
    start_migration,
)

METHOD = Method("replay", "logging")


def doctor(bed: Testbed, host: Host, *flags: object) -> tuple[int, list[dict[str, Any]]]:
    """Its exit code and findings for `host`."""
    process = bed.start(
        f"doctor {host.name}",
        *("doctor", "--json", "--qmp", host.qmp_socket, "--gateway", host.control_socket, *flags),
    )
    code = process.wait(MIGRATION_S)
    count = process.wait_event("diagnosis")["problems"]
    assert code == (Exit.NOT_READY if count else Exit.OK), process.tail()
    return code, [event for event in process.events if event["event"] == "finding"]


def problems(findings: list[dict[str, Any]]) -> dict[str, str]:
    return {f["check"]: f["text"] for f in findings if f["level"] == "problem"}


def texts(findings: list[dict[str, Any]]) -> str:
    return "\n".join(finding["text"] for finding in findings)


@pytest.mark.parametrize(
    ("method", "offers"),
    [
        (Method("v2", "logging"), "VFIO migration v2, pre-copy of its state, DMA logging, reset"),
        (Method("replay", "message"), "it offers reset; profile virtio"),
    ],
    ids=str,
)
def test_both_hosts_are_ready(tmp_path: Path, method: Method, offers: str) -> None:
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        for host, part in ((a, "source"), (b, "target")):
            code, findings = doctor(bed, host)
            assert code == Exit.OK, findings
            said = texts(findings)
            assert f"this VMM can be the {part}" in said
            assert offers in said
            assert f"registers by {method.registers}, dirty pages by {method.dirty}" in said
            assert all(finding["text"] for finding in findings)
        assert_sound(bed, a)


def test_what_stands_in_the_way_is_named_with_what_to_do(tmp_path: Path) -> None:
    async def pause(path: Path) -> None:
        async with await Vmm.connect(str(path)) as vmm:
            await vmm.execute("stop")

    with new_bed(tmp_path, small_setup(METHOD, device=())) as bed:
        a, b = bed.hosts["a"], bed.hosts["b"]
        bed.start_host(a, incoming=False)
        trio.run(pause, a.qmp_socket)
        bed.start_device(b)
        bed.start_gateway(b)
        code, findings = doctor(bed, a, "--registers", "v2", "--gateway", b.control_socket)
        assert code == Exit.NOT_READY
        found = problems(findings)
        assert found["guest"] == "it is paused"
        assert "does not offer VFIO migration v2" in found["device 1af4:1042"]
        assert found[f"gateway {b.control_socket}"] == "no VMM is connected"
        assert all(f["advice"] for f in findings if f["check"] in ("guest", "gateway"))
        assert bed.status(a) == "paused"


def test_a_migration_that_runs_is_told_of_and_goes_on(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        patient = ("--peer-timeout", "60")
        sender, receiver = start_migration(
            bed, a, b, METHOD, *patient, "--break-at", "pausing", receive=patient
        )
        sender.wait_stopped()
        # At once: a sender that is stopped for long is ended by its gateway.
        with ThreadPoolExecutor() as pool:
            said = [*pool.map(partial(doctor, bed), (a, b))]
        for host, role, (code, findings) in zip((a, b), ("source", "target"), said, strict=True):
            assert code == Exit.NOT_READY
            found = problems(findings)
            assert "another client has it" in found["QMP"]
            assert f"as {role}" in found[f"gateway {host.control_socket}"]
        sender.resume()
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK
        assert_sound(bed, b)


def test_paths_where_nothing_is(tmp_path: Path) -> None:
    nothing = tmp_path / "none"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ferry.cli", "doctor"),
            *("--qmp", nothing, "--gateway", nothing, "--gateway", tmp_path, "--qemu", nothing),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == Exit.NOT_READY
    lines = done.stdout.splitlines()
    for what in ("QEMU", "QMP", f"gateway {nothing}", f"gateway {tmp_path}"):
        (at,) = (n for n, line in enumerate(lines) if line.startswith(f"problem  {what}: "))
        assert lines[at + 1].strip().startswith("-> ")
    assert lines[-1] == "4 problems in the way of a migration"
    assert not done.stderr
