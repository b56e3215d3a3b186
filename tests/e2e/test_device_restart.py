"""The device behind a gateway dies, and the guest goes on with the process that comes after it."""

import time
from pathlib import Path
from typing import Any

import pytest

from ferry.errors import Exit
from lab.testbed import Host, Process, Testbed, Unit
from tests.e2e.two_hosts import Method, assert_sound, new_bed, small_setup

LOAD = ("--queue-depth", "16", "--iops", "5000")
TIMES = 20


def start_one(bed: Testbed) -> Host:
    host = bed.hosts["a"]
    bed.start_host(host, incoming=False)
    bed.wait_operations(host, 500)
    return host


def events(host: Host, name: str) -> list[dict[str, Any]]:
    assert host.gateway is not None
    return [event for event in host.gateway.events if event["event"] == name]


def wait_back(host: Host, times: int) -> dict[str, Any]:
    """Until the device has come back so many times in all."""
    deadline = time.monotonic() + 60
    while len(back := events(host, "device-back")) < times:
        assert time.monotonic() < deadline, host.gateway and host.gateway.tail()
        time.sleep(0.02)
    return back[-1]


def restart(bed: Testbed, host: Host) -> None:
    """SIGKILL, and a new process at the same socket."""
    assert host.device is not None
    host.device.kill()
    host.device_socket.unlink(missing_ok=True)
    bed.start_device(host)


@pytest.mark.parametrize("times", [2, pytest.param(TIMES, marks=pytest.mark.full)])
def test_a_device_that_is_killed_under_load_comes_back(tmp_path: Path, times: int) -> None:
    with new_bed(tmp_path, small_setup(Method(), *LOAD)) as bed:
        host = start_one(bed)
        for number in range(times):
            restart(bed, host)
            back = wait_back(host, number + 1)
            assert back["work_known"] and not back["refused"], back
            bed.wait_operations(host, 300)
        assert_sound(bed, host)
        assert host.guest is not None and host.guest.running


def start_new(bed: Testbed, host: Host, name: str, *flags: str) -> Unit:
    """Another process for the same disk, beside the guest's device."""
    unit = Unit(f"{name} {host.name}", host.folder / name)
    unit.folder.mkdir(mode=0o700)
    unit.device = bed.start(
        f"device {unit.name}",
        *("device", "--socket", unit.device_socket, "--image", bed.image),
        *(flags or bed.setup.device),
    )
    unit.device.wait_socket(unit.device_socket)
    return unit


def replace(bed: Testbed, host: Host, unit: Unit, *flags: str) -> Process:
    return bed.start(
        f"replace {unit.name}",
        *("replace", "--gateway", host.control_socket, "--device", unit.device_socket, "--json"),
        *flags,
    )


@pytest.mark.parametrize("registers", ["replay", "v2"])
@pytest.mark.parametrize("times", [2, pytest.param(TIMES, marks=pytest.mark.full)])
def test_a_device_is_replaced_under_load(tmp_path: Path, registers: str, times: int) -> None:
    with new_bed(tmp_path, small_setup(Method(registers), *LOAD)) as bed:
        host = start_one(bed)
        old = host.device
        for number in range(times):
            unit = start_new(bed, host, f"new{number}")
            command = replace(bed, host, unit)
            assert command.wait(30) == Exit.OK, command.tail()
            done = command.wait_event("replaced")
            assert done["native"] is (registers == "v2")
            assert old is not None
            old.kill()
            old = unit.device
            bed.wait_operations(host, 300)
        assert not events(host, "device-away")
        assert_sound(bed, host)
