"""Whether this host has the memory that a guest needs, asked before anything is touched."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ferry.errors import LocalError
from sync.memory import PAGE_BYTES, MemoryRegion, page_bytes_of

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
HUGE_PAGES = Path("/sys/kernel/mm/hugepages")


def check_room(regions: list[MemoryRegion]) -> None:
    """Raises `LocalError` if the memory or file system behind the guest's RAM is too small.

    A page that cannot be allocated when it is first written is a SIGBUS, which no error handling
    survives, so this is asked before anything is touched.
    """
    missing: dict[int, int] = {}
    for fd in _one_of_each_file(regions):
        stat, room = os.fstat(fd), os.fstatvfs(fd)
        page_bytes = page_bytes_of(fd)
        lacking = max(0, stat.st_size - stat.st_blocks * 512)
        missing[page_bytes] = missing.get(page_bytes, 0) + lacking
        if page_bytes == PAGE_BYTES and room.f_blocks:
            free = room.f_bavail * room.f_frsize
            if free < lacking:
                raise LocalError(
                    f"the file behind the guest's memory needs {lacking >> 20} MiB more, its file "
                    f"system has {free >> 20} MiB: make room and try again"
                )
    for page_bytes, lacking in missing.items():
        if page_bytes == PAGE_BYTES:
            available, what = memory_available(), "memory"
        else:
            available, what = huge_pages_free(page_bytes), f"pages of {page_bytes >> 20} MiB"
        if lacking > available:
            raise LocalError(
                f"the guest needs {lacking >> 20} MiB more {what}, this host has "
                f"{available >> 20} MiB: make room and try again"
            )


def _one_of_each_file(regions: Iterable[MemoryRegion]) -> Iterable[int]:
    files: dict[tuple[int, int], int] = {}
    for region in regions:
        stat = os.fstat(region.fd)
        files.setdefault((stat.st_dev, stat.st_ino), region.fd)
    return files.values()


def memory_available() -> int:
    """Bytes that could be given to this process and its like without swapping, as the kernel says:
    what the host has, and what the limits of our control groups leave of it."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min([int(line.split()[1]) << 10, *_left_by_groups()])
    raise LocalError(f"{MEMINFO} does not tell how much memory is available")


def huge_pages_free(page_bytes: int) -> int:
    """Bytes in huge pages of this size that nobody has taken; those that a VMM has reserved for its
    guest, and not touched yet, are among them."""
    try:
        count = int((HUGE_PAGES / f"hugepages-{page_bytes >> 10}kB/free_hugepages").read_text())
    except (OSError, ValueError):
        return 0
    return count * page_bytes


def _left_by_groups() -> Iterator[int]:
    """What the limit of each control group that we are in leaves; those of version 1, too.

    What is only cached counts as free: it goes before anybody is killed.
    """
    try:
        lines = CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUP_ROOT, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = CGROUP_ROOT / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the path may be the host's, of which only the root is to be seen.
        for folder in {group, *group.parents, root}:
            if folder == root or root in folder.parents:
                yield from _left_by(folder, *names)


def _left_by(folder: Path, limit: str, usage: str) -> Iterator[int]:
    try:
        most = int((folder / limit).read_text())  # "max" is no number
        used = int((folder / usage).read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        statistics = {row[0]: int(row[1]) for row in rows}
    except (OSError, ValueError, IndexError):
        return
    cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    yield max(0, most - used + cached)
