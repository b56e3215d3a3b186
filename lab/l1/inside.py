"""Runs in the emulated host: `vfio-ferry demo` on its functions, once for each kind of device.

The arguments are kinds, and `--json`. The exit code is that of the first demonstration that fails.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lab.l1 import forked
from sync.vfio.sysfs import PciFunction, host_functions
from transport.user_cache import CACHE_VARIABLE, default_cache

LOAD: dict[str, Any] = {
    "memory": 80 << 20,
    "iops": 40,
    "operations": 300,
    "queue_depth": 7,
    "downtime_limit": 10_000,
}
"""Of the small guest: more would leave no processor to the rest, which takes its time, too."""
LINUX_BYTES = 192 << 20
IDENTITIES = {"nvme": (0x1B36, 0x0010), "virtio": (0x1AF4, 0x1042)}
"""Vendor and device of QEMU's, by kind."""


def functions(kind: str) -> list[PciFunction]:
    """The two functions of this host that serve the same disk."""
    views = ((each, each.view()) for each in host_functions())
    return [each for each, view in views if (view.vendor, view.device) == IDENTITIES[kind]]


def take_kernels() -> None:
    """A folder of compiled kernels that is root's, whoever has compiled them."""
    from transport.kernels.cache import digest

    name = f"kernels-{digest()}"
    own = Path(tempfile.mkdtemp())
    shutil.copytree(default_cache() / name, own / name)
    os.environ[CACHE_VARIABLE] = str(own)


def main(words: list[str]) -> int:
    for kind in (word for word in words if word != "--json"):
        print(f"--- {kind} ---", flush=True)
        device, _, linux = kind.partition("-")
        common: dict[str, Any] = {
            "device": device,
            "function": tuple(each.address for each in functions(device)),
            "json": "--json" in words,
        }
        code = _with_linux(common) if linux else _with_small_guest(common)
        if code:
            return code
    return 0


def _with_small_guest(common: dict[str, Any]) -> int:
    forked.prepare()
    from lab import demo

    return demo.run(demo.Options(**common, **LOAD), forked.Forked)


def _with_linux(common: dict[str, Any]) -> int:
    from lab.qemu import demo

    cache = str(default_cache())
    take_kernels()
    return demo.run(demo.Options(**common, memory=LINUX_BYTES, writes=20, cache=cache))
