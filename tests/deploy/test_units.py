"""The units are installed as meant, name options that there are, and systemd takes them."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ferry.commands import gateway
from ferry.config import flag_of
from ferry.errors import Exit
from ferry.migration import receive_options

HOUSE = Path(__file__).parents[2]
UNITS = sorted((HOUSE / "deploy" / "systemd").iterdir())


def install(folder: Path, program: str) -> Path:
    subprocess.run(
        ["make", "-s", "-C", HOUSE, "install-units", f"DESTDIR={folder}", f"VFIO_FERRY={program}"],
        check=True,
    )
    return folder / "etc/systemd/system"


def test_they_are_installed_for_the_program_that_is_named(tmp_path: Path) -> None:
    where = install(tmp_path, "/opt/x/bin/vfio-ferry")
    assert {path.name for path in where.iterdir()} == {path.name for path in UNITS}
    for path in where.glob("*.service"):
        assert "ExecStart=/opt/x/bin/vfio-ferry " in path.read_text()


@pytest.mark.parametrize(
    ("name", "options"), [("gateway", gateway.Options), ("receive", receive_options.Options)]
)
def test_they_use_options_that_there_are(name: str, options: type) -> None:
    text = (HOUSE / f"deploy/systemd/vfio-ferry-{name}@.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    known = {flag_of(field) for field in dataclasses.fields(options)} | {"--config"}
    assert set(re.findall(r"--[a-z-]+", command)) <= known


def test_a_receiver_is_not_restarted_where_somebody_has_to_look() -> None:
    text = (HOUSE / "deploy/systemd/vfio-ferry-receive@.service").read_text()
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)
    assert {Exit.USAGE, Exit.IN_DOUBT, Exit.BROKEN, Exit.OWNER_FAILED} == set(
        map(Exit, map(int, codes.split()))
    )


def test_a_gateway_that_is_not_root_may_write_where_it_has_to() -> None:
    """Everything else is read-only to it (ProtectSystem=strict), and /run/vfio-ferry is root's."""
    service = (HOUSE / "deploy/systemd/vfio-ferry-gateway@.service").read_text()
    (records,) = re.findall(r"^ExecStart=.* --records (\S+)", service, re.MULTILINE)
    (state,) = re.findall(r"^StateDirectory=(.*)$", service, re.MULTILINE)
    assert records == f"/var/lib/{state}/records"
    socket = (HOUSE / "deploy/systemd/vfio-ferry-gateway@.socket").read_text()
    (user,) = re.findall(r"^SocketUser=(.*)$", socket, re.MULTILINE)
    folders = {str(Path(path).parent) for path in re.findall(r"^ListenStream=(.*)$", socket, re.M)}
    (made,) = re.findall(r"^ExecStartPre=\S+ -d -o (.*)$", socket, re.MULTILINE)
    assert made == f"{user} -g {user} -m 0755 {folders.pop()}" and not folders
    assert f"User={user}\n" in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_them(tmp_path: Path) -> None:
    where = install(tmp_path, shutil.which("true") or "/bin/true")
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(where.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert str(where) not in found.stderr, found.stderr
