import subprocess
from pathlib import Path

import pytest

from ferry.errors import QemuMissing
from lab.qemu.errors import EnvironmentFailed
from lab.qemu.packages import choose_mirror, planned_files, require_tools, unpack

DEBIAN = 'ID=debian\nVERSION_CODENAME="bookworm"\n'
UBUNTU = "ID=ubuntu\nVERSION_CODENAME=noble\n"
UNKNOWN = "$(LABEL)"


@pytest.mark.parametrize(
    ("lines", "system", "mirror"),
    [
        # The archive proper, behind other archives and before security.
        (
            [
                "file:/other/|Other|stable|main",
                "file:/debian/|Debian|bookworm|main",
                "file:/security/|Debian-Security|bookworm-security|main",
            ],
            DEBIAN,
            "file:/debian/",
        ),
        # A Debian archive on another system is as good.
        (["file:/debian/|Debian|trixie|main"], UBUNTU, "file:/debian/"),
        # The lists were never fetched, so apt does not know the label.
        (
            [
                f"file:/security/|{UNKNOWN}|bookworm-security|main",
                f"file:/debian/|{UNKNOWN}|bookworm|main",
            ],
            DEBIAN,
            "file:/debian/",
        ),
        (["file:/debian/|Debian|bookworm|contrib"], DEBIAN, None),
        (["file:/ubuntu/|Ubuntu|noble|main"], UBUNTU, None),
        ([f"file:/ubuntu/|{UNKNOWN}|noble|main"], UBUNTU, None),
        (["", "nonsense"], DEBIAN, None),
        ([], "", None),
    ],
)
def test_the_mirror_is_the_hosts_own(lines: list[str], system: str, mirror: str | None) -> None:
    assert choose_mirror("\n".join(lines), system) == mirror


def test_the_plan_names_each_file_as_apt_stores_it() -> None:
    plan = (
        "NOTE: This is only a simulation!\n"
        "Inst libattr1 (1:2.5.2-3 Debian:13.7/stable [amd64])\n"
        "Inst seabios (1.17.0-1~bpo13+1 Debian Backports:stable-backports [all]) []\n"
        "Conf libattr1 (1:2.5.2-3 Debian:13.7/stable [amd64])\n"
    )
    assert planned_files(plan) == [
        "libattr1_1%3a2.5.2-3_amd64.deb",
        "seabios_1.17.0-1~bpo13+1_all.deb",
    ]


def test_a_machine_without_apt_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuMissing, match=r"install QEMU 10\.1 or later"):
        require_tools()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a file below /lib and a program with the set-user-ID bit."""
    content = tmp_path / "content"
    for name in ("DEBIAN", "lib", "usr/bin"):
        (content / name).mkdir(parents=True)
    (content / "DEBIAN/control").write_text(
        "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: n <n@localhost>\nDescription: d\n"
    )
    (content / "lib/library").write_text("library")
    (content / "usr/bin/program").write_text("program")
    (content / "usr/bin/program").chmod(0o4755)
    path = tmp_path / "p.deb"
    try:
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "--build", content, path],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("dpkg-deb is not on this machine")
    return path


def test_packages_are_unpacked_into_a_merged_usr(tmp_path: Path, package: Path) -> None:
    lines: list[str] = []
    root = tmp_path / "root"
    unpack([package], root, lines.append)
    assert (root / "usr/lib/library").read_text() == "library"
    assert (root / "lib").is_symlink()
    assert (root / "usr/bin/program").stat().st_mode & 0o7777 == 0o755
    assert lines == ["unpacking 1 packages"]


def test_a_damaged_package_is_named(tmp_path: Path, package: Path) -> None:
    package.write_bytes(package.read_bytes()[:200])
    with pytest.raises(EnvironmentFailed):
        unpack([package], tmp_path / "root", lambda _: None)
