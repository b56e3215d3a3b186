"""An 8254x NIC is carried over by capture and replay, with its profile."""

import os
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from trio.testing import trio_test

from sync.registers.choose import source_for, target_for
from sync.registers.find import load_profiles
from sync.registers.interface import GatewayPort
from sync.registers.record import Access, Op, pack_access, unpack_accesses
from tests.lab.devices.e1000_driver import (
    BAR,
    CONFIG,
    DEADLINE_S,
    EN,
    GPRC,
    GPTC,
    ICS,
    IMC,
    IMS,
    LSC,
    MTA,
    RA,
    RCTL,
    RDH,
    RDT,
    RXDMT0,
    RXT0,
    TCTL,
    TDT,
    TX_RING,
    TXDW,
    Driver,
    Machine,
    frame,
)


class Gateway:
    """Captures what the guest does, and executes batches in between."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.seq: int | None = None
        self.pending = b""

    def read(self, region: int, offset: int, size: int) -> bytes:
        data = self.machine.read(region, offset, size)
        self._note(Access(Op.READ, region, offset, size, data))
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.machine.write(region, offset, data)
        self._note(Access(Op.WRITE, region, offset, len(data), data))

    def _note(self, access: Access) -> None:
        if self.seq is not None:
            record = pack_access(access, self.seq)
            self.seq += len(record) // 32
            self.pending += record

    async def batch(self, records: bytes) -> bytes:
        out = b""
        for number, access in enumerate(unpack_accesses(records)):
            if access.op is Op.READ:
                data = self.machine.read(*access[1:4])
                access = access._replace(data=data)
            else:
                self.machine.write(access.region, access.offset, access.data)
            out += pack_access(access, number)
        return out

    async def journal(self, max_records: int = 65536) -> tuple[bytes, bool]:
        taken, self.pending = self.pending, b""
        return taken, False


def until(condition: Callable[..., Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def traffic(driver: Driver, numbers: range) -> None:
    """Both ways, and some more registers; what was received."""
    got: list[bytes] = []
    for number in numbers:
        driver.queue(driver.legacy(frame(number, 60 + number), 2048 * (number % 16)))
        driver.kick()
        driver.machine.link.deliver(frame(1000 + number))
        assert driver.machine.link.next() == frame(number, 60 + number)
        while len(got) < number - numbers[0] + 1:
            driver.wait()
            got += driver.received()
        driver.w(MTA + 4 * (number % 128), number)
        driver.w(IMC, 0xFFFFFFFF)
        driver.w(IMS, TXDW | RXT0 | RXDMT0 | LSC)
        driver.phy(1)
    assert got == [frame(1000 + number) for number in numbers]


@pytest.mark.parametrize("during", [0, 1, 9, 45])
@pytest.mark.parametrize("resets", [False, True])
@trio_test
async def test_i4_a_driver_is_carried_over_in_the_middle_of_its_traffic(
    machines: Callable[..., Any], during: int, resets: bool
) -> None:
    """By registers alone; some of it between snapshot and end, or nothing at all."""
    profiles = load_profiles()
    source = machines()
    source.map()
    target = machines(source.ram)
    gateways = Gateway(source), Gateway(target)
    driver = Driver(source, gateways[0])
    driver.begin()
    traffic(driver, range(1, 22))
    driver.w(IMS, 0x200)
    near = source_for(source.view(), cast(GatewayPort, gateways[0]), profiles)
    far = target_for(await near.offer(), target.view(), cast(GatewayPort, gateways[1]), profiles)
    await far.check()
    target.reset()
    values = await gateways[0].batch(await near.snapshot())
    gateways[0].seq = 0
    async for payload in near.begin(values, 0):
        await far.receive(payload)
    if resets:
        driver.tail = driver.clean = 0
        driver.memory[TX_RING : TX_RING + 256] = bytes(256)
        driver.begin()
    traffic(driver, range(100, 100 + during))
    async for payload in near.precopy():
        await far.receive(payload)
    # An interrupt that the guest has not seen, a frame that it has not read, a packet unsent.
    head = source.read(BAR, RDH, 4)
    source.link.deliver(frame(501))
    until(lambda: source.read(BAR, RDH, 4) != head)
    source.unmap()
    driver.queue(driver.legacy(frame(77)))
    driver.kick()
    frozen = bytes(driver.memory)
    async for payload in near.final():
        await far.receive(payload)
    target.map()
    report = await far.finish()
    assert report.divergences == {}
    with target.nic.workers.quiet():
        assert bytes(driver.memory) == frozen and target.link.sent.empty()
    assert not target.read(CONFIG, 4, 1)[0] & 4
    assert not (target.read(BAR, RCTL, 1)[0] | target.read(BAR, TCTL, 1)[0]) & EN
    pending = source.read(BAR, ICS, 4)
    started = list(unpack_accesses(far.start_records()))
    counts = {
        access.offset: int.from_bytes(access.data, "little")
        for access in started
        if access.deferred
    }
    unread = during if resets else during + 21
    assert (counts.get(GPTC, 0), counts[GPRC]) == (unread, unread + 1)
    assert all(access.counts for access in started if access.deferred)
    await gateways[1].batch(far.start_records())
    for first, last in (
        (MTA, MTA + 512),
        (RA, RA + 128),
        (IMS, IMS + 4),
        (RCTL, RCTL + 4),
        (TCTL, TCTL + 4),
        (TDT, TDT + 4),
        (RDH, RDT + 4),
    ):
        assert target.read(BAR, first, last - first) == source.read(BAR, first, last - first)
    assert target.link.next() == frame(77)
    driver.machine = driver.port = target
    assert int.from_bytes(pending, "little") & RXT0
    got: list[bytes] = []
    while not got:
        causes = driver.wait()
        got = driver.received()
    assert got == [frame(501)] and causes & RXT0
    traffic(driver, range(200, 240))
