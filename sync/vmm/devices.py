"""The vfio-user devices of a VMM as it knows them itself: which socket each has, and its place.

Owned here: what is asked, and how QEMU's answers are read. Changes nothing. QEMU does not let the
`socket` property be read, but names the device's memory regions after it
(hw/vfio-user/pci.c, system/memory.c: memory_region_escape_name).
"""

import re
from dataclasses import dataclass

from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmNotReady, VmmRefused
from sync.vmm.pci import find_devices, way_to

_REGION = re.compile(r"vfio-user:(?P<path>.+?) (?:base )?BAR \d+\[\d+\]\Z")
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class VmmDevice:
    """A vfio-user device; `path` is its QOM path."""

    path: str
    socket: str
    """The path of its socket as the VMM was given it; empty where the VMM does not tell."""
    place: str
    """Where it is plugged: the root bus, and slot and function of each bridge and of the device on
    the way down. The same before and after a migration. Empty where the VMM does not tell."""


async def list_devices(vmm: Vmm) -> tuple[VmmDevice, ...]:
    """The devices of `vmm`; none if it has no object model. Raises `VmmError`."""
    return tuple(
        [
            VmmDevice(path, await _socket(vmm, path), await _place(vmm, path))
            for path in await find_devices(vmm)
        ]
    )


async def _socket(vmm: Vmm, path: str) -> str:
    properties = await vmm.execute("qom-list", {"path": path})
    for item in properties if isinstance(properties, list) else ():
        match = _REGION.match(str(item.get("name")) if isinstance(item, dict) else "")
        if match:
            return _ESCAPED.sub(lambda code: chr(int(code[1], 16)), match["path"])
    return ""


async def _place(vmm: Vmm, path: str) -> str:
    try:
        way = await way_to(vmm, path)
    except (VmmRefused, VmmNotReady):
        return ""
    slots = [f"{devfn >> 3:02x}.{devfn & 7}" for devfn in reversed(way.devfns)]
    return f"{way.root_bus:02x}: {' '.join(slots)}"
