"""A QEMU that can be used, and a Debian kernel, modules and programs for a guest.

Looks for QEMU on the machine first. What is missing is made once, from Debian packages
(`lab.qemu.packages`), in a cache folder:

    CACHE/downloads/                package lists and files; deleted once a folder is complete
    CACHE/debian-DIGEST/            complete, or not there: it is renamed into place
        bin/qemu-system-x86_64      starts the folder's QEMU from outside
        root/                       the unpacked packages
        packages                    one package file name on each line

DIGEST is of the recipe, so another recipe makes another folder. A program of the folder is run
through the folder's own dynamic loader (ld.so(8)), so that it sees the host's files, sockets and
devices and needs neither chroot nor root.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ferry.doctor.qemu_program import QEMU_PROGRAM, Qemu, find_qemu, probe
from ferry.errors import QemuMissing
from lab.qemu import packages
from lab.qemu.errors import EnvironmentFailed
from lab.qemu.packages import Progress, Recipe
from transport.user_cache import default_cache

SUITE = "trixie"
"""Debian 13: its backports hold a QEMU with vfio-user-pci."""
GUEST_PACKAGES = ("linux-image-amd64", "busybox-static", "e2fsprogs", "kmod")
QEMU_PACKAGES = ("qemu-system-x86",)
QEMU_SOURCES = ("qemu", "seabios", "ipxe")
MIRROR_VARIABLE = "VFIO_FERRY_DEBIAN_MIRROR"

_LAYOUT = "1"
"""Part of the folder's digest: changes with what this file puts into a folder."""
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LOADER = f"{_LIBRARIES}/ld-linux-x86-64.so.2"
_TOOL_DEADLINE_S = 300.0

_LAUNCHER = f"""#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")/root
exec "$root/{_LOADER}" --library-path "$root/{_LIBRARIES}" "$root/usr/bin/{QEMU_PROGRAM}" \\
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """What it takes to run a guest."""

    qemu: Qemu
    root: Path
    """A folder of unpacked Debian packages: where the guest's programs come from."""
    kernel: Path
    """A bootable kernel image."""
    modules: Path
    """That kernel's modules: the folder that holds `modules.dep`."""
    loader: Path
    """The dynamic loader of `root`."""

    @property
    def busybox(self) -> Path:
        return self.root / "usr/bin/busybox"

    @property
    def libraries(self) -> Path:
        """Where the programs of `root` find their shared libraries."""
        return self.root / _LIBRARIES


def cached(cache: Path | None = None) -> Environment | None:
    """The environment if it is complete already. Downloads nothing."""
    qemu, recipe = _plan()
    folder = _folder(cache or default_cache(), recipe)
    return _open(folder, qemu) if folder.is_dir() else None


def prepare(
    progress: Progress, *, cache: Path | None = None, mirror: str | None = None
) -> Environment:
    """The environment, made where it is not there yet: some 150 MB to download, 300 MB on disk.

    `progress` gets one line of text for each step. `mirror` is the URI of a Debian archive; by
    default $VFIO_FERRY_DEBIAN_MIRROR or the one of the host's apt. Raises `QemuMissing` where
    none can be made, `EnvironmentFailed` where making it failed; a second call takes up where
    the first one was.
    """
    cache = cache or default_cache()
    qemu, recipe = _plan()
    progress(
        f"found QEMU {qemu.version_text} in {qemu.program}"
        if qemu
        else f"no usable QEMU in $PATH, taking one from Debian {SUITE}-backports"
    )
    folder = _folder(cache, recipe)
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _lock(cache / "lock", progress):
                if not folder.is_dir():
                    _make(folder, recipe, mirror, progress)
        except OSError as error:
            raise EnvironmentFailed(f"cannot make {folder}: {error}") from error
    environment = _open(folder, qemu)
    progress(f"ready: QEMU {environment.qemu.version_text}, Linux {environment.modules.name}")
    return environment


def libraries_of(environment: Environment, program: Path) -> list[Path]:
    """The shared libraries that a program of `environment.root` needs, with those they need."""
    output = _tool(environment.loader, "--library-path", environment.libraries, "--list", program)
    found = [Path(line.split("=>")[1].split()[0]) for line in output.splitlines() if "=>" in line]
    return sorted(path for path in found if path.is_relative_to(environment.root))


def _plan() -> tuple[Qemu | None, Recipe]:
    """The QEMU of this machine, if it can be used, and what has to be made beside it."""
    try:
        qemu = find_qemu()
    except QemuMissing:
        qemu = None
    return qemu, Recipe(
        suite=SUITE,
        packages=GUEST_PACKAGES if qemu else GUEST_PACKAGES + QEMU_PACKAGES,
        pinned=() if qemu else QEMU_SOURCES,
        # lab.qemu.initramfs builds the initramfs.
        assumed=("linux-initramfs-tool",),
    )


def _folder(cache: Path, recipe: Recipe) -> Path:
    digest = hashlib.sha256(f"{_LAYOUT} {recipe}".encode()).hexdigest()[:12]
    return cache / f"debian-{digest}"


def _make(folder: Path, recipe: Recipe, mirror: str | None, progress: Progress) -> None:
    packages.require_tools()
    mirror = mirror or os.environ.get(MIRROR_VARIABLE) or packages.host_mirror()
    downloads = folder.parent / "downloads"
    for abandoned in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(abandoned)
    files = packages.download(recipe, mirror, downloads, progress)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        root = building / "root"
        packages.unpack(files, root, progress)
        (building / "packages").write_text("".join(f"{path.name}\n" for path in files))
        progress("resolving the dependencies of the kernel's modules")
        release = _kernel(root).name.removeprefix("vmlinuz-")
        loader: list[str | Path] = [root / _LOADER, "--library-path", root / _LIBRARIES]
        _tool(*loader, "--argv0", "depmod", root / "usr/bin/kmod", "-b", root, release)
        if set(QEMU_PACKAGES) <= set(recipe.packages):
            _write_launcher(building / "bin" / QEMU_PROGRAM)
            probe(building / "bin" / QEMU_PROGRAM)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(downloads, ignore_errors=True)


def _write_launcher(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(_LAUNCHER)
    path.chmod(0o755)


def _open(folder: Path, qemu: Qemu | None) -> Environment:
    root = folder / "root"
    kernel = _kernel(root)
    return Environment(
        qemu=qemu or probe(folder / "bin" / QEMU_PROGRAM),
        root=root,
        kernel=kernel,
        modules=root / "usr/lib/modules" / kernel.name.removeprefix("vmlinuz-"),
        loader=root / _LOADER,
    )


def _kernel(root: Path) -> Path:
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise EnvironmentFailed(f"{root}/boot has to hold one kernel; delete {root.parent}")
    return kernels[0]


def _tool(*arguments: str | Path) -> str:
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TOOL_DEADLINE_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFailed(f"{arguments[0]} failed: {error}") from error
    if done.returncode:
        raise EnvironmentFailed(f"{arguments[-1]}: {done.stderr.strip()[-1000:]}")
    return done.stdout


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Held by one process at a time; released by the kernel should it die."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is making the environment, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
