"""Runs inside of the emulated host: a driver on NVMe controller A, which goes on at controller B.

Prints one JSON document. Everything is that of the product: kernel VFIO, watch, inventory and walk.
"""

import ctypes
import json
import mmap
import random
import struct
import sys
import time

from sync.queues.errors import MemoryUnreadable
from sync.queues.interface import Rest
from sync.queues.nvme.device_class import Nvme
from sync.vfio.device import VfioDevice
from sync.vfio.executor import Executor, complete
from sync.vfio.sysfs import host_functions
from sync.vfio_user.protocol import FeatureFlags, PciIrq
from tests.sync.queues.world import GUEST_IOVA, Driver, DriverCq, DriverSq

NVME = Nvme()
RAM_BYTES = 16 << 20
CANARY = bytes(range(256)) * (RAM_BYTES // 256)
DEADLINE_S = 60.0


class Ram:
    def __init__(self) -> None:
        self.bytes = mmap.mmap(-1, RAM_BYTES)
        self.bytes[:] = CANARY
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self._free = GUEST_IOVA

    def allocate(self, length: int) -> int:
        iova, self._free = self._free, self._free + (-(-length // 4096) << 12)
        self.write(iova, bytes(length))
        return iova

    def read(self, iova: int, length: int) -> bytes:
        at = iova - GUEST_IOVA
        if not 0 <= at <= RAM_BYTES - length:
            raise MemoryUnreadable(f"{iova:#x}")
        return self.bytes[at : at + length]

    def write(self, iova: int, data: bytes) -> None:
        at = iova - GUEST_IOVA
        self.bytes[at : at + len(data)] = data


class Guest:
    def __init__(self, ram: Ram, device: VfioDevice, inventory: bytes) -> None:
        self.device = device
        self.random = random.Random(1)
        self.watch = NVME.watch(ram, inventory)
        self.watch.reset()
        self.driver = Driver(ram, self.access)  # type: ignore[arg-type]
        self.ram = ram

    def access(self, offset: int, data: bytes) -> None:
        self.watch.write(0, offset, data)
        for at in range(0, len(data), 4):
            self.device.write(0, offset + at, data[at : at + 4])
        if offset == 0x14:
            ready = struct.unpack("<I", data)[0] & 1
            end = time.monotonic() + DEADLINE_S
            while self.device.read(0, 0x1C, 4)[0] & 1 != ready:
                assert time.monotonic() < end
            self.watch.read(0, 0x1C, self.device.read(0, 0x1C, 4))

    def take(self, cq: DriverCq, count: int) -> None:
        end = time.monotonic() + DEADLINE_S
        while count:
            count -= self.driver.take(cq, count)
            assert time.monotonic() < end, "a command does not complete"

    def admin(self, opcode: int, **fields: object) -> None:
        self.driver.submit(self.driver.sqs[0], opcode, **fields)  # type: ignore[arg-type]
        self.take(self.driver.cqs[0], 1)

    def create(self, number: int, cq_size: int, sq_size: int) -> None:
        cq = DriverCq(number, self.ram.allocate(16 * cq_size), cq_size)
        sq = DriverSq(number, self.ram.allocate(64 * sq_size), sq_size, cq)
        vector = number << 16 | 3
        self.admin(0x05, prp1=cq.base, dwords=((cq_size - 1) << 16 | number, vector))
        self.admin(0x01, prp1=sq.base, dwords=((sq_size - 1) << 16 | number, number << 16 | 1))
        self.driver.cqs[number], self.driver.sqs[number] = cq, sq

    def work(self, count: int) -> None:
        rings = [sq for sq in self.driver.sqs.values() if sq.id]
        for _ in range(count):
            for sq in rings:
                for _ in range(3):
                    self.driver.read_or_write(sq, self.random)
            for sq in rings:
                self.take(sq.cq, 3)


def main() -> None:
    functions = [each for each in host_functions() if each.class_code == 0x010802]
    before = [function.bind() for function in functions]
    source, target = (VfioDevice(function) for function in functions)
    signals: list[int] = []
    on_source, on_target = Executor(source), Executor(target, signals.append)
    inventory = complete(on_source.work(NVME.inventory()))
    target_inventory = complete(on_target.work(NVME.inventory()))
    differences = [str(each) for each in NVME.differences(inventory, target_inventory)]

    ram = Ram()
    source.map_dma(GUEST_IOVA, RAM_BYTES, ram.address)
    guest = Guest(ram, source, inventory)
    driver = guest.driver
    driver.enable(32, 32)
    guest.admin(0x09, dwords=(7, 1 << 16 | 1))
    guest.create(1, 16, 16)
    guest.create(2, 24, 7)
    for _ in range(2):
        driver.submit(driver.sqs[0], 0x0C)
    guest.work(40)

    walk = NVME.walk(target_inventory)
    copy = ram.bytes[:]
    began = time.monotonic()
    complete(on_target.work(walk.ahead(guest.watch.state())))
    ahead_ms = (time.monotonic() - began) * 1e3
    untouched = ram.bytes[:] == copy
    guest.work(3)
    for _ in range(2):
        driver.read_or_write(driver.sqs[1], guest.random)
    end = time.monotonic() + DEADLINE_S
    while guest.watch.rest() is not Rest.AT_REST:
        guest.watch.look()
        assert time.monotonic() < end
    began = time.monotonic()
    state = guest.watch.state()
    source.unmap_dma(GUEST_IOVA, RAM_BYTES)
    copy = ram.bytes[:]
    complete(on_target.work(walk.finish(state)))
    finish_ms = (time.monotonic() - began) * 1e3
    untouched = untouched and ram.bytes[:] == copy

    # The fence: a controller that was taken its memory cannot write it, whatever it is told.
    driver_copy = ram.bytes[:]
    source.write(0, 0x1008, struct.pack("<I", (driver.sqs[1].tail + 1) % 16))
    time.sleep(0.2)
    fenced = ram.bytes[:] == driver_copy

    target.map_dma(GUEST_IOVA, RAM_BYTES, ram.address)
    on_target.guest = ram
    guest.device = target
    guest.watch = NVME.watch(ram, target_inventory, state)
    complete(on_target.work(walk.start(state)))
    guest.take(driver.cqs[1], 2)
    guest.work(40)
    for _ in range(70):
        guest.admin(0x06, prp1=GUEST_IOVA + RAM_BYTES - 4096, dwords=(1,))
    result = {
        "functions": [function.address for function in functions],
        "drivers before": before,
        "differences": differences,
        "regions": {index: region.size for index, region in source.regions.items()},
        "vectors": {index.name: count for index, count in source.vectors.items()},
        "migration v2": source.has_feature(1, FeatureFlags.GET),
        "ahead ms": round(ahead_ms, 1),
        "finish ms": round(finish_ms, 1),
        "untouched": untouched,
        "fenced": fenced,
        "signals": signals,
        "event requests left": len(driver.asked),
        "refusals": list(guest.watch.refusals()),
    }
    target.disable_irqs(PciIrq.MSIX)
    source.close()
    target.close()
    for function, name in zip(functions, before, strict=True):
        function.restore(name)
    result["drivers after"] = [function.driver for function in functions]
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
