"""Whether this host has the memory that a guest needs, asked before anything is touched."""

import os
from pathlib import Path

from ferry.errors import (
    LocalError,
)
from sync.memory import MemoryRegion


def check_room(regions: list[MemoryRegion]) -> None:
    """Raises `LocalError` if the memory or file system behind the guest's RAM is too small.

    A page that cannot be allocated when it is first written is a SIGBUS, which no error handling
    survives, so this is asked before anything is touched.
    """
    for region in regions:
        stat, room = os.fstat(region.fd), os.fstatvfs(region.fd)
        missing = max(0, stat.st_size - stat.st_blocks * 512)
        if room.f_blocks and room.f_bavail * room.f_frsize < missing:
            raise LocalError(
                f"the file behind the guest's memory needs {missing >> 20} MiB more, its file "
                f"system has {room.f_bavail * room.f_frsize >> 20} MiB: make room and try again"
            )
    files = {(os.fstat(r.fd).st_dev, os.fstat(r.fd).st_ino): os.fstat(r.fd) for r in regions}
    missing = sum(max(0, stat.st_size - stat.st_blocks * 512) for stat in files.values())
    available = memory_available()
    if missing > available:
        raise LocalError(
            f"the guest needs {missing >> 20} MiB more memory, this host has "
            f"{available >> 20} MiB: make room and try again"
        )


def memory_available() -> int:
    """Bytes that this host could give to new processes without swapping, as the kernel says."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise LocalError("/proc/meminfo does not tell how much memory is available")
