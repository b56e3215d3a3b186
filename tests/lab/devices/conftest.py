"""A guest in miniature: RAM in a memfd, a PCI bus of one device, and a virtio-blk driver.

Written from the specification, not from the device: numbers stand here a second time on purpose.
"""

import contextlib
import itertools
import mmap
import os
import select
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.devices.disk import Disk
from lab.devices.virtio.blk import VirtioBlk
from lab.vfio_user.client import Client
from lab.vfio_user.server import Server
from sync.vfio_user.protocol import (
    DmaMap,
    DmaUnmap,
    Feature,
    IrqSet,
    LoggingControl,
    LoggingReport,
    MigrationState,
    MigState,
    SetIrqs,
    VfioUserError,
)
from tests.lab.devices import e1000_driver

DEADLINE_MS = 10_000
MIB = 1 << 20
LOW, HIGH = 0x4000_0000, 0x1_0000_0000
LOW_BYTES, HIGH_BYTES = 2 * MIB, 6 * MIB
RAM_BYTES = LOW_BYTES + HIGH_BYTES
SECTOR = 512

VERSION_1, EVENT_IDX, INDIRECT = 1 << 32, 1 << 29, 1 << 28
FLUSH, RO, MQ = 1 << 9, 1 << 5, 1 << 12
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
IN, OUT, FLUSH_REQUEST, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2

INTX, MSIX, CONFIG = 0, 2, 7


class Ram:
    """Guest memory: two regions of one memfd, as below and above 4 GiB in a PC."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest-ram")
        os.ftruncate(self.fd, RAM_BYTES)
        self.bytes = mmap.mmap(self.fd, RAM_BYTES)
        self.regions: tuple[tuple[int, int, int], ...] = (
            (LOW, LOW_BYTES, 0),
            (HIGH, HIGH_BYTES, LOW_BYTES),
        )

    def offset(self, iova: int, length: int = 1) -> int:
        """Where a range is in the file; it may go over regions that adjoin in both."""
        first, last = self._byte(iova), self._byte(iova + length - 1)
        if last - first != length - 1:
            raise VfioUserError(14)
        return first

    def _byte(self, iova: int) -> int:
        for start, size, offset in self.regions:
            if start <= iova < start + size:
                return offset + iova - start
        raise VfioUserError(14)

    def read(self, iova: int, length: int) -> bytes:
        at = self.offset(iova, length)
        return self.bytes[at : at + length]

    def write(self, iova: int, data: bytes) -> None:
        at = self.offset(iova, len(data))
        self.bytes[at : at + len(data)] = data

    def u16(self, iova: int) -> int:
        value: int = struct.unpack_from("H", self.bytes, self.offset(iova, 2))[0]
        return value

    def set_u16(self, iova: int, value: int) -> None:
        at = self.offset(iova, 2)
        # Not pack_into, which zeroes the bytes first: the device would see an index of 0.
        self.bytes[at : at + 2] = (value & 0xFFFF).to_bytes(2, "little")

    def pages(self) -> dict[int, bytes]:
        return {
            start + at: self.bytes[offset + at : offset + at + 4096]
            for start, size, offset in self.regions
            for at in range(0, size, 4096)
        }

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


class Bus:
    """A device found through its configuration space, and its interrupts."""

    def __init__(self, path: Path, ram: Ram, *, messages: bool = False) -> None:
        self.ram = ram
        self.messages = messages
        self.on_write: Callable[[int, bytes], None] = lambda iova, data: None
        """Called before the device's write by message is done."""
        self.client = Client(path, on_dma_read=ram.read, on_dma_write=self._write)
        self.caps = self._find_capabilities()
        self.lines: list[int] = []

    def _write(self, iova: int, data: bytes) -> None:
        self.on_write(iova, data)
        self.ram.write(iova, data)

    def config(self, offset: int, count: int) -> int:
        return int.from_bytes(self.client.region_read(CONFIG, offset, count), "little")

    def set_config(self, offset: int, count: int, value: int) -> None:
        self.client.region_write(CONFIG, offset, value.to_bytes(count, "little"))

    def _find_capabilities(self) -> dict[int, tuple[int, int, int, int]]:
        """cfg_type -> (bar, offset, length, where in configuration space); 0x11 for MSI-X."""
        found = {}
        assert self.config(0x06, 2) & 0x10
        at = self.config(0x34, 1)
        while at:
            if self.config(at, 1) == 0x09:
                kind, bar = self.config(at + 3, 1), self.config(at + 4, 1)
                found[kind] = (bar, self.config(at + 8, 4), self.config(at + 12, 4), at)
            elif self.config(at, 1) == 0x11:
                found[0x11] = (self.config(at + 4, 4) & 7, 0, 0, at)
            at = self.config(at + 1, 1)
        return found

    def read(self, kind: int, offset: int, count: int) -> int:
        bar, start, _, _ = self.caps[kind]
        return int.from_bytes(self.client.region_read(bar, start + offset, count), "little")

    def write(
        self, kind: int, offset: int, count: int, value: int, *, posted: bool = False
    ) -> None:
        bar, start, _, _ = self.caps[kind]
        data = value.to_bytes(count, "little")
        self.client.region_write(bar, start + offset, data, posted=posted)

    def map(self) -> None:
        for start, size, offset in self.ram.regions:
            self.map_one(start, size, offset)

    def map_one(self, start: int, size: int, offset: int) -> None:
        if self.messages:
            self.client.dma_map(DmaMap(3, 0, start, size))
        else:
            self.client.dma_map(DmaMap(3, offset, start, size), self.ram.fd)

    def unmap(self) -> None:
        for start, size, _ in self.ram.regions:
            self.client.dma_unmap(DmaUnmap(0, start, size))

    def use_irqs(self, index: int, count: int) -> None:
        for fd in self.lines:
            os.close(fd)
        self.lines = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.client.set_irqs(SetIrqs(flags, index, 0, count), self.lines)

    def unmask(self) -> None:
        self.client.set_irqs(SetIrqs(IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK, INTX, 0, 1))

    def wait(self, line: int) -> None:
        """Wait for an interrupt and consume it."""
        poller = select.poll()
        poller.register(self.lines[line], select.POLLIN)
        assert poller.poll(DEADLINE_MS), f"no interrupt on {line}"
        os.eventfd_read(self.lines[line])

    def fired(self, line: int) -> int:
        """Take the interrupts that are there already."""
        try:
            return os.eventfd_read(self.lines[line])
        except BlockingIOError:
            return 0

    def set_state(self, state: MigrationState) -> None:
        self.client.feature(Feature.set(2, MigState(state).pack()))

    def state(self) -> MigrationState:
        return MigState.unpack(self.client.feature(Feature.get(2, 8)).data).device_state

    def read_stream(self, step: int = 100) -> bytes:
        stream = b""
        while True:
            part = self.client.mig_read(step)
            stream += part
            if len(part) < step:
                return stream

    def start_logging(self, page: int = 4096, ranges: Sequence[tuple[int, int]] = ()) -> int:
        request = Feature.set(6, LoggingControl(page, tuple(ranges)).pack())
        return LoggingControl.unpack(self.client.feature(request).data).page_size

    def dirty(self, page: int = 4096) -> set[int]:
        """IOVAs of the pages reported, which are clean afterwards."""
        pages = set()
        for start, size, _ in self.ram.regions:
            request = LoggingReport(start, size, page)
            reply = self.client.feature(Feature.get(8, 1 << 16, request.pack()))
            bitmap = int.from_bytes(LoggingReport.unpack(reply.data).bitmap, "little")
            pages |= {start + page * bit for bit in range(bitmap.bit_length()) if bitmap >> bit & 1}
        return pages

    def close(self) -> None:
        self.client.close()
        for fd in self.lines:
            os.close(fd)
        self.lines = []


@dataclass
class Request:
    head: int
    descriptors: list[int]
    status: int
    incoming: list[tuple[int, int]]


class Area:
    """Room for requests, used from start to end and over again."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.at, self.end = start, start, end

    def take(self, length: int) -> int:
        """`length` bytes that no request in flight uses, provided there are not too many."""
        length = length + 15 & -16
        if self.at + length > self.end:
            self.at = self.start
        at, self.at = self.at, self.at + length
        return at


class Driver:
    """virtio-blk on one queue. Survives its `bus`: give it another one after a reconnect.

    Rings and what the device reads are in [base, end), what it writes in `incoming`; the used ring
    has pages of its own.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        queue: int = 0,
        base: int = LOW,
        end: int = LOW + LOW_BYTES,
        incoming: tuple[int, int] = (HIGH, HIGH + HIGH_BYTES),
        size: int = 64,
    ) -> None:
        self.bus = bus
        self.ram = bus.ram
        self.queue = queue
        self.size = size
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 4095) & -4096
        self.tables = self.used + 8192
        self.outgoing = Area(self.tables + 16 * 64 * size, end)
        self.incoming = Area(*incoming)
        self.marks_status = True
        self.free = list(range(size))
        self.pending: dict[int, Request] = {}
        self.seen = 0
        self.submitted = 0
        self.features = 0
        self.intx = False

    def begin(self, features: int = VERSION_1 | INDIRECT | FLUSH, *, intx: bool = False) -> None:
        """Initialise the device as the specification's section 3.1 says."""
        bus = self.bus
        self.intx, self.features = intx, features
        bus.set_config(0x04, 2, 0x0006)
        bus.write(1, 0x14, 1, 0)
        assert bus.read(1, 0x14, 1) == 0
        bus.write(1, 0x14, 1, 1)
        bus.write(1, 0x14, 1, 3)
        for half in (0, 1):
            bus.write(1, 0x08, 4, half)
            bus.write(1, 0x0C, 4, features >> 32 * half & 0xFFFF_FFFF)
        bus.write(1, 0x14, 1, 11)
        assert bus.read(1, 0x14, 1) == 11
        if intx:
            bus.use_irqs(INTX, 1)
        else:
            control = bus.caps[0x11][3] + 2
            bus.set_config(control, 2, bus.config(control, 2) | 0x8000)
            bus.use_irqs(MSIX, (bus.config(control, 2) & 0x7FF) + 1)
            bus.write(1, 0x10, 2, 0)
        self.set_up_queue()
        bus.write(1, 0x14, 1, 15)
        assert bus.read(1, 0x14, 1) == 15

    def set_up_queue(self) -> None:
        bus = self.bus
        self.ram.write(self.desc, bytes(self.tables - self.desc))
        bus.write(1, 0x16, 2, self.queue)
        bus.write(1, 0x18, 2, self.size)
        if not self.intx:
            bus.write(1, 0x1A, 2, self.queue + 1)
            assert bus.read(1, 0x1A, 2) == self.queue + 1
        for offset, address in ((0x20, self.desc), (0x28, self.avail), (0x30, self.used)):
            bus.write(1, offset, 4, address & 0xFFFF_FFFF)
            bus.write(1, offset + 4, 4, address >> 32)
        bus.write(1, 0x1C, 2, 1)

    def submit(
        self,
        kind: int,
        sector: int = 0,
        outgoing: Sequence[bytes] = (),
        incoming: Sequence[int] = (),
        *,
        indirect: bool = False,
        kick: bool = True,
    ) -> Request:
        """A request with data to write in pieces, or pieces of these lengths to read."""
        header = self.outgoing.take(16)
        self.ram.write(header, struct.pack("<IIQ", kind, 0, sector))
        parts = [(header, 16, 0)]
        for piece in outgoing:
            at = self.outgoing.take(len(piece))
            self.ram.write(at, piece)
            parts.append((at, len(piece), 0))
        places = [(self.incoming.take(length), length) for length in incoming]
        parts += [(at, length, F_WRITE) for at, length in places]
        status = self.incoming.take(1)
        if self.marks_status:
            self.ram.write(status, b"\xee")
        parts.append((status, 1, F_WRITE))
        return self.submit_parts(parts, status, places, indirect=indirect, kick=kick)

    def submit_parts(
        self,
        parts: Sequence[tuple[int, int, int]],
        status: int,
        incoming: list[tuple[int, int]],
        *,
        indirect: bool = False,
        kick: bool = True,
    ) -> Request:
        if indirect:
            used = [self.free.pop()]
            table = self.tables + 16 * 64 * used[0]
            for number, (at, length, flags) in enumerate(parts):
                last = number == len(parts) - 1
                entry = struct.pack("<QIHH", at, length, flags | (not last), number + 1)
                self.ram.write(table + 16 * number, entry)
            self.set_descriptor(used[0], table, 16 * len(parts), F_INDIRECT, 0)
        else:
            used = [self.free.pop() for _ in parts]
            for index, following, (at, length, flags) in zip(
                used, [*used[1:], 0], parts, strict=True
            ):
                more = 0 if index == used[-1] else F_NEXT
                self.set_descriptor(index, at, length, flags | more, following)
        request = Request(used[0], used, status, incoming)
        self.pending[request.head] = request
        self.publish(request.head, kick=kick)
        return request

    def set_descriptor(self, index: int, at: int, length: int, flags: int, following: int) -> None:
        entry = struct.pack("<QIHH", at, length, flags, following)
        self.ram.write(self.desc + 16 * index, entry)

    def publish(self, head: int, *, kick: bool = True) -> None:
        self.ram.set_u16(self.avail + 4 + 2 * (self.submitted % self.size), head)
        before = self.submitted
        self.submitted = self.submitted + 1 & 0xFFFF
        self.ram.set_u16(self.avail + 2, self.submitted)
        if self.features & EVENT_IDX:
            # A lock is a barrier: the index is out before the device's wish is read.
            with threading.Lock():
                wish = self.ram.u16(self.used + 4 + 8 * self.size)
            kick = kick and wish == before
        if kick:
            self.kick()

    def kick(self) -> None:
        self.bus.write(2, 4 * self.queue, 2, self.queue, posted=True)

    def collect(self) -> dict[int, int]:
        """What was completed since the last time: head -> bytes written."""
        done = {}
        while self.seen != self.ram.u16(self.used + 2):
            slot = self.used + 4 + 8 * (self.seen % self.size)
            head, written = struct.unpack("<II", self.ram.read(slot, 8))
            self.free += self.pending.pop(head).descriptors
            done[head] = written
            self.seen = self.seen + 1 & 0xFFFF
            if self.features & EVENT_IDX:
                self.ram.set_u16(self.avail + 4 + 2 * self.size, self.seen)
        return done

    def wait_interrupt(self) -> None:
        if self.intx:
            self.bus.wait(0)
            self.bus.read(3, 0, 1)
            self.bus.unmask()
        else:
            self.bus.wait(self.queue + 1)

    def wait_any(self) -> dict[int, int]:
        """Wait until something is completed."""
        while True:
            if done := self.collect():
                return done
            self.wait_interrupt()

    def drain(self) -> None:
        """Wait until everything is completed."""
        while self.pending:
            self.wait_any()

    def finish(self, request: Request) -> int:
        """Wait for this request; its status."""
        while request.head in self.pending and self.pending[request.head] is request:
            self.wait_any()
        return self.ram.read(request.status, 1)[0]

    def result(self, request: Request) -> bytes:
        """What a completed request read."""
        return b"".join(self.ram.read(at, length) for at, length in request.incoming)

    def read(self, sector: int, length: int, **how: Any) -> bytes:
        request = self.submit(IN, sector, incoming=[length], **how)
        assert self.finish(request) == OK
        return self.result(request)

    def write(self, sector: int, data: bytes, **how: Any) -> None:
        assert self.finish(self.submit(OUT, sector, [data], **how)) == OK


class SlowDisk(Disk):
    """A disk that holds every transfer up until `go` is set, and counts those under way."""

    device: VirtioBlk

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = threading.Event()
        self.waiting = threading.Semaphore(0)
        self.busy = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def _transfer(self) -> Iterator[None]:
        with self._lock:
            self.busy += 1
        self.waiting.release()
        assert self.go.wait(DEADLINE_MS / 1000)
        yield
        with self._lock:
            self.busy -= 1

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._transfer():
            super().read(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._transfer():
            super().write(buffers, offset)

    def wait_for(self, count: int) -> None:
        """Wait until `count` more transfers are held up."""
        for _ in range(count):
            assert self.waiting.acquire(timeout=DEADLINE_MS / 1000)


class Host:
    """Devices and the clients of one test, all taken down at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self._numbers = itertools.count()
        self.ram = Ram()
        self.stack.callback(self.ram.close)

    def image(self, size: int = 4 * MIB, seed: int = 1) -> Path:
        path = self.folder / f"disk-{next(self._numbers)}.img"
        path.write_bytes(pattern(size, seed))
        return path

    def serve(self, image: Path, *, read_only: bool = False, **options: Any) -> Path:
        """A running device; the path of its socket."""
        return self.serve_device(VirtioBlk(Disk(image, read_only=read_only), **options))

    def serve_slow(self, **options: Any) -> tuple[Path, SlowDisk]:
        """A running device whose transfers can be held up; held up at first."""
        disk = SlowDisk(self.image())
        disk.device = VirtioBlk(disk, **options)
        path = self.serve_device(disk.device)
        self.stack.callback(disk.go.set)
        return path, disk

    def serve_device(self, device: VirtioBlk) -> Path:
        path = self.folder / f"dev-{next(self._numbers)}.sock"
        server = Server(path, device)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def stop() -> None:
            server.close()
            thread.join(DEADLINE_MS / 1000)
            assert not thread.is_alive()
            device.close()

        self.stack.callback(stop)
        return path

    def connect(self, path: Path, **how: Any) -> Bus:
        bus = Bus(path, self.ram, **how)
        self.stack.callback(bus.close)
        return bus

    def driver(self, bus: Bus, **how: Any) -> Driver:
        return Driver(bus, **how)

    def boot(
        self, path: Path, *, messages: bool = False, intx: bool = False, **begin: Any
    ) -> Driver:
        """Connect, map memory and start a driver."""
        bus = self.connect(path, messages=messages)
        bus.map()
        driver = self.driver(bus)
        driver.begin(intx=intx, **begin)
        return driver

    def close(self) -> None:
        self.stack.close()


def pattern(size: int, seed: int) -> bytes:
    """Bytes in which every sector is different."""
    block = b"".join(
        struct.pack("<QQ", seed, number) * (SECTOR // 16) for number in range(-(-size // SECTOR))
    )
    return block[:size]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.close()


@pytest.fixture(scope="session")
def new_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Host]:
    """For tests that need a host for each example."""
    return lambda: Host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def make_pattern() -> Callable[[int, int], bytes]:
    return pattern


@pytest.fixture
def machines() -> Iterator[Callable[..., e1000_driver.Machine]]:
    """Makes machines with an 8254x NIC; they are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(ram: e1000_driver.Ram | None = None, **options: Any) -> e1000_driver.Machine:
            machine = e1000_driver.Machine(ram, **options)
            stack.callback(machine.close)
            return machine

        yield make


@pytest.fixture
def driver(machines: Callable[..., e1000_driver.Machine]) -> e1000_driver.Driver:
    machine = machines()
    machine.map()
    driver = e1000_driver.Driver(machine)
    driver.begin()
    return driver
