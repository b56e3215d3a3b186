"""Guest RAM in huge pages: QEMU's regions neither begin nor end at them.

Needs pages that the machine lets be reserved (`/proc/sys/vm/nr_hugepages`), which are given back.
"""

import ctypes
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ferry import host_memory
from ferry.errors import LocalError, Mismatch
from ferry.migration.memory_layout import MemoryLayout, same_pages
from lab.devices.memory import GuestMemory as DeviceMemory
from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.dma import AtDevice, DmaMemory
from sync.memory import GuestMemory, GuestMemoryError, MemoryRegion, Slots, page_bytes_of
from sync.vfio.device import VfioDevice
from sync.vfio.guest_memory import PinnedMemory
from sync.vfio.sysfs import PciFunction
from sync.vfio_user.protocol import DmaMap
from tests.sync.vfio.fake_kernel import FakeKernel, FakeSysfs

PAGE, HUGE = 4096, 2 << 20
SIZE = 4 * HUGE
KIB, GIB = 1 << 10, 1 << 30
ADDRESS = "0000:01:00.0"
REGIONS = [
    # IOVA, length, offset: as QEMU cuts the RAM of a PC below 1 MiB and at the PCI hole.
    (0, 640 * KIB, 0),
    (768 * KIB, 128 * KIB, 768 * KIB),
    (1024 * KIB, 5 * (1 << 20), 1024 * KIB),
    (4 * GIB, SIZE - 6 * (1 << 20), 6 * (1 << 20)),
]


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """How many pages of 2 MiB are free, at least 12."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    with Path(tempfile.gettempdir(), "vfio-ferry-huge-pages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            before = int(pool.read_text())
            free = int((pool.parent / "free_hugepages").read_text())
            pool.write_text(str(before + max(0, 12 - free)))
        except OSError as error:
            pytest.skip(f"no huge pages can be reserved here: {error}")
        try:
            free = int((pool.parent / "free_hugepages").read_text())
            if free < 12:
                pytest.skip(f"only {free} huge pages of 2 MiB can be had here")
            yield free
        finally:
            pool.write_text(str(before))


@pytest.fixture
def file(huge_pages: int) -> Iterator[int]:
    """RAM in huge pages, each page of 4 KiB marked with its number."""
    fd = _huge_file()
    with GuestMemory.map([MemoryRegion(0, SIZE, 0, True, fd)], writable=True) as whole:
        whole.array.view(np.uint32)[:: PAGE // 4] = np.arange(SIZE // PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def gigantic_file() -> Iterator[int]:
    """RAM in one page of 1 GiB."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
    with Path(tempfile.gettempdir(), "vfio-ferry-huge-pages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            before = int(pool.read_text())
            pool.write_text(str(before + 1))
        except OSError as error:
            pytest.skip(f"no page of 1 GiB can be reserved here: {error}")
        try:
            if int(pool.read_text()) == before:
                pytest.skip("no page of 1 GiB can be had here")
            fd = _huge_file(GIB, os.MFD_HUGE_1GB)
            yield fd
            os.close(fd)
        finally:
            pool.write_text(str(before))


def _huge_file(size: int = SIZE, page: int = os.MFD_HUGE_2MB) -> int:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_HUGETLB | page)
    os.ftruncate(fd, size)
    return fd


def _regions(fd: int) -> list[MemoryRegion]:
    return [MemoryRegion(iova, length, offset, True, fd) for iova, length, offset in REGIONS]


def test_each_page_is_where_its_region_says(file: int) -> None:
    assert page_bytes_of(file) == HUGE
    with GuestMemory.map(_regions(file), writable=True) as memory:
        for iova, length, offset in REGIONS:
            first = memory.page_of(iova)
            for step in (0, length // PAGE - 1):
                at = (first + step) * PAGE
                assert memory.array[at : at + 4].view(np.uint32)[0] == offset // PAGE + step
        at = memory.page_of(4 * GIB) * PAGE
        memory.array[at + 5] = 77
        assert os.pread(file, 1, 6 * (1 << 20) + 5) == b"M"
        assert not memory.files, "such a file has neither holes of 4 KiB nor write(2)"
        total = int(memory.array.view(np.uint64).sum())  # nothing in between is a SIGBUS
        assert total


@pytest.mark.full
def test_a_page_of_a_gibibyte_is_cut_as_qemu_cuts_it(gigantic_file: int) -> None:
    """A guest of 1 GiB: below 640 KiB, and from 1 MiB on."""
    cut = [(0, 640 * KIB, 0), (1 << 20, GIB - (1 << 20), 1 << 20)]
    assert page_bytes_of(gigantic_file) == GIB
    regions = [MemoryRegion(iova, size, at, True, gigantic_file) for iova, size, at in cut]
    with GuestMemory.map(regions, writable=True) as memory:
        assert memory.n_pages >= sum(size for _, size, _ in cut) // PAGE
        for iova in (0, 640 * KIB - PAGE, 1 << 20, GIB - PAGE):
            at = memory.page_of(iova) * PAGE
            memory.array[at : at + 8].view(np.uint64)[0] = iova + 1
        for iova in (0, 640 * KIB - PAGE, 1 << 20, GIB - PAGE):
            assert int.from_bytes(os.pread(gigantic_file, 8, iova), "little") == iova + 1
    gateway, device = DmaMemory(), DeviceMemory()
    request = DmaMap(3, 1 << 20, 1 << 20, GIB - (1 << 20))
    gateway.add(request, os.dup(gigantic_file)).at_device = AtDevice.MESSAGE
    device.map(request, os.dup(gigantic_file))
    device.attach(object())  # type: ignore[arg-type]
    device.write(GIB - PAGE, b"device")
    assert gateway.read(GIB - PAGE, 6) == b"device"
    gateway.close()
    device.unmap_all()


def test_gateway_and_controllers_number_the_pages_alike(file: int) -> None:
    memory = DmaMemory()
    for iova, length, offset in REGIONS:
        memory.add(DmaMap(3, offset, iova, length), os.dup(file)).at_device = AtDevice.MESSAGE
    flat = memory.flat()
    bitmap = DirtyBitmap(flat)
    with GuestMemory.map(_regions(file)) as mapped:
        assert [region.first_page for region in flat] == [
            mapped.page_of(iova) for iova, _, _ in REGIONS
        ]
        assert bitmap.n_pages == mapped.n_pages
        bitmap.mark(4 * GIB + PAGE, 1)
        page = mapped.page_of(4 * GIB + PAGE)
        assert os.pread(bitmap.descriptor, 1, page >> 3)[0] == 1 << (page & 7)
    bitmap.close()
    memory.close()


def test_a_device_reaches_it_by_message_and_by_a_mapping_of_its_own(file: int) -> None:
    gateway, device = DmaMemory(), DeviceMemory()
    for iova, length, offset in REGIONS:
        request = DmaMap(3, offset, iova, length)
        gateway.add(request, os.dup(file)).at_device = AtDevice.MESSAGE
        device.map(request, os.dup(file))
    device.attach(None)  # type: ignore[arg-type]
    for iova, length, offset in REGIONS:
        for at in (0, length - PAGE):
            number = ((offset + at) // PAGE).to_bytes(4, "little")
            assert gateway.read(iova + at, 4) == number
            device._messages = object()  # type: ignore[assignment]
            assert device.read(iova + at, 4) == number
    before = Path("/proc/self/maps").read_text().count("memfd:ram")
    assert before >= 2 * len(REGIONS)
    gateway.close()
    device.unmap_all()
    assert Path("/proc/self/maps").read_text().count("memfd:ram") == 0


def test_the_target_has_to_have_pages_of_the_same_size(file: int) -> None:
    layout = MemoryLayout.of(_regions(file))
    assert layout.page_bytes == [HUGE]
    again = MemoryLayout.from_rows(*layout.rows())
    assert same_pages(again, _regions(file))[0].page_bytes == HUGE
    small = os.memfd_create("ram")
    os.ftruncate(small, SIZE)
    with pytest.raises((GuestMemoryError, Mismatch), match="pages of 4 KiB here, of 2048 KiB"):
        GuestMemory.map(same_pages(again, _regions(small)))
    other = MemoryLayout.from_rows(*MemoryLayout.of(_regions(small)).rows())
    with pytest.raises((GuestMemoryError, Mismatch), match="pages of 2048 KiB here, of 4 KiB"):
        GuestMemory.map(same_pages(other, _regions(file)))
    os.close(small)


def test_free_memory_is_counted_in_huge_pages(
    huge_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "memory_available", lambda: 0)
    fits, too_large = _huge_file(huge_pages * HUGE), _huge_file((huge_pages + 1) * HUGE)
    host_memory.check_room([MemoryRegion(0, PAGE, 0, True, fits)])
    with pytest.raises(LocalError, match="more pages of 2 MiB, this host has"):
        host_memory.check_room([MemoryRegion(0, PAGE, 0, True, too_large)])
    os.close(fits)
    os.close(too_large)


@pytest.mark.parametrize("page_bytes", [PAGE, HUGE, GIB])
def test_slots_keep_the_place_in_the_page_and_never_overlap(page_bytes: int) -> None:
    """Also for pages of 1 GiB, which few machines have to spare."""
    slots, end = Slots(), 0
    for _, length, offset in REGIONS:
        first = slots.place(offset, length, page_bytes)
        assert first * PAGE % page_bytes == offset % page_bytes
        assert first * PAGE - offset % page_bytes >= end
        end = -(-(first * PAGE + length) // page_bytes) * page_bytes
    assert slots.n_bytes == end
    if page_bytes == PAGE:
        assert slots.n_pages == sum(length for _, length, _ in REGIONS) // PAGE


def test_a_function_of_the_host_reaches_each_page_where_its_region_says(
    file: int, tmp_path: Path
) -> None:
    FakeSysfs(tmp_path).add(ADDRESS, driver="vfio-pci", group="7")
    kernel = FakeKernel()
    device = VfioDevice(PciFunction(ADDRESS, tmp_path), kernel)
    memory = PinnedMemory(device)
    for iova, length, offset in REGIONS:
        memory.map(DmaMap(3, offset, iova, length), file)
        (size, address, _) = kernel.mapped[iova]
        assert size == length
        for at in (0, length - PAGE):
            number = (offset + at) // PAGE
            assert int.from_bytes(ctypes.string_at(address + at, 8), "little") == number
            assert int.from_bytes(memory.read(iova + at, 8), "little") == number
    memory.close()
    assert not kernel.mapped
    device.close()
