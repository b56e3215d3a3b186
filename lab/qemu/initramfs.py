"""The guest's initramfs: busybox, the kernel's own modules, ext4's tools and the load.

Owns what is in the image. The scripts are in `guest/`, the format in `cpio.py`, the order of the
modules in `modules.py`. The image is not compressed, since unpacking takes longer than reading
it when the guest's processor is emulated.
"""

import importlib.resources
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.qemu.cpio import CpioArchive
from lab.qemu.environment import Environment, libraries_of
from lab.qemu.errors import GuestImageError
from lab.qemu.modules import read_module, read_order
from transport.user_cache import default_cache

MODULES = ("virtio_pci", "virtio_blk", "nvme", "crc32c_generic", "ext4", "e1000")
"""ext4 asks for crc32c by name, which modules.dep does not know."""
PROGRAMS = {"sbin/mkfs.ext4": "usr/sbin/mke2fs", "sbin/fsck.ext4": "usr/sbin/e2fsck"}
"""Path in the guest -> path in the environment's root."""
WORKLOADS = ("disk", "express", "idle", "net")
FOLDERS = ("bin", "dev", "mnt", "proc", "run", "sys", "tmp")

_GUEST_LIBRARIES = "lib/x86_64-linux-gnu"
_GUEST_LOADER = "lib64/ld-linux-x86-64.so.2"


def build_initramfs(
    environment: Environment,
    *,
    modules: Sequence[str] = MODULES,
    workloads: Mapping[str, str] | None = None,
) -> bytes:
    """The image. `workloads` are shell scripts by name, besides the ones of this package; the
    kernel command line chooses (`ferry.workload=disk,NAME`).

    Raises `GuestImageError` when something that belongs into it is missing.
    """
    archive = CpioArchive()
    for folder in FOLDERS:
        archive.add_folder(folder)
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("bin/busybox", _read(environment.busybox), 0o755)
    archive.add_file("init", _script("init"), 0o755)
    archive.add_file("lib/ferry.sh", _script("ferry"))
    scripts = {name: _script(name) for name in WORKLOADS}
    scripts |= {name: text.encode() for name, text in (workloads or {}).items()}
    for name, script in scripts.items():
        archive.add_file(f"workloads/{name}", script)
    _add_modules(archive, environment, modules)
    _add_programs(archive, environment)
    return archive.finish()


def cached_initramfs(environment: Environment, cache: Path | None = None) -> Path:
    """The image of this version in the folder `cache`, by default where the environment is."""
    path = (cache or default_cache()) / "initramfs.cpio"
    write_initramfs(path, build_initramfs(environment))
    return path


def write_initramfs(path: Path, image: bytes) -> None:
    """Puts `image` into `path` at once: a reader sees the old image or the new one."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(image)
            Path(temporary).rename(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise GuestImageError(f"cannot write {path}: {error}") from error


def _add_modules(archive: CpioArchive, environment: Environment, names: Sequence[str]) -> None:
    order = []
    for path in read_order(environment.modules, names):
        name = Path(path).name.split(".ko")[0] + ".ko"
        order.append(name)
        archive.add_file(f"lib/modules/{name}", read_module(environment.modules / path))
    archive.add_file("lib/modules/order", "".join(f"{name}\n" for name in order).encode())


def _add_programs(archive: CpioArchive, environment: Environment) -> None:
    libraries: dict[str, Path] = {}
    for inside, outside in PROGRAMS.items():
        program = environment.root / outside
        archive.add_file(inside, _read(program), 0o755)
        libraries |= {path.name: path for path in libraries_of(environment, program)}
    loader = libraries.pop(Path(_GUEST_LOADER).name, environment.loader)
    archive.add_file(_GUEST_LOADER, _read(loader), 0o755)
    for name, path in sorted(libraries.items()):
        archive.add_file(f"{_GUEST_LIBRARIES}/{name}", _read(path), 0o755)


def _script(name: str) -> bytes:
    return importlib.resources.files("lab.qemu").joinpath(f"guest/{name}.sh").read_bytes()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GuestImageError(f"the guest needs {path}: {error}") from error
