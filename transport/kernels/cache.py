"""The folder that numba keeps the compiled kernels in.

Its name has a digest of all that the code depends on: whatever changes makes a new one, and hosts
that share a home have one each. What is in it is run as code, so it is used only if it is this
user's and nobody else may enter it. It is named to numba by a descriptor, not by its path: whoever
may rename a folder on that path could put another one in its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np

from transport.private_path import why_not_private
from transport.user_cache import default_cache

UNUSED_S: Final = 30 * 86400.0
"""A folder that no process has used for so long is removed: a new version has taken its place."""
TURN_S: Final = 60.0
"""For so long a process waits for another one that compiles: no compilation takes longer."""
_POLL_S: Final = 0.1
_config: Final[Any] = numba.config  # what numba sets there has no types
_OURS: Final = re.compile(r"kernels-[0-9a-f]{32}")
_HERE = Path(__file__).parent
SOURCES: Final = (*sorted(_HERE.glob("*.py")), _HERE.parent / "wire" / "frames.py")
"""What the code is made from: this room, and the file that its constants come from."""


@dataclass(frozen=True)
class Folder:
    """Where compiled kernels are kept."""

    path: Path | None
    """None: nowhere, each process compiles for itself."""
    why_not: str = ""
    """Why there is none."""
    descriptor: int = -1

    def is_complete(self) -> bool:
        """Whether `mark_complete` was called for it."""
        return self.path is not None and (self.path / "complete").exists()

    def wait_for_turn(self) -> None:
        """Return when no other process compiles to it, or after `TURN_S`: two may do no harm.

        The turn lasts until the folder is closed, or its process dies.
        """
        deadline = time.monotonic() + TURN_S
        while self.path is not None and time.monotonic() < deadline:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_S)
            except OSError:
                return  # a file system without locks
            else:
                return

    def mark_complete(self) -> None:
        """All kernels are in it."""
        if self.path is not None:
            with suppress(OSError):
                (self.path / "complete").touch()


@contextmanager
def open_folder() -> Iterator[Folder]:
    """The folder, made if need be, for as long as the context lasts."""
    try:
        descriptor = _open(default_cache() / f"kernels-{digest()}")
    except OSError as error:
        told = error.strerror
        why_not = f"{error.filename}: {told}" if told and error.filename else str(error)
    else:
        try:
            yield Folder(Path(f"/proc/self/fd/{descriptor}"), "", descriptor)
        finally:
            os.close(descriptor)
        return
    yield Folder(None, why_not)


def digest() -> str:
    """Of the sources and where they are, the compiler, the interpreter, NumPy, the processor."""
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in SOURCES]
    parts += [str(_HERE), numba.__version__, llvmlite.__version__, np.__version__, sys.version]
    parts += sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NUMBA_"))
    parts += processor()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def processor() -> list[str]:
    """What numba compiles for: the processor's name and its features, as far as LLVM knows them;
    or what $NUMBA_CPU_NAME and $NUMBA_CPU_FEATURES say, as for a machine that is emulated here."""
    features: str | None = _config.CPU_FEATURES
    if features is None:
        try:
            features = llvm.get_host_cpu_features().flatten()
        except RuntimeError:
            features = ""
    return [_config.CPU_NAME or llvm.get_host_cpu_name(), features]


def _open(path: Path) -> int:
    """A descriptor of this folder, made if need be, and marked as used.

    Raises OSError if it cannot be had, or is not this user's alone.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    else:
        _remove_unused(path.parent)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(f"{path} has to be this user's, and closed to all others")
        if why_not := why_not_private(path):
            raise PermissionError(why_not)
        os.utime(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_unused(parent: Path) -> None:
    """As far as that is possible: it is no reason not to start."""
    with suppress(OSError):
        for path in parent.iterdir():
            status = path.lstat()
            if (
                _OURS.fullmatch(path.name)
                and stat.S_ISDIR(status.st_mode)
                and time.time() - status.st_mtime > UNUSED_S
            ):
                shutil.rmtree(path, ignore_errors=True)
