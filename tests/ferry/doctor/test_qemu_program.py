from pathlib import Path

import pytest

from ferry.doctor.qemu_program import find_qemu, has_device, parse_version, probe
from ferry.errors import QemuMissing

HELP = (
    'name "vfio-pci", bus PCI, desc "VFIO-based PCI device assignment"\n'
    'name "vfio-user-pci", bus PCI, desc "VFIO over socket PCI device assignment"\n'
)


def fake_qemu(folder: Path, version: str, devices: str, code: int = 0) -> Path:
    path = folder / "qemu-system-x86_64"
    path.write_text(
        "#!/bin/sh\n"
        f'case $1 in --version) echo "{version}" ;; *) cat <<END\n{devices}\nEND\n;; esac\n'
        f"exit {code}\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)", (11, 1, 3)),
        ("QEMU emulator version 10.1.0\nCopyright (c) 2003-2025", (10, 1, 0)),
        ("QEMU emulator version 10.1", (10, 1, 0)),
        ("QEMU emulator version 10.0.90 (v10.1.0-rc0)", (10, 0, 90)),
        ("bash: not found", None),
        ("", None),
    ],
)
def test_versions(text: str, version: tuple[int, int, int] | None) -> None:
    assert parse_version(text) == version


def test_the_device_is_found_by_its_own_name_only() -> None:
    assert has_device(HELP)
    assert not has_device('name "vfio-pci", desc "unlike vfio-user-pci"\n')


def test_a_qemu_that_fits(tmp_path: Path) -> None:
    qemu = probe(fake_qemu(tmp_path, "QEMU emulator version 10.1.2", HELP))
    assert qemu.version == (10, 1, 2)
    assert qemu.version_text == "10.1.2"


@pytest.mark.parametrize(
    ("version", "devices", "code", "why"),
    [
        ("QEMU emulator version 7.2.17", HELP, 0, "10.1 or later"),
        ("QEMU emulator version 10.1.0", 'name "e1000"', 0, "without vfio-user-pci"),
        ("something else", HELP, 0, "is it QEMU"),
        ("QEMU emulator version 10.1.0", HELP, 3, "failed"),
    ],
)
def test_a_qemu_that_does_not_fit_says_why(
    tmp_path: Path, version: str, devices: str, code: int, why: str
) -> None:
    with pytest.raises(QemuMissing, match=why):
        probe(fake_qemu(tmp_path, version, devices, code))


def test_every_candidate_is_looked_at(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    too_old = fake_qemu(old, "QEMU emulator version 7.2.17", HELP)
    fits = fake_qemu(new, "QEMU emulator version 11.0.0", HELP)
    missing = tmp_path / "missing"
    assert find_qemu([missing, too_old, fits]).program == fits
    with pytest.raises(QemuMissing, match=r"missing.*7\.2\.17"):
        find_qemu([missing, too_old])
