"""A target without room for the guest says so before anything is touched."""

import os
from pathlib import Path

import pytest

from ferry import host_memory
from ferry.errors import Exit, LocalError
from sync.memory import MemoryRegion

MIB = 1 << 20


def region(length: int) -> MemoryRegion:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return MemoryRegion(0, length, 0, True, fd)


def test_memory_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = region(64 * MIB)
    monkeypatch.setattr(host_memory, "memory_available", lambda: 63 * MIB)
    with pytest.raises(LocalError, match="64 MiB more memory, this host has 63 MiB") as refused:
        host_memory.check_room([guest])
    assert refused.value.exit_code is Exit.LOCAL
    monkeypatch.setattr(host_memory, "memory_available", lambda: 64 * MIB)
    host_memory.check_room([guest])


def test_pages_that_are_there_already_are_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = region(8 * MIB)
    os.pwrite(guest.fd, bytes(6 * MIB), 0)
    monkeypatch.setattr(host_memory, "memory_available", lambda: 2 * MIB)
    host_memory.check_room([guest, guest._replace(iova=1 << 32)])


def test_a_file_system_that_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "ram").open("w+b") as ram:
        ram.truncate(64 * MIB)
        full = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "fstatvfs", lambda _: full)
        with pytest.raises(LocalError, match="make room"):
            host_memory.check_room([MemoryRegion(0, 64 * MIB, 0, True, ram.fileno())])


def test_this_host_tells_how_much_is_available() -> None:
    assert host_memory.memory_available() > 0


CONTAINERS = {
    "version 2": ("0::/\n", "", ("memory.max", "memory.current"), "inactive_file"),
    "version 2, inside": ("0::/vm/one\n", "vm", ("memory.max", "memory.current"), "inactive_file"),
    "version 1": (
        "4:memory:/vm\n0::/\n",
        "memory/vm",
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
    "version 1, of the host": (
        "4:cpu,memory:/host/path\n",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_containers_limit_bounds_what_is_available(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines, folder, names, cached = CONTAINERS[kind]
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1048576 kB\n")
    (tmp_path / "cgroup").write_text(lines)
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "CGROUP_ROOT", tmp_path / "groups")
    assert host_memory.memory_available() == 1 << 30
    for name, value in zip((*names, "memory.stat"), ("max", "5", "x"), strict=True):
        (group / name).write_text(value)
    assert host_memory.memory_available() == 1 << 30, "without a limit"
    for name, n_bytes in zip(names, (300 * MIB, 260 * MIB), strict=True):
        (group / name).write_text(f"{n_bytes}\n")
    (group / "memory.stat").write_text(f"anon 7\n{cached} {10 * MIB}\n")
    assert host_memory.memory_available() == 50 * MIB
    (group / names[1]).write_text(f"{400 * MIB}\n")
    assert host_memory.memory_available() == 0
