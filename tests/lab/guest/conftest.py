"""A small virtio disk for the guest's tests: as simple as a device can be, and it does as told.

It works in the thread that serves it: a notification is answered when its requests are done. The
test may hold it, let it lose an interrupt or its state, have it fail requests, and, in the place
of the product, carry its state and the pages that it wrote over to another one.
"""

import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lab.children import start_child
from lab.guest.options import GuestOptions
from lab.vfio_user.device import Device
from lab.vfio_user.server import Server
from sync.vfio_user.protocol import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    IrqSet,
    PciIrq,
    PciRegion,
    RegionInfo,
    SetIrqs,
)

PAGE = 4096
MIB = 1 << 20
BAR_BYTES = 0x4000
COMMON, NOTIFY, ISR, BLK = 0x0000, 0x1000, 0x2000, 0x3000
STATUS = 20
DRIVER_OK = 4
NEEDS_RESET = 64
FEATURES = 1 << 9 | 1 << 28 | 1 << 32
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8


def _config_space() -> bytearray:
    config = bytearray(256)
    struct.pack_into("<HHHH", config, 0, 0x1AF4, 0x1042, 0, 0x10)
    config[0x34] = 0x40
    at = 0x40
    for kind, offset in ((1, COMMON), (2, NOTIFY), (3, ISR), (4, BLK)):
        length = 20 if kind == 2 else 16
        struct.pack_into("<BBBBBxxxII", config, at, 9, at + 24, length, kind, 0, offset, 0x1000)
        if kind == 2:
            struct.pack_into("<I", config, at + 16, 4)
        at += 24
    struct.pack_into("<BBHII", config, at, 0x11, 0, 1, 0x800, 0xC00)
    return config


class FakeDisk(Device):
    """`content` is the disk. `written`: guest pages written by DMA, by address."""

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self.lock = threading.RLock()
        self.config = _config_space()
        self.memory: dict[int, tuple[mmap.mmap, int]] = {}
        self.roms: list[int] = []
        self.fds: dict[tuple[int, int], int] = {}
        self.intx_masked = False
        self.resets = 0
        self.served = 0
        self.written: set[int] = set()
        self.held = False
        self.mute = False
        self.fail_next = 0
        self.corrupt_next = 0
        self.seen: list[str] = []
        self._clear()

    def _clear(self) -> None:
        self.common = bytearray(64)
        struct.pack_into("<H", self.common, 18, 1)
        struct.pack_into("<H", self.common, 24, 256)
        self.driver_features = 0
        self.isr = 0
        self.next = 0

    # What a test does to it.

    def hold(self, held: bool = True) -> None:
        """Stops fetching requests, or goes on."""
        with self.lock:
            self.held = held
            if not held:
                self.work()

    def take_over(self, source: "FakeDisk", *, pages: Any = True) -> None:
        """Becomes `source`, as the product would have it; `pages`: with the pages it wrote, or
        only those at whose address it is true."""
        with source.lock, self.lock:
            self.config[:] = source.config
            self.common[:] = source.common
            self.driver_features, self.isr = source.driver_features, source.isr
            self.next = source.next
            for address in sorted(source.written):
                if pages is True or pages(address):
                    self._put(address, source._get(address, PAGE))

    def caught_up(self) -> bool:
        """Whether everything that the driver published is served."""
        with self.lock:
            (driver,) = struct.unpack_from("<Q", self.common, 40)
            return bool(self.next == struct.unpack("<H", self._get(driver + 2, 2))[0])

    def kick(self) -> None:
        """As if the driver had notified it."""
        with self.lock:
            self.work()

    def fire(self) -> None:
        """Every vector once."""
        with self.lock:
            for fd in self.fds.values():
                os.eventfd_write(fd, 1)

    def needs_reset(self) -> None:
        with self.lock:
            self.common[STATUS] |= NEEDS_RESET
            self.interrupt(PciIrq.MSIX, 0)

    # What a client does to it.

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(3, 9, 5)

    def region_info(self, index: int) -> RegionInfo:
        sizes = {PciRegion.BAR0: BAR_BYTES, PciRegion.CONFIG: 256}
        return RegionInfo(index, 3, sizes.get(PciRegion(index), 0))

    def irq_info(self, index: int) -> IrqInfo:
        return IrqInfo(index, 1, {PciIrq.INTX: 1, PciIrq.MSIX: 2}.get(PciIrq(index), 0))

    def reset(self) -> None:
        with self.lock:
            self.resets += 1
            self.config = _config_space()
            self._clear()

    def dma_map(self, region: DmaMap, fd: int | None) -> None:
        with self.lock:
            self.seen.append(f"map {region.address:#x}")
            if fd is None:
                self.roms.append(region.address)
                return
            mapping = mmap.mmap(fd, region.size, offset=region.offset)
            os.close(fd)
            self.memory[region.address] = (mapping, region.size)

    def dma_unmap(self, request: DmaUnmap) -> None:
        with self.lock:
            self.seen.append(f"unmap {request.address:#x}")
            self.memory.pop(request.address, None)

    def detached(self) -> None:
        with self.lock:
            self.memory.clear()
            self._drop_fds()

    def set_irqs(self, request: SetIrqs, fds: list[int]) -> None:
        with self.lock:
            self.seen.append(f"irqs {request.flags:#x} {request.index} {request.count}")
            if request.flags & IrqSet.ACTION_UNMASK:
                self.intx_masked = False
                if self.isr:
                    self.interrupt(PciIrq.INTX, 0)
            elif request.is_disable:
                self._drop_fds()
            for vector, fd in enumerate(fds, request.start):
                old = self.fds.pop((request.index, vector), None)
                if old is not None:
                    os.close(old)
                self.fds[request.index, vector] = fd

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        with self.lock:
            if region == PciRegion.CONFIG:
                return bytes(self.config[offset : offset + count])
            if offset >= BLK:
                sectors = struct.pack("<Q", len(self.content) // 512)
                return sectors[offset - BLK : offset - BLK + count]
            if offset == ISR:
                isr, self.isr = self.isr, 0
                return bytes([isr])
            if offset == 4:
                (half,) = struct.unpack_from("<I", self.common, 0)
                return struct.pack("<I", FEATURES >> 32 * half & 0xFFFFFFFF)
            return bytes(self.common[offset : offset + count])

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        with self.lock:
            if region == PciRegion.CONFIG:
                self._write_config(offset, data)
            elif offset == NOTIFY:
                self.work()
            elif offset == STATUS and data[0] == 0:
                self._clear()
            elif offset < 64:
                self.common[offset : offset + len(data)] = data

    def _write_config(self, offset: int, data: bytes) -> None:
        if offset == 0x10:
            (value,) = struct.unpack("<I", data)
            self.config[0x10:0x14] = struct.pack("<I", value & -BAR_BYTES & 0xFFFFFFFF)
        elif not 0x14 <= offset < 0x28:
            self.config[offset : offset + len(data)] = data

    # What it does itself.

    def work(self) -> None:
        """Serves what is available, unless it is held."""
        descriptors, driver, used = struct.unpack_from("<QQQ", self.common, 32)
        (enabled,) = struct.unpack_from("<H", self.common, 28)
        (size,) = struct.unpack_from("<H", self.common, 24)
        if self.held or not enabled or not self.common[STATUS] & DRIVER_OK or not self.memory:
            return
        before = self.served
        while self.next != struct.unpack("<H", self._get(driver + 2, 2))[0]:
            slot = self.next % size
            (head,) = struct.unpack("<H", self._get(driver + 4 + 2 * slot, 2))
            written = self._serve(descriptors, head)
            (done,) = struct.unpack("<H", self._get(used + 2, 2))
            self._put(used + 4 + 8 * (done % size), struct.pack("<II", head, written))
            self._put(used + 2, struct.pack("<H", done + 1 & 0xFFFF))
            self.next = self.next + 1 & 0xFFFF
            self.served += 1
        if self.served != before and not self.mute:
            self.isr |= 1
            (vector,) = struct.unpack_from("<H", self.common, 26)
            self.interrupt(PciIrq.MSIX, vector)
            self.interrupt(PciIrq.INTX, 0)

    def interrupt(self, index: int, vector: int) -> None:
        fd = self.fds.get((index, vector))
        if fd is None or (index == PciIrq.INTX and self.intx_masked):
            return
        self.intx_masked = index == PciIrq.INTX
        os.eventfd_write(fd, 1)

    def _serve(self, table: int, head: int) -> int:
        chain = []
        index = head
        while True:
            address, length, flags, following = struct.unpack(
                "<QIHH", self._get(table + 16 * index, 16)
            )
            if flags & 4:
                table, index = address, 0
                continue
            chain.append((address, length))
            if not flags & 1:
                break
            index = following
        kind, _, sector = struct.unpack("<IIQ", self._get(*chain[0]))
        status = 0
        if self.fail_next:
            self.fail_next -= 1
            status = 1
        elif kind == OUT:
            self.content[sector * 512 : sector * 512 + chain[1][1]] = self._get(*chain[1])
        elif kind == IN:
            data = bytearray(self.content[sector * 512 : sector * 512 + chain[1][1]])
            if self.corrupt_next:
                self.corrupt_next -= 1
                data[-1] ^= 1
            self._put(chain[1][0], bytes(data))
        elif kind == GET_ID:
            self._put(chain[1][0], b"fake-disk".ljust(20, b"\0"))
        self._put(chain[-1][0], bytes([status]))
        return 1

    def _find(self, address: int, length: int) -> tuple[mmap.mmap, int]:
        for start, (mapping, size) in self.memory.items():
            if start <= address and address + length <= start + size:
                return mapping, address - start
        raise AssertionError(f"DMA of {length} bytes at {address:#x}, which is not mapped")

    def _get(self, address: int, length: int) -> bytes:
        mapping, at = self._find(address, length)
        return mapping[at : at + length]

    def _put(self, address: int, data: bytes) -> None:
        mapping, at = self._find(address, len(data))
        mapping[at : at + len(data)] = data
        first, last = address // PAGE, (address + len(data) - 1) // PAGE
        self.written |= {page * PAGE for page in range(first, last + 1)}

    def _drop_fds(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


class Workbench:
    """Devices and guests of one test, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: list[tuple[Server, threading.Thread]] = []
        self._guests: list[subprocess.Popen[bytes]] = []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def serve(self, device: Device, name: str) -> Callable[[], None]:
        """Serves `device` at the socket `name`; returns how to end that."""
        server = Server(self.path(name), device)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self._servers.append((server, thread))

        def end() -> None:
            server.close()
            thread.join(5)

        return end

    def options(self, name: str, **changes: Any) -> GuestOptions:
        """A guest that is small and quick to move; its device is at the socket `name`-dev."""
        chosen: dict[str, Any] = {
            "device_path": self.path(f"{name}-dev"),
            "qmp_path": self.path(name),
            "low_bytes": 4 * MIB,
            "high_bytes": 4 * MIB,
            "rom_bytes": 64 << 10,
            "queue_size": 16,
            "queue_depth": 4,
            "block_bytes": 4096,
            "blocks": 64,
            "iops": 2000.0,
            "read_area_bytes": MIB,
            "write_area_bytes": 256 << 10,
            "cache_area_bytes": 256 << 10,
            "device_deadline_s": 20.0,
        }
        return GuestOptions(**{**chosen, **changes})

    def start(self, name: str, **changes: Any) -> "subprocess.Popen[bytes]":
        """Starts a guest process."""
        options = self.options(name, **changes)
        guest = start_child(
            [sys.executable, "-m", "lab.guest.main", options.to_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._guests.append(guest)
        return guest

    def close(self) -> None:
        for guest in self._guests:
            if guest.poll() is None:
                guest.kill()
            guest.communicate()
        for server, thread in self._servers:
            with suppress(OSError):
                server.close()
            thread.join(5)


@contextmanager
def _workbench() -> Iterator[Workbench]:
    # Not tmp_path: the path of a UNIX socket has to be short.
    with tempfile.TemporaryDirectory(prefix="guest-") as folder:
        bench = Workbench(Path(folder))
        try:
            yield bench
        finally:
            bench.close()


@pytest.fixture
def bench() -> Iterator[Workbench]:
    with _workbench() as workbench:
        yield workbench


@pytest.fixture
def new_disk() -> Callable[..., FakeDisk]:
    """Makes a `FakeDisk` of a megabyte, or with the content given."""

    def make(content: bytearray | None = None) -> FakeDisk:
        return FakeDisk(bytearray(MIB) if content is None else content)

    return make
