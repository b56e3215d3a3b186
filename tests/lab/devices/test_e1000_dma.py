"""The 8254x NIC and memory: what allows its DMA, what ends it, rubbish in its rings, the log."""

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.devices.e1000_driver import (
    CONFIG,
    EN,
    EOP,
    IC_TSE,
    IOVA,
    RAM_BYTES,
    RCTL,
    RDBAL,
    RDH,
    RDT,
    RS,
    RX_DATA,
    RX_RING,
    TCTL,
    TDBAL,
    TDH,
    TDT,
    TX_RING,
    Driver,
    context,
    frame,
    tcp_packet,
)


def test_nothing_happens_without_bus_mastering_or_memory(machines: Callable[..., Any]) -> None:
    machine = machines()
    driver = Driver(machine)
    driver.begin()
    driver.port.write(CONFIG, 4, (3).to_bytes(2, "little"))
    driver.queue(driver.legacy(frame(1)))
    driver.kick()
    machine.link.deliver(frame(2))
    before = bytes(driver.memory)
    machine.map()
    machine.unmap()
    driver.port.write(CONFIG, 4, (7).to_bytes(2, "little"))
    with machine.nic.workers.quiet():
        assert bytes(driver.memory) == before and machine.link.sent.empty()
    assert driver.r(TDH) == driver.r(RDH) == 0
    machine.map()
    assert machine.link.next() == frame(1)
    assert driver.await_frames(1) == [frame(2)]


def test_disabling_a_direction_ends_its_dma(driver: Driver) -> None:
    driver.w(RCTL, driver.r(RCTL) & ~EN)
    driver.w(TCTL, driver.r(TCTL) & ~EN)
    driver.queue(driver.legacy(frame(1)))
    before = bytes(driver.memory)
    driver.kick()
    for _ in range(200):
        driver.machine.link.deliver(frame(2))
    with driver.machine.nic.workers.quiet():
        assert bytes(driver.memory) == before and driver.machine.link.sent.empty()
    driver.w(TCTL, driver.r(TCTL) | EN)
    assert driver.machine.link.next() == frame(1)


def rubbish_context(noise: random.Random) -> bytes:
    ip, tcp, header = (noise.randrange(230) for _ in range(3))
    return context(ip, tcp, header, noise.randrange(4), command=4)


@pytest.mark.parametrize("seed", range(6))
def test_descriptors_of_rubbish_leave_the_device_alive(driver: Driver, seed: int) -> None:
    noise = random.Random(seed)
    packet = tcp_packet(b"y" * 3000)[0]
    for _ in range(40):
        kind = noise.randrange(5)
        if kind == 0:
            driver.queue(noise.randbytes(16))
        elif kind == 1:
            driver.queue(
                rubbish_context(noise),
                driver.data(packet, command=EOP | IC_TSE | RS, options=3),
            )
        elif kind == 2:
            driver.queue(struct.pack("<QIBBH", noise.randrange(1 << 64), 0x0B1FFFFF, 0, 0, 0))
        elif kind == 3:
            driver.put(RX_RING + 16 * noise.randrange(driver.n), noise.randbytes(16))
            driver.machine.link.deliver(frame(1))
        else:
            first = noise.choice((TDBAL, RDBAL))
            driver.w(first + noise.choice((0, 4, 8, 0x10)), noise.randrange(1 << 32))
        driver.w(noise.choice((TDT, RDT)), noise.choice((driver.tail, noise.randrange(1 << 16))))
    driver.tail = driver.clean = 0
    driver.memory[TX_RING : RX_RING + 0x1000] = bytes(RX_RING + 0x1000)
    driver.begin()
    while not driver.machine.link.sent.empty():
        driver.machine.link.next()
    driver.queue(driver.legacy(frame(7)))
    driver.kick()
    while driver.machine.link.next() != frame(7):
        pass
    driver.machine.link.deliver(frame(8))
    while frame(8) not in driver.received():
        driver.wait()


def test_what_the_device_writes_is_logged(machines: Callable[..., Any]) -> None:
    machine = machines(logging_page_bytes=4096)
    machine.map()
    driver = Driver(machine)
    driver.begin()
    log = machine.nic.log
    log.start(4096, ())
    machine.link.deliver(frame(1, 1000))
    driver.await_frames(1)
    driver.queue(driver.legacy(frame(2)))
    driver.kick()
    driver.wait()
    bitmap = int.from_bytes(log.report(IOVA, RAM_BYTES, 4096), "little")
    pages = {page for page in range(RAM_BYTES // 4096) if bitmap >> page & 1}
    assert pages == {RX_RING // 4096, RX_DATA // 4096, TX_RING // 4096}
