"""The device behind a gateway dies, and the guest goes on with the process that comes after it."""

import itertools
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from ferry.errors import Exit
from lab.testbed import Host, Process, Testbed, Unit
from tests.e2e.two_hosts import (
    MIGRATION_S,
    Method,
    assert_sound,
    new_bed,
    small_setup,
    start_both,
    start_migration,
)

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


def restart(bed: Testbed, unit: Unit) -> None:
    """SIGKILL, and a new process at the same socket."""
    assert unit.device is not None
    unit.device.kill()
    unit.device_socket.unlink(missing_ok=True)
    bed.start_device(unit)


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
            assert f"change it to {unit.device_socket}" in done["text"]
            assert old is not None
            old.kill()
            old = unit.device
            bed.wait_operations(host, 300)
        assert not events(host, "device-away")
        assert_sound(bed, host)


def test_a_migration_ends_with_the_device_and_the_guest_does_not(tmp_path: Path) -> None:
    method = Method()
    with new_bed(tmp_path, small_setup(method, *LOAD)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(bed, a, b, method, "--break-at", "precopy")
        sender.wait_stopped()
        restart(bed, a)
        wait_back(a, 1)
        sender.resume()
        assert sender.wait(MIGRATION_S) == Exit.DEVICE, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.PEER_ABORTED, receiver.tail()
        bed.wait_status(a, "running")
        assert_sound(bed, a)


@pytest.mark.full
def test_a_device_that_stays_away_costs_no_guest(tmp_path: Path) -> None:
    """Its accesses are answered in time, with an error, and once it is there they work."""
    with new_bed(tmp_path, small_setup(Method(), *LOAD)) as bed:
        host = start_one(bed)
        assert host.device is not None and host.guest is not None
        host.device.kill()
        host.device_socket.unlink()
        time.sleep(7)
        assert host.guest.running and not events(host, "device-lost")
        bed.start_device(host)
        back = wait_back(host, 1)
        assert back["away_ms"] > 5000 and back["refused"]
        assert_sound(bed, host)


@pytest.mark.full
def test_what_is_not_the_device_does_not_take_its_place(tmp_path: Path) -> None:
    """Another disk, a network card, somebody who says nothing; then the device."""
    with new_bed(tmp_path, small_setup(Method(), *LOAD)) as bed:
        host = start_one(bed)
        assert host.device is not None
        host.device.kill()
        host.device_socket.unlink()
        other = tmp_path / "other.img"
        other.write_bytes(bytes(1 << 20))
        words = ("device", "--socket", host.device_socket, "--image", other)
        disk = bed.start("another disk", *words, *bed.setup.device)
        wait_event(host, "device-not-back", "device_config was")
        disk.kill()
        host.device_socket.unlink()
        nic = bed.start("nic", "nic", "--socket", host.device_socket, "--link", tmp_path / "hub")
        wait_event(host, "device-not-back", "1af4:1042")
        nic.kill()
        host.device_socket.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as mute:
            mute.bind(str(host.device_socket))
            mute.listen(8)
            wait_event(host, "device-not-back", "did not answer in time")
        host.device_socket.unlink()
        bed.start_device(host)
        wait_back(host, 1)
        assert_sound(bed, host)


@pytest.mark.full
def test_a_device_that_dies_again_on_its_way_comes_back_all_the_same(tmp_path: Path) -> None:
    chance = random.Random(1)
    with new_bed(tmp_path, small_setup(Method(), *LOAD)) as bed:
        host = start_one(bed)
        for _ in range(TIMES):
            assert host.device is not None
            host.device.kill()
            host.device_socket.unlink(missing_ok=True)
            bed.start_device(host)
            time.sleep(chance.random() * 0.3)
        wait_back(host, len(events(host, "device-away")))
        assert_sound(bed, host)
        assert all(event["work_known"] for event in events(host, "device-back"))


def wait_event(host: Host, name: str, reason: str) -> None:
    """Until the gateway has told of `name` with `reason` in its reason."""
    assert host.gateway is not None
    host.gateway.wait_event(name, where=lambda event: reason in event["reason"])


@pytest.mark.full
@pytest.mark.parametrize("registers", ["replay", "v2"])
def test_whoever_dies_in_a_replacement_costs_no_guest(tmp_path: Path, registers: str) -> None:
    """The command, the new device, the guest's, each killed or stopped at each step."""
    with new_bed(tmp_path, small_setup(Method(registers), *LOAD)) as bed:
        host = start_one(bed)
        current: Unit = host
        cases = itertools.product(
            ("command", "new", "old"),
            ("preparing", "prepared", "switching"),
            (signal.SIGKILL, signal.SIGSTOP),
        )
        for number, (victim, phase, what) in enumerate(cases):
            unit = start_new(bed, host, f"new{number}")
            command = replace(bed, host, unit, "--break-at", phase)
            command.wait_stopped()
            process = {"command": command, "new": unit.device, "old": current.device}[victim]
            assert process is not None and unit.device is not None and current.device is not None
            if victim == "old" and what is signal.SIGKILL:
                times = len(events(host, "device-back"))
                restart(bed, current)
                wait_back(host, times + 1)
            else:
                process.signal(what)
            if victim != "command":
                command.resume()
                command.wait(30)
            process.resume()
            command.resume()
            command.wait(30)
            if command.events[-1]["event"] == "replaced":
                current.device.kill()
                current = unit
            else:
                unit.device.kill()
            bed.wait_operations(host, 200)
        assert_sound(bed, host)
