import itertools
import json
import subprocess
from pathlib import Path

import pytest
import trio

from ferry.doctor.qemu_program import Qemu
from lab.qemu.errors import MachineError
from lab.qemu.machine import Guest, Machine, MachineSpec, VfioUserDevice, arguments, running
from lab.qemu.report import GuestReport


def spec(folder: Path = Path("/run/m"), **changes: object) -> MachineSpec:
    return MachineSpec(folder, Path("/boot/k"), Path("/boot/i"), **changes)  # type: ignore[arg-type]


def ended(command: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([command])
    process.wait()
    return process


def values_of(argv: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(argv) if name == option]


def test_memory_is_shared_and_the_machine_is_emulated() -> None:
    argv = arguments(spec(memory_bytes=128 << 20))
    assert values_of(argv, "-object") == ["memory-backend-memfd,id=ram,size=134217728,share=on"]
    assert values_of(argv, "-m") == ["134217728B"]
    assert values_of(argv, "-machine") == ["q35,memory-backend=ram"]
    assert values_of(argv, "-accel") == ["tcg"]
    assert "-incoming" not in argv
    assert "-S" not in argv


def test_a_device_on_the_root_bus() -> None:
    argv = arguments(spec(devices=(VfioUserDevice(Path("/run/g,0"), 4),)))
    assert [json.loads(value) for value in values_of(argv, "-device")] == [
        {
            "driver": "vfio-user-pci",
            "id": "device4",
            "socket": {"type": "unix", "path": "/run/g,0"},
            "bus": "pcie.0",
            "addr": "0x4",
        }
    ]


def test_devices_behind_root_ports() -> None:
    devices = (VfioUserDevice(Path("/a"), 4, True), VfioUserDevice(Path("/b"), 17, True))
    port, behind, _, other = values_of(arguments(spec(devices=devices)), "-device")
    assert port == "pcie-root-port,id=port4,bus=pcie.0,addr=0x4,chassis=4"
    assert json.loads(behind)["bus"] == "port4"
    assert json.loads(other)["bus"] == "port17"


def test_source_and_target_differ_in_the_end_only() -> None:
    source, target = arguments(spec()), arguments(spec(incoming=True))
    assert target == [*source, "-S", "-incoming", "defer"]


def test_a_comma_in_a_path_stays_a_comma() -> None:
    argv = arguments(spec(Path("/run/a,b")))
    assert "unix:/run/a,,b/qmp,server=on,wait=off" in values_of(argv, "-qmp")


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(MachineError, match="another folder"):
        arguments(spec(Path("/run") / ("x" * 104)))
    with pytest.raises(MachineError, match="another folder"):
        arguments(spec(devices=(VfioUserDevice(Path("/" + "x" * 108), 4),)))


@pytest.mark.parametrize("slot", [0, 31])
def test_a_slot_that_q35_uses_or_does_not_have_is_refused(slot: int) -> None:
    with pytest.raises(MachineError, match="slot"):
        arguments(spec(devices=(VfioUserDevice(Path("/s"), slot),)))


def fake_program(folder: Path, script: str) -> Qemu:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Qemu(path, (11, 1, 3))


def test_a_qemu_that_ends_at_once_is_quoted(short_path: Path) -> None:
    async def main() -> None:
        qemu = fake_program(short_path, "echo no such device >&2; exit 7")
        with trio.fail_after(20):
            async with running(qemu, spec(short_path)):
                pytest.fail("it did not start")

    with pytest.raises(MachineError, match="ended with 7: no such device"):
        trio.run(main)


def test_a_program_that_is_not_there_is_a_machine_error(short_path: Path) -> None:
    async def main() -> None:
        async with running(Qemu(short_path / "none", (11, 1, 3)), spec(short_path)):
            pytest.fail("it did not start")

    with pytest.raises(MachineError, match="cannot start"):
        trio.run(main)


def test_a_guest_is_followed_from_one_machine_to_the_next(short_path: Path) -> None:
    async def main() -> GuestReport:
        process = ended("true")
        source = Machine(spec(short_path / "source"), process)
        target = Machine(spec(short_path / "target"), process)
        for machine, text in ((source, "FERRY ready\nFERRY be"), (target, "at n=8 reads=1 ")):
            machine.spec.folder.mkdir()
            (machine.spec.folder / "report.log").write_text(text)
        guest = Guest()
        guest.look(source)
        guest.look(target)
        with (target.spec.folder / "report.log").open("a") as log:
            log.write("writes=2 inflight=0\nFERRY end errors=0\n")
        await guest.wait(target, lambda report: report.ended)
        return guest.report

    report = trio.run(main)
    assert (report.beats, report.writes) == (8, 2)


def test_a_machine_that_ended_before_its_guest_is_an_error(short_path: Path) -> None:
    async def main() -> None:
        process = ended("false")
        with trio.fail_after(20):
            await Guest().wait(Machine(spec(short_path), process), lambda report: report.ended)

    with pytest.raises(MachineError, match="ended with 1"):
        trio.run(main)
