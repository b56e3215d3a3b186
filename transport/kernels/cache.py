"""Where the image of the kernels comes from: a file of this user's cache, or a compilation.

The file's name is a digest of all that the code depends on, so hosts that share a home directory
have a file each, and whatever changes makes a new one. Code is run from a file only if it, and the
folder that it is in, belong to this user and nobody else may write to them; any other one, and any
damaged one, is as good as none. Where a file cannot be kept, each process compiles for itself.

One process at a time compiles; the others wait for its result. They wait for a lock that the kernel
releases when its holder dies, and no longer than a compilation takes.

Who puts an image there removes those that nobody has used for long. A process that finds its image
gone compiles.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from transport.kernels.image import Image
from transport.user_cache import default_cache
from transport.wire.errors import TransportError

MAX_IMAGE_BYTES: Final = 16 << 20
LOCK_WAIT_S: Final = 60.0
UNUSED_S: Final = 30 * 86400.0
"""What nobody has taken from the cache for so long may go: a new version has taken its place."""
MARK_S: Final = 86400.0
"""A file says by its time of change when it was used, as exactly as this."""
MAX_LOOKED_AT: Final = 1000
"""Files, when old ones are removed."""
_OURS: Final = re.compile(r"[0-9a-f]{32}\.image|\.[0-9a-f]{32}\.image\.[0-9]+")
"""An image, or one that was being written when its writer died."""
_LOCK_POLL_S: Final = 0.05
_HERE = Path(__file__).parent
SOURCES: Final = (*sorted(_HERE.glob("*.py")), _HERE.parent / "wire" / "frames.py")
"""What the code is made from: this room, and the file that its constants come from."""


class CompilationFailed(TransportError):
    """The kernels are not in the cache and could not be compiled."""

    exit_name = "local"


def get_image(missing: Callable[[], None]) -> Image:
    """The image of all kernels for this machine. Calls `missing` if the cache does not hold it.

    Raises `CompilationFailed`.
    """
    name = f"{_key()}.image"
    with _private_folder(default_cache() / "kernels") as folder:
        image = _read(folder, name)
        if image is not None:
            return image
        missing()
        with _lock(folder):
            image = _read(folder, name)
            if image is None:
                image = _compile()
                _write(folder, name, image)
                _remove_unused(folder)
            return image


def _key() -> str:
    """Of the sources, the compiler, the interpreter, NumPy, and the processor."""
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in SOURCES]
    parts += [_version_of("numba"), _version_of("llvmlite"), sys.version, np.__version__]
    parts += sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NUMBA_"))
    parts += processor()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _version_of(package: str) -> str:
    """What a package says of its version, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    with suppress(OSError):
        return (Path(spec.origin).parent / "_version.py").read_text()
    return ""


def processor() -> list[str]:
    """Lines of /proc/cpuinfo that tell what the first processor is and has."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags")
    return [line for line in first.splitlines() if line.startswith(wanted)]


@contextmanager
def _private_folder(path: Path) -> Iterator[int | None]:
    """A descriptor of the folder, made if need be; None if it is not this user's alone."""
    folder = None
    try:
        with suppress(OSError):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        yield folder if folder is not None and _is_private(folder) else None
    finally:
        if folder is not None:
            os.close(folder)


def _is_private(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _read(folder: int | None, name: str) -> Image | None:
    """The image in this file; None if there is none that may be used."""
    if folder is None:
        return None
    try:
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
            if not _is_private(file.fileno()):
                return None
            _mark_used(file.fileno())
            return Image.from_bytes(file.read(MAX_IMAGE_BYTES))
    except (OSError, ValueError):
        return None


def _mark_used(descriptor: int) -> None:
    with suppress(OSError):
        if time.time() - os.fstat(descriptor).st_mtime > MARK_S:
            os.utime(descriptor)


def _remove_unused(folder: int | None) -> None:
    """As far as that is possible: it is no reason not to start."""
    if folder is None:
        return
    with suppress(OSError), os.scandir(folder) as files:
        for file in islice(files, MAX_LOOKED_AT):
            with suppress(OSError):
                age_s = time.time() - file.stat(follow_symlinks=False).st_mtime
                if _OURS.fullmatch(file.name) and age_s > UNUSED_S:
                    os.unlink(file.name, dir_fd=folder)


def _write(folder: int | None, name: str, image: Image) -> None:
    """Put it there, whole or not at all."""
    if folder is None:
        return
    new = f".{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with suppress(OSError):
        try:
            with os.fdopen(os.open(new, flags, mode=0o600, dir_fd=folder), "wb") as file:
                file.write(image.to_bytes())
            os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(new, dir_fd=folder)
            raise


@contextmanager
def _lock(folder: int | None) -> Iterator[None]:
    """Held by one process at a time, as far as that is possible; nobody waits for ever."""
    if folder is None:
        yield
        return
    deadline = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(_LOCK_POLL_S)
        except OSError:  # a file system without locks
            break
    yield  # closing the folder releases it


def _compile() -> Image:
    """In a process of its own: this one neither needs the compiler's memory nor waits for the GIL.

    Raises `CompilationFailed`.
    """
    command = [sys.executable, "-P", "-m", "transport.kernels", str(os.getpid())]
    path = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode == 0:
        with suppress(ValueError):
            return Image.from_bytes(done.stdout)
    said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    raise CompilationFailed(
        f"the kernels cannot be compiled (exit code {done.returncode}): {said[-1]}"
    )
