"""The NVMe controller over vfio-user, driven by the tests' own driver; and a guest's queues that
move from one controller to another of the same namespace."""

import os
import random
import select
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

import pytest

from lab.devices.disk import Disk
from lab.devices.nvme.controller import NvmeController
from lab.vfio_user.client import Client
from lab.vfio_user.server import Server
from sync.queues.errors import MemoryUnreadable
from sync.queues.interface import (
    AwaitMemory,
    AwaitRegister,
    Command,
    MapScratch,
    ReadMemory,
    ReadRegister,
    ResetFunction,
    Signal,
    UnmapScratch,
    WriteMemory,
    WriteRegister,
    run,
)
from sync.vfio_user.protocol import DmaMap, DmaUnmap, IrqSet, SetIrqs
from tests.sync.queues.world import GUEST_IOVA, NVME, Driver, DriverCq, DriverSq

RAM_BYTES = 4 << 20
CONFIG, MSIX = 7, 2
N_VECTORS = 5


class Ram:
    """Guest memory in a file, with the allocator that the driver wants."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, RAM_BYTES)
        self.bytes = mmap(self.fd, RAM_BYTES)
        self._free = GUEST_IOVA

    def allocate(self, length: int) -> int:
        iova, self._free = self._free, self._free + (-(-length // 4096) << 12)
        return iova

    def read(self, iova: int, length: int) -> bytes:
        at = iova - GUEST_IOVA
        if not 0 <= at <= RAM_BYTES - length:
            raise MemoryUnreadable(f"{iova:#x}")
        return self.bytes[at : at + length]

    def write(self, iova: int, data: bytes) -> None:
        at = iova - GUEST_IOVA
        self.bytes[at : at + len(data)] = data


class Port:
    """A client of one controller: its registers, its view of memory, its interrupts."""

    def __init__(self, client: Client, ram: Ram) -> None:
        self.client = client
        self.ram = ram
        self.shows_ram = False
        self._scratch: dict[int, tuple[int, mmap]] = {}
        self.vectors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(N_VECTORS)]
        self.enable()

    def enable(self) -> None:
        """Bus mastering, and MSI-X, without which a queue with a vector is refused."""
        self.client.region_write(CONFIG, 4, struct.pack("<H", 6))
        self.client.region_write(CONFIG, 0x42, struct.pack("<H", 0x8000))
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.client.set_irqs(SetIrqs(flags, MSIX, 0, N_VECTORS), self.vectors)

    def show_ram(self) -> None:
        self.client.dma_map(DmaMap(3, 0, GUEST_IOVA, RAM_BYTES), self.ram.fd)
        self.shows_ram = True

    def hide_ram(self) -> None:
        self.client.dma_unmap(DmaUnmap(0, GUEST_IOVA, RAM_BYTES))
        self.shows_ram = False

    def write(self, offset: int, data: bytes) -> None:
        self.client.region_write(0, offset, data)

    def wait(self, vector: int) -> None:
        poller = select.poll()
        poller.register(self.vectors[vector], select.POLLIN)
        assert poller.poll(10_000)
        os.eventfd_read(self.vectors[vector])

    def __call__(self, command: Command) -> bytes:
        match command:
            case ResetFunction():
                self.client.reset()
                self.enable()
            case ReadRegister(offset, length):
                return self.client.region_read(0, offset, length)
            case WriteRegister(offset, data):
                self.write(offset, data)
            case AwaitRegister(offset, length, mask, value):
                return awaited(lambda: self.client.region_read(0, offset, length), mask, value)
            case MapScratch(iova, length):
                fd = os.memfd_create("scratch")
                os.ftruncate(fd, length)
                self.client.dma_map(DmaMap(3, 0, iova, length), fd)
                self._scratch[iova] = length, mmap(fd, length)
                os.close(fd)
            case UnmapScratch(iova, length):
                self.client.dma_unmap(DmaUnmap(0, iova, length))
                del self._scratch[iova]
            case ReadMemory(iova, length):
                return self._read(iova, length)
            case WriteMemory(iova, data):
                if self.shows_ram:
                    self.ram.write(iova, data)
                else:
                    start, memory = self._find(iova)
                    memory[iova - start : iova - start + len(data)] = data
            case AwaitMemory(iova, length, mask, value):
                return awaited(lambda: self._read(iova, length), mask, value)
            case Signal(vector):
                os.eventfd_write(self.vectors[vector], 1)
        return b""

    def _read(self, iova: int, length: int) -> bytes:
        if self.shows_ram:
            return self.ram.read(iova, length)
        start, memory = self._find(iova)
        return memory[iova - start : iova - start + length]

    def _find(self, iova: int) -> tuple[int, mmap]:
        for start, (length, memory) in self._scratch.items():
            if start <= iova < start + length:
                return start, memory
        raise AssertionError(f"{iova:#x}")


def awaited(look: Callable[[], bytes], mask: int, value: int) -> bytes:
    for _ in range(1_000_000):
        data = look()
        if int.from_bytes(data, "little") & mask == value:
            return data
    raise AssertionError("the plan waits for what does not come")


@contextmanager
def port(path: Path, image: Path, ram: Ram, seed: int, controller_id: int) -> Iterator[Port]:
    """A controller whose arbitration is shuffled, served by a thread, and its client."""
    rng = random.Random(seed)
    device = NvmeController([Disk(image)], controller_id=controller_id, arbiter=rng.choice)
    server = Server(path, device)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = Client(path, on_dma_read=ram.read, on_dma_write=ram.write)
    try:
        yield Port(client, ram)
    finally:
        client.close()
        server.close()
        thread.join()
        device.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "namespace.img"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(1 << 20)
    return path


class Guest:
    """The driver, at one controller after the other."""

    def __init__(self, here: Port, inventory: bytes) -> None:
        self.here = here
        self.random = random.Random(1)
        self.watch = NVME.watch(here.ram, inventory)
        self.watch.reset()
        self.driver = Driver(here.ram, self._access)  # type: ignore[arg-type]

    def _access(self, offset: int, data: bytes) -> None:
        self.watch.write(0, offset, data)
        self.here.write(offset, data)
        if offset == 0x14:
            ready = struct.unpack("<I", data)[0] & 1
            read = self.here.client.region_read
            self.watch.read(0, 0x1C, awaited(lambda: read(0, 0x1C, 4), 1, ready))

    def take(self, cq: DriverCq, count: int) -> None:
        for _ in range(100_000):
            count -= self.driver.take(cq, count)
            if not count:
                return
        raise AssertionError("a command does not complete")

    def admin(self, opcode: int, **fields: object) -> None:
        self.driver.submit(self.driver.sqs[0], opcode, **fields)  # type: ignore[arg-type]
        self.take(self.driver.cqs[0], 1)

    def create(self, number: int, cq_entries: int, sq_entries: int) -> None:
        driver, memory = self.driver, self.here.ram
        cq = DriverCq(number, memory.allocate(16 * cq_entries), cq_entries)
        sq = DriverSq(number, memory.allocate(64 * sq_entries), sq_entries, cq)
        self.admin(0x05, prp1=cq.base, dwords=((cq_entries - 1) << 16 | number, number << 16 | 3))
        self.admin(0x01, prp1=sq.base, dwords=((sq_entries - 1) << 16 | number, number << 16 | 1))
        driver.cqs[number], driver.sqs[number] = cq, sq

    def work(self, count: int) -> None:
        """Blocks through all queues, several at once, with content that is checked."""
        rings = [sq for sq in self.driver.sqs.values() if sq.id]
        for _ in range(count):
            for sq in rings:
                for _ in range(3):
                    self.driver.read_or_write(sq, self.random)
            for sq in rings:
                self.take(sq.cq, 3)


def test_queues_go_on_at_another_controller_of_the_namespace(short_path: Path, image: Path) -> None:
    ram = Ram()
    with (
        port(short_path / "a", image, ram, 1, 0) as source,
        port(short_path / "b", image, ram, 2, 1) as target,
    ):
        inventory = run(NVME.inventory(), source)
        target_inventory = run(NVME.inventory(), target)
        assert not NVME.differences(inventory, target_inventory)
        source.show_ram()
        guest = Guest(source, inventory)
        driver = guest.driver
        driver.enable(8, 8)
        guest.admin(0x09, dwords=(7, 1 << 16 | 1))
        guest.create(1, 8, 8)
        guest.create(2, 5, 7)
        for _ in range(2):
            driver.submit(driver.sqs[0], 0x0C)
        guest.work(9)
        walk = NVME.walk(target_inventory)
        before = bytes(ram.bytes)
        run(walk.ahead(guest.watch.state()), target)
        assert bytes(ram.bytes) == before
        guest.work(4)
        for _ in range(2):
            driver.read_or_write(driver.sqs[1], guest.random)
        while guest.watch.rest().name != "AT_REST":
            guest.watch.look()
        state = guest.watch.state()
        source.hide_ram()
        run(walk.finish(state), target)
        target.show_ram()
        for vector in range(N_VECTORS):
            if select.select([target.vectors[vector]], [], [], 0)[0]:
                os.eventfd_read(target.vectors[vector])
        guest.here = target
        guest.watch = NVME.watch(ram, target_inventory, state)
        run(walk.start(state), target)
        target.wait(1)
        guest.take(driver.cqs[1], 2)
        guest.work(12)
        guest.admin(0x06, prp1=GUEST_IOVA + RAM_BYTES - 4096, dwords=(1,))
        assert len(driver.asked) == 2
        assert not guest.watch.refusals()


@pytest.mark.parametrize(
    ("opcode", "dwords", "status"),
    [
        (0x05, (7 << 16 | 9, 1), 0x101),
        (0x05, (0 << 16 | 1, 1), 0x102),
        (0x05, (7 << 16 | 1, 0), 0x002),
        (0x01, (7 << 16 | 1, 5 << 16 | 1), 0x100),
        (0x00, (3,), 0x101),
        (0x04, (3,), 0x101),
        (0x06, (0x99,), 0x002),
        (0x09, (0x99,), 0x002),
        (0x0A, (0x99,), 0x002),
        (0x7C, (), 0x001),
    ],
)
def test_a_command_that_makes_no_sense_is_answered_with_its_status(
    short_path: Path, image: Path, opcode: int, dwords: tuple[int, ...], status: int
) -> None:
    ram = Ram()
    with port(short_path / "a", image, ram, 1, 0) as here:
        guest = Guest(here, run(NVME.inventory(), here))
        here.show_ram()
        guest.driver.enable(8, 8)
        guest.driver.submit(guest.driver.sqs[0], opcode, dwords=dwords)
        base = guest.driver.cqs[0].base
        raw = awaited(lambda: ram.read(base + 14, 2), 1, 1)
        assert struct.unpack("<H", raw)[0] >> 1 & 0x7FF == status
