"""A guest with an NVMe driver at one gateway moves to another, by what `send` and `receive` ask of
gateways. Works on model controllers and on those that an emulated host has."""

import os
import random
import struct
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import trio

from ferry.migration.devices import view_of
from lab.vfio_user.client import Client as Vmm
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.requests import Tracker
from sync.gateway.engine.custody import ClientRole
from sync.registers.choose import source_for, target_for
from sync.registers.profile.locate import DeviceView
from sync.vfio_user.protocol import DmaMap, DmaUnmap, IrqSet, SetIrqs
from tests.sync.queues.test_virtio import Driver as VirtioDriver
from tests.sync.queues.virtio_model import EVENT_IDX, INDIRECT, NOTIFY, VERSION_1
from tests.sync.queues.world import GUEST_IOVA, Driver, DriverCq, DriverSq
from tests.sync.vfio.test_endpoint import CONFIG, MSIX, RAM_BYTES, Ram

DEADLINE_S = 60.0
PHASES = (*("standby", "mediated", "walked ahead", "stopped", "walked", "released", "owned"),)
"""What a move has reached, in this order."""
CANARY = b"\xa5" * RAM_BYTES


class _Aborted(Exception):
    pass


class Served(Protocol):
    """A gateway (`control` is its socket in `folder`) and the VMM that is connected to it."""

    folder: Path
    vmm: Vmm


class Machine(ABC):
    """A VMM with its guest, at whichever gateway."""

    def __init__(self, here: Served) -> None:
        self.here = here
        self.ram = Ram()
        self.lines = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.appear(here)

    @abstractmethod
    def start(self) -> None:
        """The driver makes the device its own."""

    @abstractmethod
    def work(self, count: int) -> None:
        """So many requests, each of which is checked."""

    def appear(self, at: Served) -> None:
        """What a VMM does when its guest has enabled the device."""
        self.here = at
        at.vmm.dma_map(DmaMap(3, 0, GUEST_IOVA, RAM_BYTES), self.ram.fd)
        at.vmm.region_write(CONFIG, 4, b"\x06\x00")
        capability = at.vmm.region_read(CONFIG, 0x34, 1)[0]
        while capability and at.vmm.region_read(CONFIG, capability, 1)[0] != 0x11:
            capability = at.vmm.region_read(CONFIG, capability + 1, 1)[0]
        if capability:
            at.vmm.region_write(CONFIG, capability + 2, b"\x00\x80")
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        at.vmm.set_irqs(SetIrqs(flags, MSIX, 0, len(self.lines)), self.lines)


class Guest(Machine):
    """A guest whose driver has one pair of I/O queues."""

    def __init__(self, here: Served) -> None:
        super().__init__(here)
        self.random = random.Random(1)
        self.driver = Driver(self.ram, self._access)  # type: ignore[arg-type]

    def start(self) -> None:
        driver = self.driver
        driver.enable(8, 8)
        driver.cqs[1] = DriverCq(1, self.ram.allocate(4096), 16)
        driver.sqs[1] = DriverSq(1, self.ram.allocate(4096), 16, driver.cqs[1])
        self.admin(0x09, 0, (7, 1 << 16 | 1))
        self.admin(0x05, driver.cqs[1].base, (15 << 16 | 1, 1 << 16 | 3))
        self.admin(0x01, driver.sqs[1].base, (15 << 16 | 1, 1 << 16 | 1))
        driver.submit(driver.sqs[0], 0x0C)

    def work(self, count: int) -> None:
        for _ in range(count):
            self.driver.read_or_write(self.driver.sqs[1], self.random)
            self._take(self.driver.cqs[1])

    def ask(self, count: int) -> None:
        """Commands of which nobody takes the completions."""
        for _ in range(count):
            self.driver.read_or_write(self.driver.sqs[1], self.random)

    def take_all(self) -> None:
        """Until all that was asked for is there, and as it has to be."""
        end = time.monotonic() + DEADLINE_S
        while any(queue for queue, _ in self.driver.asked):
            self.driver.take(self.driver.cqs[1])
            assert time.monotonic() < end, "commands do not complete"

    def admin(self, opcode: int, prp1: int, dwords: tuple[int, ...]) -> None:
        self.driver.submit(self.driver.sqs[0], opcode, prp1=prp1, dwords=dwords)
        self._take(self.driver.cqs[0])

    def _take(self, cq: DriverCq) -> None:
        end = time.monotonic() + DEADLINE_S
        while not self.driver.take(cq):
            assert time.monotonic() < end, "a command does not complete"

    def _access(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), 4):
            self.here.vmm.region_write(0, offset + at, data[at : at + 4])
        if offset == 0x14:
            wanted = struct.unpack("<I", data)[0] & 1
            end = time.monotonic() + DEADLINE_S
            while self.here.vmm.region_read(0, 0x1C, 4)[0] & 1 != wanted:
                assert time.monotonic() < end


class VirtioGuest(Machine):
    """A guest with a virtio block device of one queue. `more`: features that its driver takes."""

    def __init__(self, here: Served, more: int = 0) -> None:
        super().__init__(here)
        self.features = VERSION_1 | EVENT_IDX | INDIRECT | more
        config = b"".join(here.vmm.region_read(CONFIG, at, 4) for at in range(0, 256, 4))
        view = DeviceView(0, 0, 0, 0, 0, config, dict.fromkeys(range(6), 1 << 20))
        windows = [view.locate(f"virtio:{name}") for name in ("common", "notify")]
        self.common, self.notify = (window for window in windows if window is not None)
        self.driver = VirtioDriver(self.ram, self._write, 2, 1)  # type: ignore[arg-type]

    def start(self) -> None:
        self.driver.start(self.features, [16], [0])

    def work(self, count: int) -> None:
        (ring,) = self.driver.rings
        for _ in range(count):
            assert self.driver.give(ring)
            end = time.monotonic() + DEADLINE_S
            while not self.driver.take(ring):
                assert time.monotonic() < end, "a request does not complete"

    def _write(self, region: int, offset: int, data: bytes) -> None:
        if offset >= NOTIFY:
            self.here.vmm.region_write(self.notify.region, self.notify.offset, data)
        else:
            at = self.common.offset + offset
            self.here.vmm.region_write(self.common.region, at, data)


def move_machine(source: Served, target: Served, guest: Machine) -> float:
    """The whole of it, with I/O before, during and after. Returns how long the guest stood still,
    in milliseconds."""
    guest.start()
    guest.work(21)
    stood_ms = trio.run(_move, source, target, guest, "s")
    guest.work(40)
    return stood_ms


def move(source: Served, target: Served) -> float:
    """`move_machine` with an NVMe controller."""
    guest = Guest(source)
    stood_ms = move_machine(source, target, guest)
    assert {asked.opcode for asked in guest.driver.asked.values()} == {0x0C}
    return stood_ms


def abort_everywhere(source: Served, target: Served) -> float:
    """A move that ends at each phase in turn and leaves everything as it was: the guest's memory,
    and that of the VMM at the target, byte for byte; the guest, which goes on; the target's
    controller, which is reset. Then one that ends well; how long the guest stood still in it, in
    milliseconds."""
    guest = Guest(source)
    guest.start()
    guest.work(21)
    ram_there = Ram()
    target.vmm.dma_map(DmaMap(3, 0, GUEST_IOVA, RAM_BYTES), ram_there.fd)
    for phase in PHASES:
        trio.run(_move, source, target, guest, f"ends-{phase.replace(' ', '-')}", phase)
        assert ram_there.bytes[:] == CANARY, phase
        assert guest.ram.untouched(), phase
        assert target.vmm.region_read(0, 0x14, 4) == bytes(4), phase
        assert target.vmm.region_read(0, 0x1C, 4)[0] & 1 == 0, phase
        guest.work(20)
    target.vmm.dma_unmap(DmaUnmap(0, GUEST_IOVA, RAM_BYTES))
    stood_ms = trio.run(_move, source, target, guest, "ends-well")
    guest.work(40)
    return stood_ms


async def _move(
    source: Served, target: Served, guest: Machine, session: str, until: str | None = None
) -> float:
    a = await GatewayClient.connect(
        source.folder / "control", role=ClientRole.SOURCE, session=session
    )
    b = await GatewayClient.connect(
        target.folder / "control", role=ClientRole.TARGET, session=session
    )
    reached: list[str] = []
    before = b""

    def reach(phase: str) -> None:
        reached.append(phase)
        if phase == until:
            raise _Aborted

    async with a, b:
        info = await a.status()
        assert info.supports.v2
        assert not info.supports.message
        tracker: Tracker = "queues" if info.supports.queues else "none"
        registers = source_for(view_of(info), a, ())
        there = view_of(await b.status())
        replica = target_for(await registers.offer(), there, b, ())
        try:
            await b.standby(session)
            reach("standby")
            mediation = await a.mediate(tracker=tracker, page_size=4096, capture=False)
            for descriptor in mediation.dirty:
                os.close(descriptor)
            assert mediation.n_pages in (0, RAM_BYTES // 4096)
            reach("mediated")
            async for payload in registers.begin(mediation.values, mediation.journal_seq):
                await replica.receive(payload)
            await trio.to_thread.run_sync(guest.work, 5)
            if tracker == "queues":
                assert (await a.dirty()).complete
                before = guest.ram.bytes[:]
            reach("walked ahead")
            began = time.monotonic()
            await registers.quiesce()
            await a.stop(fence=registers.fence, resume=registers.resume_records())
            reach("stopped")
            async for payload in registers.final():
                await replica.receive(payload)
            await replica.finish()
            reach("walked")
            await a.release(session)
            reach("released")
            await b.own(session)
            reach("owned")
        except _Aborted:
            await b.fence(session)
            await b.abandon()
            if "released" in reached:
                await a.reclaim(session)
            if "mediated" in reached:
                await a.passthrough()
            assert not before or guest.ram.bytes[:] == before
            return 0.0
        assert not before or guest.ram.bytes[:] == before
        await trio.to_thread.run_sync(guest.appear, target)
        await b.start(replica.start_records())
        return (time.monotonic() - began) * 1e3
