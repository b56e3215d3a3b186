"""Kernel modules in the order in which they load, uncompressed.

Reads what depmod(8) wrote: `modules.dep` (`path: path path ...`) and `modules.builtin`. Knows
nothing of what a module is for.
"""

import gzip
import lzma
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from lab.qemu.errors import GuestImageError

MAX_MODULE_BYTES = 64 << 20
"""The largest module of a Debian kernel has 10 MiB."""

_SUFFIX = re.compile(r"\.ko(\.(xz|gz|zst))?$")


def module_name(path: str) -> str:
    """`virtio_blk` for `kernel/drivers/block/virtio-blk.ko.xz`: the kernel knows no hyphens."""
    return _SUFFIX.sub("", PurePosixPath(path).name).replace("-", "_")


def parse_dependencies(text: str) -> dict[str, list[str]]:
    """Path of each module -> paths of all it needs, in the order of `modules.dep`.

    Raises `GuestImageError` for a line that is not of that form.
    """
    dependencies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        path, colon, needed = line.partition(":")
        if not colon or not path.strip():
            raise GuestImageError(f"modules.dep has a line that makes no sense: {line[:80]!r}")
        dependencies[path.strip()] = needed.split()
    return dependencies


def load_order(
    names: Iterable[str], dependencies: dict[str, list[str]], builtin: Iterable[str] = ()
) -> list[str]:
    """The paths of `names` and of all they need, each behind everything it needs itself.

    A name in `builtin` (paths as in `modules.builtin`) needs no loading. Raises `GuestImageError`
    for an unknown name or a cycle.
    """
    paths = {module_name(path): path for path in dependencies}
    present = {module_name(path) for path in builtin}
    order: list[str] = []
    under_way: set[str] = set()

    def visit(path: str) -> None:
        if path in order:
            return
        if path not in dependencies:
            raise GuestImageError(f"modules.dep does not list {path}, which another module needs")
        if path in under_way:
            raise GuestImageError(f"modules.dep has a cycle through {path}")
        under_way.add(path)
        for needed in dependencies[path]:
            visit(needed)
        order.append(path)

    for name in names:
        key = name.replace("-", "_")
        if key in paths:
            visit(paths[key])
        elif key not in present:
            raise GuestImageError(f"the kernel has no module {name}")
    return order


def read_order(folder: Path, names: Iterable[str]) -> list[str]:
    """`load_order` of the modules below `folder`, which depmod has seen."""
    try:
        dependencies = parse_dependencies((folder / "modules.dep").read_text(encoding="utf-8"))
        builtin = (folder / "modules.builtin").read_text(encoding="utf-8").split()
    except OSError as error:
        raise GuestImageError(f"cannot read the kernel's list of modules: {error}") from error
    return load_order(names, dependencies, builtin)


def read_module(path: Path) -> bytes:
    """The module in `path`, uncompressed. Raises `GuestImageError`."""
    try:
        if path.suffix == ".ko":
            content = path.read_bytes()
        elif path.suffix == ".xz":
            with lzma.open(path) as file:
                content = file.read(MAX_MODULE_BYTES + 1)
        elif path.suffix == ".gz":
            with gzip.open(path) as file:
                content = file.read(MAX_MODULE_BYTES + 1)
        else:
            raise GuestImageError(f"{path} is compressed in a way that is not known here")
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise GuestImageError(f"cannot read {path}: {error}") from error
    if len(content) > MAX_MODULE_BYTES:
        raise GuestImageError(f"{path} is larger than any kernel module")
    return content
