"""Files that the target's VMM maps only once the guest is there: ivshmem-plain, virtio-mem."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from ferry.errors import Mismatch
from ferry.migration.late_memory import LateMemory, check_late_files, stand_ins
from ferry.migration.memory_layout import MemoryLayout, late_files, same_pages
from sync.memory import GuestMemory, GuestMemoryError, MemoryRegion
from sync.vmm.errors import VmmRefused

PAGE = 4096
MIB = 1 << 20
RAM, SHARED, PLUGGED = 4 * MIB, 1 * MIB, 2 * MIB


class Host:
    """A VMM and its gateway: `present` are the files that regions lie in."""

    def __init__(self) -> None:
        self.files = {name: os.memfd_create(name) for name in ("ram", "shared", "plugged")}
        for name, size in (("ram", RAM), ("shared", SHARED), ("plugged", PLUGGED)):
            os.ftruncate(self.files[name], size)
        self.present = ["ram"]
        self.backends: Any = [{"size": size, "share": True} for size in (RAM, SHARED, PLUGGED)]

    def regions(self) -> list[MemoryRegion]:
        rows = {
            "ram": [(0, 640 << 10, 0), (MIB, 3 * MIB, MIB)],
            "plugged": [(16 * MIB, PAGE * 16, PAGE * 8)],
            "shared": [(32 * MIB, SHARED, 0)],
        }
        return [
            MemoryRegion(iova, length, offset, True, self.files[name], PAGE)
            for name in self.present
            for iova, length, offset in rows[name]
        ]

    async def memory(self) -> list[MemoryRegion]:
        return [region._replace(fd=os.dup(region.fd)) for region in self.regions()]

    async def execute(self, command: str) -> Any:
        assert command == "query-memdev"
        if isinstance(self.backends, Exception):
            raise self.backends
        return self.backends

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


@pytest.fixture
def hosts() -> Iterator[tuple[Any, Any]]:
    source, target = Host(), Host()
    source.present = ["ram", "shared", "plugged"]
    with contextlib.closing(source), contextlib.closing(target):
        yield source, target


def test_a_file_that_is_not_mapped_yet_has_to_be_there(hosts: tuple[Any, Any]) -> None:
    source, target = hosts
    theirs = MemoryLayout.of(source.regions())
    assert [theirs.files[file] for file in late_files(theirs, target.regions())] == [
        PLUGGED,
        SHARED,
    ]
    trio.run(check_late_files, target, target, theirs)
    shared = [{"size": RAM, "share": True}, {"size": SHARED, "share": True}]
    for backends in (
        shared,
        [*shared, {"size": PLUGGED, "share": False}],
        [*shared, {"size": RAM, "share": True}],
        VmmRefused("query-memdev", "CommandNotFound", "no such command"),
    ):
        target.backends = backends
        with pytest.raises(Mismatch, match="2 MiB of the source's memory have no place"):
            trio.run(check_late_files, target, target, theirs)
    target.present = ["ram", "plugged", "shared"]
    trio.run(check_late_files, target, target, theirs)


def test_what_is_mapped_has_to_be_the_same(hosts: tuple[Any, Any]) -> None:
    source, target = hosts
    theirs = MemoryLayout.of(source.regions())
    with pytest.raises(Mismatch):
        late_files(theirs, [])
    os.ftruncate(target.files["ram"], 2 * RAM)
    with pytest.raises(Mismatch):
        late_files(theirs, target.regions())
    os.ftruncate(target.files["ram"], RAM)
    more = MemoryRegion(64 * MIB, PAGE, 0, True, target.files["shared"], PAGE)
    with pytest.raises(Mismatch):
        late_files(theirs, [*target.regions(), more])
    one_for_two = more._replace(iova=16 * MIB, offset=PAGE * 8, fd=target.files["ram"])
    with pytest.raises(Mismatch):
        late_files(theirs, [*target.regions(), one_for_two])


def test_pages_that_came_before_the_guest_are_where_they_belong(hosts: tuple[Any, Any]) -> None:
    source, target = hosts
    theirs = MemoryLayout.of(source.regions())
    files = stand_ins(theirs, target.regions())
    with pytest.raises(Mismatch):
        same_pages(theirs, target.regions())
    pages = same_pages(theirs, target.regions(), files)
    with GuestMemory.map(pages, writable=True, passing=set(files.values())) as memory:
        assert len(memory.files) == 2, "what is replaced is written by its mapping alone"
        late = LateMemory(target, theirs, memory, files)

        def page(iova: int) -> Any:
            at = memory.page_of(iova) * PAGE
            return memory.array[at : at + PAGE]

        page(32 * MIB + 3 * PAGE)[:] = 1
        page(16 * MIB)[:] = 2
        page(MIB)[:] = 3
        # The VMM loads its stream, of which these pages are older or not the device's.
        os.pwrite(target.files["shared"], b"\7" * 2 * PAGE, 3 * PAGE)
        with pytest.raises(Mismatch):
            trio.run(late.arrive)
        target.present = ["plugged", "ram", "shared"]
        trio.run(late.arrive)
        assert os.pread(target.files["shared"], PAGE, 3 * PAGE) == b"\1" * PAGE
        assert os.pread(target.files["shared"], PAGE, 4 * PAGE) == b"\7" * PAGE, "not ours"
        assert os.pread(target.files["plugged"], PAGE, 8 * PAGE) == b"\2" * PAGE
        assert os.pread(target.files["ram"], PAGE, MIB) == b"\3" * PAGE
        page(32 * MIB + PAGE)[:] = 9
        assert os.pread(target.files["shared"], PAGE, PAGE) == b"\t" * PAGE, "from now on, at once"
        trio.run(late.arrive)
        late.close()


def test_a_region_is_replaced_by_its_like_only(hosts: tuple[Any, Any]) -> None:
    source, _ = hosts
    with GuestMemory.map(source.regions(), writable=True) as memory:
        shared = source.regions()[-2]
        with pytest.raises(GuestMemoryError):
            memory.replace(shared._replace(length=shared.length - PAGE))
        with pytest.raises(GuestMemoryError):
            memory.replace(shared._replace(offset=shared.offset + 64 * MIB))
