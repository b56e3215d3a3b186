"""The cache of the kernels' image: what is taken from it, what is not, and who compiles."""

import ast
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from transport.kernels import cache
from transport.kernels.image import Image

IMAGE = Image(b"code", {"one": 0}, {})
OTHER = Image(b"other code", {"one": 0}, {})
HOLD = """
import os, sys
from transport.kernels import cache
with cache._lock(os.open(sys.argv[1], os.O_RDONLY)):
    print("held", flush=True)
    sys.stdin.read()
"""
COMPILE = """
import sys
from transport.kernels import cache
sys.path.insert(0, sys.argv[1])
cache._compile()
"""
NEVER_ENDS = """
import os, pathlib, time
pathlib.Path(os.environ["TOLD"]).write_text(str(os.getpid()))
time.sleep(600)
"""


class Compiler:
    """Stands for the compilation, and counts."""

    def __init__(self) -> None:
        self.runs = 0
        self.told = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def compile(self) -> Image:
        self.runs += 1
        self.meanwhile()
        return IMAGE

    def get(self) -> Image:
        def tell() -> None:
            self.told += 1

        return cache.get_image(tell)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(cache, "_compile", made.compile)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VFIO_FERRY_CACHE", str(tmp_path / "new"))
    return tmp_path / "new/kernels"


def test_what_was_compiled_once_is_in_the_cache(compiler: Compiler, folder: Path) -> None:
    assert [compiler.get(), compiler.get()] == [IMAGE, IMAGE]
    assert (compiler.runs, compiler.told) == (1, 1)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:-1] + b"!",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:32] + b"\xff" + data[33:],
    ],
)
def test_a_damaged_image_is_compiled_anew(
    compiler: Compiler, folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    compiler.get()
    [file] = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert compiler.get() == compiler.get() == IMAGE
    assert compiler.runs == 2


def test_code_that_others_can_write_is_not_used(compiler: Compiler, folder: Path) -> None:
    compiler.get()
    [file] = folder.iterdir()
    file.write_bytes(OTHER.to_bytes())
    file.chmod(0o620)
    assert compiler.get() == IMAGE
    assert file.stat().st_mode & 0o777 == 0o600  # replaced


def test_a_link_to_code_is_not_followed(compiler: Compiler, folder: Path, tmp_path: Path) -> None:
    compiler.get()
    [file] = folder.iterdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(OTHER.to_bytes())
    elsewhere.chmod(0o600)
    file.unlink()
    file.symlink_to(elsewhere)
    assert compiler.get() == IMAGE


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_nothing_is_taken_from_nor_put_into_a_folder_that_others_can_write(
    compiler: Compiler, folder: Path, mode: int
) -> None:
    compiler.get()
    [file] = folder.iterdir()
    file.write_bytes(OTHER.to_bytes())
    folder.chmod(mode)
    assert compiler.get() == IMAGE
    assert file.read_bytes() == OTHER.to_bytes()
    assert len(list(folder.iterdir())) == 1


def test_nothing_is_taken_from_another_users_folder(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.get()
    [file] = folder.iterdir()
    file.write_bytes(OTHER.to_bytes())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert compiler.get() == IMAGE


def test_without_a_folder_each_process_compiles(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VFIO_FERRY_CACHE", str(tmp_path / "file"))
    assert [compiler.get(), compiler.get()] == [IMAGE, IMAGE]
    assert compiler.runs == 2


def test_an_image_that_cannot_be_kept_is_used(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "rename", full)
    assert compiler.get() == IMAGE
    assert not list(folder.iterdir())


def test_whatever_the_code_depends_on_makes_another_image(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("one")
    monkeypatch.setattr(cache, "SOURCES", (source,))
    versions = {"numba": "1", "llvmlite": "1"}
    monkeypatch.setattr(cache, "_version_of", versions.__getitem__)

    def processor() -> list[str]:
        return ["flags: fpu"]

    for changed, change in enumerate(
        [
            lambda: None,
            lambda: source.write_text("two"),
            lambda: versions.update(numba="2"),
            lambda: versions.update(llvmlite="2"),
            lambda: monkeypatch.setattr(cache, "processor", processor),
            lambda: monkeypatch.setattr(sys, "version", "4.0"),
            lambda: monkeypatch.setattr(cache.np, "__version__", "3.0"),
            lambda: monkeypatch.setenv("NUMBA_OPT", "1"),
        ]
    ):
        change()
        compiler.get()
        compiler.get()
        assert compiler.runs == changed + 1


def test_the_versions_of_the_compiler_are_found() -> None:
    assert "version" in cache._version_of("numba")
    assert "version" in cache._version_of("llvmlite")
    assert cache._version_of("no_such_package") == ""


def test_the_key_covers_every_file_that_kernels_take_constants_from() -> None:
    """Errors and extents have none that a kernel could use."""
    covered = {f"transport.{path.stem}" for path in cache.SOURCES if path.parent.name != "kernels"}
    kernels = [path for path in cache.SOURCES if path.parent.name == "kernels"]
    assert len(kernels) == len(list(Path(cache.__file__).parent.glob("*.py")))
    imported = {
        node.module
        for path in kernels
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    ours = {name for name in imported if name.startswith("transport.")}
    elsewhere = {name for name in ours if not name.startswith("transport.kernels")}
    assert elsewhere - covered <= {
        "transport.wire.errors",
        "transport.wire.extents",
        "transport.user_cache",
    }


MONTHS_S = 90 * 86400.0


def age(path: Path) -> None:
    long_ago = time.time() - MONTHS_S
    os.utime(path, (long_ago, long_ago), follow_symlinks=False)


def test_images_that_nobody_has_used_for_long_go_when_there_is_a_new_one(
    compiler: Compiler, folder: Path, tmp_path: Path
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch()
    old, interrupted, recent = (f"{c * 32}.image" for c in "abc")
    for name in (old, f".{interrupted}.17", "anothers.image", "notes"):
        (folder / name).touch()
        age(folder / name)
    (folder / recent).touch()
    (folder / f"{'d' * 32}.image").symlink_to(elsewhere)
    age(folder / f"{'d' * 32}.image")
    age(elsewhere)
    compiler.get()
    left = {path.name for path in folder.iterdir()}
    assert left == {"anothers.image", "notes", recent, f"{cache._key()}.image"}
    assert elsewhere.exists()


def test_an_image_that_is_used_stays(compiler: Compiler, folder: Path) -> None:
    compiler.get()
    [file] = folder.iterdir()
    age(file)
    compiler.get()
    assert compiler.runs == 1
    assert time.time() - file.stat().st_mtime < cache.MARK_S
    os.utime(file, (0, time.time() - cache.MARK_S / 2))
    marked = file.stat().st_mtime
    compiler.get()
    assert file.stat().st_mtime == marked  # not written at each start


def test_what_cannot_be_removed_stays(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    for name in (f"{c * 32}.image" for c in "ab"):
        (folder / name).touch()
        age(folder / name)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "unlink", refused)
    assert compiler.get() == IMAGE
    assert len(list(folder.iterdir())) == 3


def test_a_compilation_ends_with_the_process_that_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "llvmlite").mkdir()
    (tmp_path / "llvmlite/__init__.py").write_text(NEVER_ENDS)
    told = tmp_path / "told"
    os.mkfifo(told)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TOLD": str(told)}
    with subprocess.Popen([sys.executable, "-c", COMPILE, str(tmp_path)], env=environment) as it:
        compiling = os.pidfd_open(int(told.read_text()))
        assert not select.select([compiling], [], [], 0)[0]
        it.kill()
    ended = select.select([compiling], [], [], 20)[0]
    if not ended:
        signal.pidfd_send_signal(compiling, signal.SIGKILL)
    os.close(compiling)
    assert ended


def test_a_compilation_for_a_process_that_has_ended_does_not_begin() -> None:
    command = [sys.executable, "-m", "transport.kernels", str(os.getppid())]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 1
    assert "has ended" in done.stderr


def test_two_that_start_at_once_compile_once(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, waiting = threading.Event(), threading.Event()
    wait = threading.Event().wait

    def poll(seconds: float) -> None:
        waiting.set()
        wait(seconds)

    def meanwhile() -> None:
        compiling.set()
        assert waiting.wait(20)

    monkeypatch.setattr(cache.time, "sleep", poll)
    compiler.meanwhile = meanwhile
    found: list[Image] = []
    first = threading.Thread(target=lambda: found.append(compiler.get()))
    first.start()
    assert compiling.wait(20)
    found.append(compiler.get())
    first.join()
    assert found == [IMAGE, IMAGE]
    assert (compiler.runs, compiler.told) == (1, 2)


def test_the_death_of_the_one_that_compiles_is_survived(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

        def poll(_seconds: float) -> None:
            holder.kill()
            holder.wait()

        monkeypatch.setattr(cache.time, "sleep", poll)
        assert compiler.get() == IMAGE
    assert holder.returncode < 0
    assert compiler.runs == 1


def test_nobody_waits_for_ever(
    compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(cache, "LOCK_WAIT_S", 0.2)
    with cache._private_folder(folder) as held, cache._lock(held):
        assert compiler.get() == IMAGE
    assert compiler.runs == 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("echo no numba >&2; exit 3", r"exit code 3\): no numba"),
        ("exit 1", r"exit code 1\): it said nothing"),
        ("echo no image", r"exit code 0\): it said nothing"),
        ("kill -ABRT $$", r"exit code -6\)"),
    ],
)
def test_a_compilation_that_fails_says_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(cache.CompilationFailed, match=reason):
        cache.get_image(lambda: None)
    assert not list(folder.iterdir())
