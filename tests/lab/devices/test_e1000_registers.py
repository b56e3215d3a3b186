"""The 8254x NIC as its driver finds it: bus, reset, EEPROM, PHY, interrupts."""

import os
import struct
from collections.abc import Callable
from typing import Any, cast

import pytest

from lab.devices.e1000.nic import E1000
from lab.devices.errors import DeviceError
from lab.vfio_user.dma import DmaPort
from sync.vfio_user.protocol import Feature, IrqSet, SetIrqs, VfioUserError
from tests.lab.devices.e1000_driver import (
    BAR,
    CONFIG,
    CTRL,
    EECD,
    EERD,
    ICR,
    ICS,
    IMC,
    IMS,
    IO,
    LSC,
    MAC,
    RA,
    RCTL,
    RDT,
    RXT0,
    STATUS,
    TCTL,
    TDBAL,
    TXDW,
    Driver,
    FakeLink,
    frame,
)


def test_what_the_driver_finds_on_the_bus(machines: Callable[..., Any]) -> None:
    machine = machines()
    config = machine.read(CONFIG, 0, 64)
    assert config[:4] == bytes.fromhex("86800e10") and config[9:12] == bytes.fromhex("000002")
    assert config[0x3D] == 1
    machine.write(CONFIG, 0x10, b"\xff" * 12)
    assert struct.unpack("<III", machine.read(CONFIG, 0x10, 12)) == (0xFFFE0000, 0, 0xFFFFFFC1)
    assert machine.nic.irq_info(2).count == 0 and machine.nic.irq_info(0).count == 1


@pytest.mark.parametrize("through_io", [False, True])
def test_a_reset_by_the_driver(machines: Callable[..., Any], through_io: bool) -> None:
    driver = Driver(machines())
    before = {at: driver.r(at) for at in (CTRL, STATUS, RCTL, TCTL, RA, RA + 4, 0x2820, 0x5820)}
    for at in (RCTL, TCTL, RA, RA + 4, 0x2820, 0x5820, IMS, ICS, TDBAL, RDT):
        driver.w(at, 0xFFFFFFF8)
    assert driver.r(IMS) and driver.r(TDBAL) and driver.r(RDT)
    (driver.io if through_io else driver.w)(CTRL, driver.r(CTRL) | 1 << 26)
    assert {at: driver.r(at) for at in before} == before
    assert [driver.r(at) for at in (ICR, IMS, TDBAL, RDT)] == [0, 0, 0, 0]
    assert struct.pack("<II", driver.r(RA), driver.r(RA + 4))[:6] == MAC
    assert driver.r(STATUS) & 2 and driver.r(RA + 4) >> 31


def test_eeprom_by_eerd_and_by_microwire(machines: Callable[..., Any]) -> None:
    driver = Driver(machines())

    def eerd(address: int) -> int:
        driver.w(EERD, 1 | address << 8)
        assert driver.r(EERD) & 0x10
        return driver.r(EERD) >> 16

    def clock(bit: int) -> int:
        driver.w(EECD, 0x42 | bit << 2)
        driver.w(EECD, 0x43 | bit << 2)
        out = driver.r(EECD) >> 3 & 1
        driver.w(EECD, 0x42 | bit << 2)
        return out

    def microwire(address: int) -> int:
        driver.w(EECD, 0x40)
        assert driver.r(EECD) & 0x80
        driver.w(EECD, 0x42)
        for bit in f"0110{address:06b}":
            clock(int(bit))
        value = int("".join(str(clock(0)) for _ in range(16)), 2)
        driver.w(EECD, 0)
        return value

    words = [eerd(address) for address in range(64)]
    assert words == [microwire(address) for address in range(64)]
    assert sum(words) & 0xFFFF == 0xBABA
    assert struct.pack("<3H", *words[:3]) == MAC
    assert not driver.r(EECD) & 0x80


def test_phy_by_mdic(machines: Callable[..., Any]) -> None:
    driver = Driver(machines())
    assert (driver.phy(2), driver.phy(3)) == (0x0141, 0x0C20)
    assert driver.phy(1) & 0x24 == 0x24
    write = 1 << 26 | 1 << 21
    driver.mdic(write | 4 << 16 | 0x1234)
    assert driver.phy(4) == 0x1234
    driver.mdic(write | 1 << 16)
    assert driver.phy(1) & 0x24 == 0x24
    driver.mdic(write | 0x8000)
    assert driver.phy(4) == 0x0DE1
    assert driver.mdic(2 << 26 | 7 << 21) & 1 << 30


def test_interrupt_causes_and_masks(machines: Callable[..., Any]) -> None:
    driver = Driver(machines())
    driver.w(ICS, LSC | RXT0)
    assert driver.r(ICS) == driver.r(ICS) == LSC | RXT0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.machine.line)
    driver.w(IMS, LSC)
    driver.w(IMS, TXDW)
    assert driver.r(IMS) == LSC | TXDW
    assert driver.machine.read(CONFIG, 6, 1)[0] & 8
    assert driver.wait() == LSC | RXT0
    assert driver.r(ICR) == 0 and not driver.machine.read(CONFIG, 6, 1)[0] & 8
    driver.w(IMC, LSC)
    assert driver.r(IMS) == TXDW
    driver.w(ICS, LSC | TXDW)
    driver.w(ICR, TXDW)
    assert driver.r(ICS) == LSC


def test_a_client_that_comes_back_finds_everything_as_it_was(driver: Driver) -> None:
    machine = driver.machine
    driver.w(IMC, 0xFFFFFFFF)
    machine.link.deliver(frame(1))
    driver.w(IMS, RXT0)
    driver.wait()
    machine.nic.detached()
    driver.queue(driver.legacy(frame(2)))
    machine.link.deliver(frame(3))
    driver.kick()
    before = bytes(driver.memory)
    machine.nic.attached(cast(DmaPort, object()))
    assert bytes(driver.memory) == before
    flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
    machine.nic.set_irqs(SetIrqs(flags, 0, 0, 1), [os.dup(machine.line)])
    machine.map()
    assert machine.link.next() == frame(2)
    frames = driver.received()
    while len(frames) < 2:
        driver.wait()
        frames += driver.received()
    assert frames == [frame(1), frame(3)]


def test_accesses_that_no_driver_makes(driver: Driver) -> None:
    nic = driver.machine.nic
    for size in (1, 2, 3, 8, 64):
        assert len(nic.region_read(BAR, 0xBE, size)) == size
        nic.region_write(BAR, 0xBD, bytes(size))
    nic.region_write(BAR, 0x1FFFC, b"\xff" * 4)
    nic.region_write(IO, 0, b"\xff" * 4)
    assert nic.region_read(IO, 0, 4) == (0x1FFFC).to_bytes(4, "little")
    nic.region_write(IO, 0x38, b"\xff" * 8)
    with pytest.raises(VfioUserError):
        nic.region_read(BAR, 0x1FFFE, 4)
    with pytest.raises(VfioUserError):
        nic.feature(Feature.get(1, 8))
    with pytest.raises(DeviceError):
        E1000(FakeLink(), b"\x01" * 6)
