"""Kernels in numba's cache: what is taken from it, what is not, and what makes another one."""

import ast
import fcntl
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numba.core.caching
import numpy as np
import pytest
from numba import types

from transport.kernels import cache
from transport.kernels.cache import open_folder
from transport.kernels.declare import CompilationFailed, Kernel, Origin, readonly

LONG_AGO = time.time() - 90 * 86400.0


def total(numbers: Any) -> Any:
    found = 0
    for each in numbers:
        found += each
    return found


def load(function: Callable[..., Any] = total) -> Origin | None:
    """As another process would: where it has come from."""
    kernel = Kernel(function, (readonly(types.int64),))
    with open_folder() as folder:
        kernel.load(folder.path)
    assert kernel(np.arange(5)) == 10
    return kernel.origin


def why_not() -> str:
    with open_folder() as folder:
        assert folder.path is None
        return folder.why_not


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VFIO_FERRY_CACHE", str(tmp_path / "new"))
    return tmp_path / "new"


@pytest.fixture
def folder(base: Path) -> Path:
    """Filled."""
    assert load() is Origin.KEPT
    [path] = base.iterdir()
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_compiled_once_is_found(folder: Path) -> None:
    assert load() is Origin.FOUND
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o701, 0o750, 0o777])
def test_nothing_is_taken_from_nor_put_into_a_folder_that_others_may_enter(
    folder: Path, mode: int
) -> None:
    before = files(folder)
    folder.chmod(mode)
    assert "closed to all others" in why_not()
    assert load() is Origin.IN_MEMORY
    assert files(folder) == before


def test_nothing_is_taken_from_another_users_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert str(folder) in why_not()
    assert load() is Origin.IN_MEMORY


def test_a_link_to_a_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    assert load() is Origin.IN_MEMORY


def test_a_folder_put_in_place_of_one_that_was_found_good_is_not_used(
    folder: Path, tmp_path: Path
) -> None:
    kernel = Kernel(total, (readonly(types.int64),))
    with open_folder() as opened:
        folder.rename(tmp_path / "ours")
        folder.mkdir(mode=0o777)
        kernel.load(opened.path)
    assert kernel.origin is Origin.FOUND
    assert not list(folder.iterdir())


def test_where_there_can_be_no_folder_each_process_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VFIO_FERRY_CACHE", str(tmp_path / "file"))
    assert "File exists" in why_not()
    assert load() is Origin.IN_MEMORY


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError

    for name in ("VFIO_FERRY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert "set $VFIO_FERRY_CACHE" in why_not()
    assert load() is Origin.IN_MEMORY


def test_numba_is_kept_from_looking_for_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so where it cannot write, and does not ask who else can write there."""

    def refused(**where: Any) -> Any:
        if str(where["dir"]).startswith("/proc"):
            raise PermissionError
        return make(**where)

    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert load() is Origin.IN_MEMORY
    assert not list(Path(__file__).parent.rglob("test_cache.total*"))


def test_what_cannot_be_kept_is_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert load() is Origin.IN_MEMORY
    assert not files(base)


@pytest.mark.parametrize("which", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[: len(data) // 2],
        lambda data: b"!" + data[1:],
        lambda data: pickle.dumps("something else"),
    ],
    ids=["empty", "head", "half", "begin", "other"],
)
def test_what_is_damaged_is_compiled_anew(
    folder: Path, which: str, damage: Callable[[bytes], bytes]
) -> None:
    [file] = folder.rglob(which)
    file.write_bytes(damage(file.read_bytes()))
    assert load() in (Origin.KEPT, Origin.IN_MEMORY)
    assert load() in (Origin.KEPT, Origin.FOUND)
    assert load() is Origin.FOUND


def test_two_that_start_at_once_do_not_disturb_each_other(base: Path) -> None:
    program = (
        "import sys, numpy as np\n"
        "from transport.kernels.bitmap import _count\n"
        "sys.stdin.read()\n"
        "assert _count(np.array([5], np.uint64), np.uint64(7)) == 2\n"
        "print(_count.origin.name)"
    )

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    together = [start() for _ in range(2)]
    for each in together:
        assert each.stdin is not None
        each.stdin.close()
    said = {each.stdout.read().strip() for each in together if each.stdout is not None}
    assert [each.wait() for each in together] == [0, 0]
    assert said <= {"KEPT", "FOUND"}
    with start() as third:
        assert third.communicate()[0].strip() == "FOUND"


def test_one_process_compiles_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0

    def until_it_is_closed(_seconds: float) -> None:
        nonlocal waited
        waited += 1
        if waited == 3:
            first.close()

    monkeypatch.setattr(time, "sleep", until_it_is_closed)
    first = ExitStack()
    first.enter_context(open_folder()).wait_for_turn()
    with open_folder() as second:
        second.wait_for_turn()
        assert waited == 3


def test_nobody_waits_for_ever(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "TURN_S", 0.2)
    with open_folder() as first, open_folder() as second:
        first.wait_for_turn()
        second.wait_for_turn()
        with pytest.raises(BlockingIOError):
            fcntl.flock(second.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_whatever_the_code_depends_on_makes_another_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("one")
    monkeypatch.setattr(cache, "SOURCES", (source,))
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: source.write_text("two"),
        lambda: monkeypatch.setattr(numba, "__version__", "2"),
        lambda: monkeypatch.setattr(llvmlite, "__version__", "2"),
        lambda: monkeypatch.setattr(cache, "processor", lambda: ["another"]),
        lambda: monkeypatch.setattr(sys, "version", "4.0"),
        lambda: monkeypatch.setattr(np, "__version__", "3.0"),
        lambda: monkeypatch.setenv("NUMBA_OPT", "1"),
    ]
    seen = set()
    for change in changes:
        change()
        seen.add(cache.digest())
        assert cache.digest() in seen
    assert len(seen) == len(changes)


def test_kernels_for_another_processor_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an emulated one, which could not compile them in a reasonable time."""
    here = cache.digest()
    monkeypatch.setattr(numba.config, "CPU_NAME", "generic")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "")
    assert cache.processor() == ["generic", ""]
    assert cache.digest() != here


def test_the_digest_covers_every_file_that_kernels_take_constants_from() -> None:
    """Errors, extents and the user's folder have none that a kernel could use."""
    room = Path(cache.__file__).parent
    kernels = [path for path in cache.SOURCES if path.parent == room]
    assert set(kernels) == set(room.glob("*.py"))
    imported = {
        node.module
        for path in kernels
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    outside = {
        name
        for name in imported
        if name.startswith("transport.") and not name.startswith("transport.kernels")
    }
    assert outside - {
        "transport.wire.errors",
        "transport.wire.extents",
        "transport.user_cache",
        "transport.private_path",
    } == {"transport.wire.frames"}
    assert room.parent / "wire/frames.py" in cache.SOURCES


def test_folders_that_nobody_has_used_for_long_go_when_there_is_a_new_one(
    base: Path, tmp_path: Path
) -> None:
    base.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    old, recent, link = (base / f"kernels-{letter * 32}" for letter in "abc")
    others = base / "qemu"
    for path in (old, recent, others):
        path.mkdir()
        (path / "file").touch()
    link.symlink_to(tmp_path / "elsewhere")
    for path in (old, others, link):
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)
    assert load() is Origin.KEPT
    assert {path.name for path in base.iterdir()} == {
        recent.name,
        link.name,
        "qemu",
        f"kernels-{cache.digest()}",
    }
    assert (tmp_path / "elsewhere/file").exists()


def test_a_folder_that_is_used_stays(folder: Path) -> None:
    os.utime(folder, (LONG_AGO, LONG_AGO))
    assert load() is Origin.FOUND
    assert folder.stat().st_mtime > LONG_AGO + cache.UNUSED_S


def test_what_cannot_be_compiled_is_named(base: Path) -> None:
    def nonsense(numbers: Any) -> Any:
        return numbers.no_such_attribute

    with pytest.raises(CompilationFailed, match=r"nonsense cannot be compiled: .* .*no_such_attr"):
        load(nonsense)
