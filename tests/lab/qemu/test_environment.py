import os
import subprocess
import sys
from pathlib import Path

import pytest

from ferry.doctor.qemu_program import Qemu
from ferry.errors import QemuMissing
from lab.qemu import environment, packages
from lab.qemu.environment import cached, libraries_of, prepare
from lab.qemu.errors import EnvironmentFailed
from lab.qemu.packages import Progress, Recipe
from transport.user_cache import default_cache


def test_the_cache_is_where_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VFIO_FERRY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "vfio-ferry"
    monkeypatch.setenv("VFIO_FERRY_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
    monkeypatch.delenv("VFIO_FERRY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/vfio-ferry"


def test_nothing_is_cached_in_an_empty_folder(tmp_path: Path) -> None:
    assert cached(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def host_qemu(monkeypatch: pytest.MonkeyPatch) -> Qemu:
    """A machine that has QEMU, so that only the guest's parts have to be made."""
    qemu = Qemu(Path("qemu-system-x86_64"), (11, 1, 3))
    monkeypatch.setattr(environment, "find_qemu", lambda: qemu)
    monkeypatch.setattr(packages, "require_tools", lambda: None)
    return qemu


class FakeArchive:
    """Stands for apt and dpkg. `fail_at` is the call that fails, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: str = "") -> None:
        self.fail_at = fail_at
        self.recipes: list[Recipe] = []
        self.resumed = False
        monkeypatch.setattr(packages, "download", self._download)
        monkeypatch.setattr(packages, "unpack", self._unpack)
        monkeypatch.setattr(environment, "_tool", self._depmod)

    def _fail(self, call: str) -> None:
        if self.fail_at == call:
            self.fail_at = ""
            raise EnvironmentFailed(f"{call} failed")

    def _download(self, recipe: Recipe, mirror: str, work: Path, progress: Progress) -> list[Path]:
        assert mirror == "file:/mirror"
        self.recipes.append(recipe)
        work.mkdir(exist_ok=True)
        self.resumed = (work / "partial").exists()
        (work / "partial").touch()
        self._fail("download")
        return [work / "linux_1_amd64.deb"]

    def _unpack(self, files: list[Path], root: Path, progress: Progress) -> None:
        (root / "boot").mkdir(parents=True)
        self._fail("unpack")
        (root / "boot/vmlinuz-6.12-test").touch()

    def _depmod(self, *arguments: object) -> str:
        assert arguments[-1] == "6.12-test"
        self._fail("depmod")
        return ""


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_qemu: Qemu) -> None:
    archive = FakeArchive(monkeypatch)
    lines: list[str] = []
    made = prepare(lines.append, cache=tmp_path, mirror="file:/mirror")
    assert made.qemu == host_qemu
    assert made.modules == made.root / "usr/lib/modules/6.12-test"
    assert any("found QEMU 11.1.3" in line for line in lines)
    assert prepare(lines.append, cache=tmp_path, mirror="file:/mirror") == made
    assert cached(tmp_path) == made
    assert len(archive.recipes) == 1
    assert "qemu-system-x86" not in archive.recipes[0].packages
    assert sorted(path.name for path in tmp_path.iterdir()) == [made.root.parent.name, "lock"]


@pytest.mark.parametrize("call", ["download", "unpack", "depmod"])
def test_a_failure_leaves_nothing_half_made_and_the_next_try_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_qemu: Qemu, call: str
) -> None:
    archive = FakeArchive(monkeypatch, fail_at=call)
    with pytest.raises(EnvironmentFailed, match=call):
        prepare(lambda _: None, cache=tmp_path, mirror="file:/mirror")
    assert cached(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "lock"]
    prepare(lambda _: None, cache=tmp_path, mirror="file:/mirror")
    assert archive.resumed
    assert cached(tmp_path) is not None


def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_qemu: Qemu
) -> None:
    FakeArchive(monkeypatch)
    name = prepare(lambda _: None, cache=tmp_path, mirror="file:/mirror").root.parent.name
    (tmp_path / name).rename(tmp_path / f".{name}.killed")
    prepare(lambda _: None, cache=tmp_path, mirror="file:/mirror")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "lock"]


def test_without_a_usable_qemu_one_is_part_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Qemu:
        raise QemuMissing("none")

    monkeypatch.setattr(environment, "find_qemu", missing)
    monkeypatch.setattr(packages, "require_tools", lambda: None)
    archive = FakeArchive(monkeypatch, fail_at="download")
    with pytest.raises(EnvironmentFailed):
        prepare(lambda _: None, cache=tmp_path, mirror="file:/mirror")
    assert "qemu-system-x86" in archive.recipes[0].packages
    assert "qemu" in archive.recipes[0].pinned


def test_a_cache_that_cannot_be_written_is_a_local_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_qemu: Qemu
) -> None:
    FakeArchive(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailed, match="cannot make"):
        prepare(lambda _: None, cache=tmp_path / "file/cache", mirror="file:/mirror")


@pytest.mark.qemu
def test_the_real_environment_has_what_the_guest_needs(
    environment: environment.Environment,
) -> None:
    assert environment.qemu.version >= (10, 1, 0)
    assert environment.kernel.exists()
    assert (environment.modules / "modules.dep").exists()
    assert environment.busybox.exists()
    libraries = libraries_of(environment, environment.root / "usr/sbin/mke2fs")
    assert {"libc.so.6", "libext2fs.so.2"} <= {path.name for path in libraries}


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_without_a_qemu_its_tests_are_skipped_but_not_in_ci(
    tmp_path: Path, ci: str, outcome: str
) -> None:
    test = f"{__file__}::{test_the_real_environment_has_what_the_guest_needs.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "CI": ci, "PATH": str(tmp_path), "VFIO_FERRY_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout
    assert "no QEMU" in done.stdout
