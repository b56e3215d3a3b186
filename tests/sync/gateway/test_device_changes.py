"""A gateway goes on with another process of its device: one that has died, one that is replaced.

Real devices of the laboratory, each in a thread, behind a real gateway. What a guest
sees of it under load stands in `tests/e2e/test_device_restart.py`.
"""

import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.devices.disk import Disk
from lab.devices.e1000.nic import E1000
from lab.devices.virtio.blk import VirtioBlk
from lab.devices.virtio.virtqueue import Chain
from lab.vfio_user.client import Client
from lab.vfio_user.server import Server
from sync.gateway.engine.core import Limits
from sync.gateway.engine.loop import Gateway, GatewayOptions
from sync.gateway.errors import AnotherDevice, NewDeviceUnreachable
from sync.registers.find import load_profiles
from sync.vfio_user.errors import VfioUserError
from sync.vfio_user.protocol import DmaMap, DmaUnmap, IrqSet, SetIrqs
from tests.lab.devices.e1000_driver import (
    BAR,
    CONFIG,
    EN,
    GPRC,
    GPTC,
    IOVA,
    MAC,
    MTA,
    RAM_BYTES,
    RCTL,
    RDBAL,
    TCTL,
    Driver,
    FakeLink,
    Machine,
    Ram,
    frame,
)
from tests.sync.replacing import replace_device

WAIT_S = 20.0
HOLD_S = 0.3
LIMITS = Limits(away_hold_s=HOLD_S, away_patience_s=60.0, comeback_step_s=1.0)
INTX, MSIX = 0, 2
QUEUE_SIZE = 0x18


class Site:
    """A gateway, its device by `start`, and the VMM's connection. `build` makes a device."""

    def __init__(self, folder: Path, build: Callable[[], Any], limits: Limits = LIMITS) -> None:
        self.folder = folder
        self._build = build
        self._served: list[tuple[Server, threading.Thread, Any]] = []
        self._seen = threading.Condition()
        self.events: list[tuple[str, dict[str, object]]] = []
        self.start()
        options = GatewayOptions(
            folder / "vmm",
            folder / "device",
            folder / "control",
            limits=limits,
            origins=load_profiles(),
        )
        self._gateway = Gateway(options, self._log)
        self._thread = threading.Thread(target=self._gateway.run)
        self._thread.start()
        self.vmm = Client(folder / "vmm", timeout_s=WAIT_S)

    def _log(self, event: str, **fields: object) -> None:
        with self._seen:
            self.events.append((event, fields))
            self._seen.notify_all()

    def wait(self, event: str, reason: str = "", count: int = 1) -> dict[str, object]:
        def found() -> list[dict[str, object]]:
            return [f for name, f in self.events if name == event and reason in str(f)]

        with self._seen:
            assert self._seen.wait_for(lambda: len(found()) >= count, WAIT_S), self.events
        return found()[-1]

    def start(self, device: Any = None, name: str = "device") -> Any:
        device = device or self._build()
        server = Server(self.folder / name, device)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self._served.append((server, thread, device))
        return device

    def end(self, number: int = -1) -> None:
        server, thread, device = self._served.pop(number)
        server.close()
        thread.join(WAIT_S)
        device.close()

    def replace(self, name: str) -> None:
        replace_device(self.folder / "control", self.folder / name)

    def close(self) -> None:
        self.vmm.close()
        self._gateway.stop()
        self._thread.join(WAIT_S)
        while self._served:
            self.end()


@contextmanager
def site(folder: Path, build: Callable[[], Any], limits: Limits = LIMITS) -> Iterator[Site]:
    here = Site(folder, build, limits)
    try:
        yield here
    finally:
        here.close()


def disk_of(folder: Path, megabytes: int) -> Callable[[], VirtioBlk]:
    image = folder / f"{megabytes}.img"
    image.write_bytes(bytes(megabytes << 20))
    return lambda: VirtioBlk(Disk(image))


def test_i9_an_access_is_answered_in_time_and_set_up_does_not_wait(tmp_path: Path) -> None:
    with site(tmp_path, disk_of(tmp_path, 1)) as here:
        vmm, ram = here.vmm, Ram()
        vmm.region_write(CONFIG, 0x3C, b"\x07")
        here.end()
        here.wait("device-away")
        with pytest.raises(VfioUserError) as caught:
            vmm.region_read(CONFIG, 0, 4)
        assert caught.value.errno == errno.EIO
        vmm.dma_map(DmaMap(3, 0, IOVA, RAM_BYTES), ram.fd)
        line = os.eventfd(0, os.EFD_NONBLOCK)
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        vmm.set_irqs(SetIrqs(flags, MSIX, 0, 1), [line])
        device = here.start()
        back = here.wait("device-back")
        assert back["refused"] == 1 and back["work_known"]
        assert vmm.region_read(CONFIG, 0x3C, 1) == b"\x07"
        assert device.memory.segments(IOVA, 4096, 1)
        assert os.eventfd_read(line)
        os.close(line)


def test_i11_another_device_does_not_take_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sync.gateway.engine.loop.REOPEN_S", 0.2)
    larger = disk_of(tmp_path, 2)
    with site(tmp_path, disk_of(tmp_path, 1)) as here:
        here.end()
        here.wait("device-away")
        here.start(larger())
        here.wait("device-not-back", "device_config was")
        here.end()
        here.start(E1000(FakeLink(), MAC))
        here.wait("device-not-back", "was 1af4:1042 and is 8086:100e")
        here.end()
        here.start()
        here.wait("device-back")
        assert here.vmm.region_read(CONFIG, 0, 4) == b"\xf4\x1a\x42\x10"


def test_what_is_replaced_by_another_device_stays(tmp_path: Path) -> None:
    larger = disk_of(tmp_path, 2)
    with site(tmp_path, disk_of(tmp_path, 1)) as here:
        here.vmm.region_write(CONFIG, 0x3C, b"\x07")
        here.start(larger(), "larger")
        with pytest.raises(AnotherDevice, match="device_config was"):
            here.replace("larger")
        with pytest.raises(NewDeviceUnreachable, match="no new device at"):
            here.replace("nobody")
        assert here.vmm.region_read(CONFIG, 0x3C, 1) == b"\x07"
        here.start(None, "new")
        here.replace("new")
        here.end(0)
        assert here.vmm.region_read(CONFIG, 0x3C, 1) == b"\x07"


class Card(Machine):
    """A NIC behind a gateway, as a driver has it."""

    def __init__(self, here: Site) -> None:
        self.ram = Ram()
        self._here = here
        self.line = os.eventfd(0, os.EFD_NONBLOCK)
        here.vmm.dma_map(DmaMap(3, 0, IOVA, RAM_BYTES), self.ram.fd)
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        here.vmm.set_irqs(SetIrqs(flags, INTX, 0, 1), [self.line])

    def read(self, region: int, offset: int, size: int) -> bytes:
        return self._here.vmm.region_read(region, offset, size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self._here.vmm.region_write(region, offset, data)


def exchange(driver: Driver, link: FakeLink, number: int) -> None:
    """A frame each way."""
    driver.queue(driver.legacy(frame(number)))
    driver.kick()
    assert link.next() == frame(number)
    link.deliver(frame(1000 + number))
    got: list[bytes] = []
    deadline = time.monotonic() + WAIT_S
    while not got:
        assert time.monotonic() < deadline
        got = driver.received()
        os.sched_yield()
    assert got == [frame(1000 + number)]


def test_a_network_card_is_replaced_in_the_middle_of_its_rings(tmp_path: Path) -> None:
    links = [FakeLink() for _ in range(4)]
    fresh = iter(links)
    with site(tmp_path, lambda: E1000(next(fresh), MAC), Limits()) as here:
        driver = Driver(Card(here))
        driver.begin()
        driver.w(MTA + 4, 0x1234)
        number = 0
        for turn, link in enumerate(links):
            for _ in range(7):
                exchange(driver, link, number)
                number += 1
            if turn < len(links) - 1:
                here.start(None, f"new{turn}")
                here.replace(f"new{turn}")
                here.end(0)
        assert driver.r(GPTC) == driver.r(GPRC) == number
        assert driver.r(MTA + 4) == 0x1234


class MemoryTold(E1000):
    """A NIC that notes into `log` when it is given guest memory, and when it is taken from it."""

    def __init__(self, link: FakeLink, log: list[str], name: str) -> None:
        super().__init__(link, MAC)
        self._told, self._name = log, name

    def dma_map(self, region: DmaMap, fd: int | None) -> None:
        self._told.append(f"{self._name} has memory")
        super().dma_map(region, fd)

    def dma_unmap(self, request: DmaUnmap) -> None:
        super().dma_unmap(request)
        self._told.append(f"{self._name} has none")


def test_i4_the_replaced_device_has_no_memory_before_the_new_one_has(tmp_path: Path) -> None:
    log: list[str] = []
    names = iter(("old", "new"))
    with site(tmp_path, lambda: MemoryTold(FakeLink(), log, next(names)), Limits()) as here:
        driver = Driver(Card(here))
        driver.begin()
        here.start(None, "new")
        here.replace("new")
        assert log == ["old has memory", "old has none", "new has memory"]


def test_a_network_card_that_died_comes_back_silent_and_its_driver_resets_it(
    tmp_path: Path,
) -> None:
    links = [FakeLink(), FakeLink()]
    fresh = iter(links)
    with site(tmp_path, lambda: E1000(next(fresh), MAC), Limits()) as here:
        driver = Driver(Card(here))
        driver.begin()
        driver.w(MTA + 4, 0x1234)
        exchange(driver, links[0], 1)
        here.end()
        here.start()
        here.wait("device-back")
        assert not (driver.r(RCTL) | driver.r(TCTL)) & EN
        assert driver.r(MTA + 4) == 0x1234 and driver.r(RDBAL) == IOVA & 0xFFFFFFFF | 0x10000
        assert here.vmm.region_read(CONFIG, 4, 2)[0] & 4, "it may do DMA once its driver says so"
        driver.queue(driver.legacy(frame(2)))
        driver.kick()
        assert links[1].sent.empty()
        driver.tail = driver.clean = 0
        driver.begin()
        exchange(driver, links[1], 3)
        assert driver.port.read(BAR, RCTL, 4)


class Reluctant(VirtioBlk):
    """A disk that completes a request only if its head is not in `keeps`, until its client goes."""

    def __init__(self, disk: Disk, keeps: frozenset[int]) -> None:
        self._keeps = keeps
        self._gone = threading.Event()
        self.executed: list[int] = []
        super().__init__(disk)

    def execute(self, chain: Chain) -> int:
        if chain.head in self._keeps:
            assert self._gone.wait(WAIT_S)
        self.executed.append(chain.head)
        return super().execute(chain)

    def detached(self) -> None:
        self.memory.lose()
        self._gone.set()
        super().detached()


class Blocks:
    """A driver of a virtio disk with one queue of 8 requests of 512 bytes; request `n` is head
    2 `n`: a header, and a buffer with room for the status behind the data."""

    AVAILABLE, USED, DATA, SIZE = 0x1000, 0x2000, 0x4000, 16

    def __init__(self, vmm: Client, ram: Ram) -> None:
        self._vmm, self._ram = vmm, ram
        vmm.reset()
        vmm.dma_map(DmaMap(3, 0, IOVA, RAM_BYTES), ram.fd)
        vmm.region_write(CONFIG, 4, b"\x06\x00")
        for status in (0, 1, 3):
            self._write(0x14, 1, status)
        self._write(0x08, 4, 1)
        self._write(0x0C, 4, 1)
        self._write(0x14, 1, 11)
        self._write(0x16, 2, 0)
        self._write(0x18, 2, self.SIZE)
        for register, at in ((0x20, 0), (0x28, self.AVAILABLE), (0x30, self.USED)):
            self._write(register, 4, (IOVA + at) & 0xFFFFFFFF)
            self._write(register + 4, 4, (IOVA + at) >> 32)
        self._write(0x1C, 2, 1)
        self._write(0x14, 1, 15)
        self._offered = 0

    def _write(self, register: int, size: int, value: int) -> None:
        self._vmm.region_write(BAR, register, value.to_bytes(size, "little"))

    def put(self, at: int, data: bytes) -> None:
        self._ram.bytes[at : at + len(data)] = data

    def ask(self, *requests: int) -> None:
        for number in requests:
            at = self.DATA + 0x1000 * number
            self.put(at, struct.pack("<IIQ", 0, 0, number))
            descriptors = struct.pack("<QIHH", IOVA + at, 16, 1, 2 * number + 1)
            descriptors += struct.pack("<QIHH", IOVA + at + 16, 513, 2, 0)
            self.put(32 * number, descriptors)
            slot = self.AVAILABLE + 4 + 2 * (self._offered % self.SIZE)
            self.put(slot, struct.pack("<H", 2 * number))
            self._offered += 1
            self.put(self.AVAILABLE + 2, struct.pack("<H", self._offered))
        self._vmm.region_write(BAR, 0x3000, b"\0\0")

    def used(self) -> list[int]:
        """The requests that are completed, in that order."""
        (count,) = struct.unpack_from("<H", self._ram.bytes, self.USED + 2)
        return [
            struct.unpack_from("<I", self._ram.bytes, self.USED + 4 + 8 * at)[0] // 2
            for at in range(count)
        ]

    def await_used(self, count: int) -> list[int]:
        deadline = time.monotonic() + WAIT_S
        while len(self.used()) < count:
            assert time.monotonic() < deadline, self.used()
            time.sleep(0.001)
        return self.used()


def test_requests_under_way_are_done_once_more_and_no_others(tmp_path: Path) -> None:
    """Completed out of order, they are not the last ones of the ring."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with site(tmp_path, lambda: Reluctant(Disk(image), frozenset({0, 4}))) as here:
        blocks = Blocks(here.vmm, Ram())
        blocks.ask(0, 1, 2, 3)
        assert sorted(blocks.await_used(2)) == [1, 3]
        here.end()
        device = here.start(Reluctant(Disk(image), frozenset()))
        assert here.wait("device-back")["work_known"]
        assert sorted(blocks.await_used(4)[2:]) == [0, 2]
        assert sorted(device.executed) == [0, 4]
        blocks.ask(4)
        assert blocks.await_used(5)[-1] == 4
