"""Rings that no conforming driver makes: the device says so and works again after a reset."""

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.vfio_user.protocol import DmaMap
from tests.lab.devices.conftest import Driver, Host

IN, GET_ID = 0, 8
NEEDS_RESET = 0x40
NEXT, WRITE, INDIRECT = 1, 2, 4
VERSION_1, EVENT_IDX, F_INDIRECT = 1 << 32, 1 << 29, 1 << 28
ROM = 0x3000_0000
GUARD = 0x10000


def chain(driver: Driver, *descriptors: tuple[int, int, int, int]) -> None:
    """Descriptors 0, 1, 2, …; the first is published."""
    for index, (address, length, flags, following) in enumerate(descriptors):
        driver.set_descriptor(index, address, length, flags, following)
    driver.publish(0)


def table(driver: Driver, *descriptors: tuple[int, int, int, int]) -> int:
    at = driver.tables
    for index, descriptor in enumerate(descriptors):
        driver.ram.write(at + 16 * index, struct.pack("<QIHH", *descriptor))
    return at


def header(driver: Driver, kind: int = IN) -> int:
    at = driver.outgoing.take(16)
    driver.ram.write(at, struct.pack("<IIQ", kind, 0, 0))
    return at


def avail_index(driver: Driver, value: int) -> None:
    driver.ram.set_u16(driver.avail + 2, value)
    driver.kick()


def loop(driver: Driver) -> None:
    chain(driver, (header(driver), 16, NEXT, 1), (driver.incoming.start, 16, NEXT, 0))


def loop_on_itself(driver: Driver) -> None:
    chain(driver, (header(driver), 16, NEXT, 0))


def loop_in_a_table(driver: Driver) -> None:
    at = table(driver, (header(driver), 16, NEXT, 1), (driver.incoming.start, 16, NEXT, 1))
    chain(driver, (at, 32, INDIRECT, 0))


def next_out_of_range(driver: Driver) -> None:
    chain(driver, (header(driver), 16, NEXT, 64))


def next_out_of_table(driver: Driver) -> None:
    at = table(driver, (header(driver), 16, NEXT, 5))
    chain(driver, (at, 16, INDIRECT, 0))


def head_out_of_range(driver: Driver) -> None:
    driver.publish(64)


def head_far_out_of_range(driver: Driver) -> None:
    driver.publish(0xFFFF)


def too_many_available(driver: Driver) -> None:
    avail_index(driver, 65)


def available_goes_back(driver: Driver) -> None:
    avail_index(driver, 0xFFFF)


def address_nowhere(driver: Driver) -> None:
    chain(driver, (header(driver), 16, NEXT, 1), (0x10, 4096, WRITE, 0))


def address_at_the_end_of_all(driver: Driver) -> None:
    chain(driver, (header(driver), 16, NEXT, 1), ((1 << 64) - 1, 4096, WRITE, 0))


def header_nowhere(driver: Driver) -> None:
    chain(driver, (0xDEAD_0000, 16, NEXT, 1), (driver.incoming.start, 513, WRITE, 0))


def huge_length(driver: Driver) -> None:
    chain(driver, (header(driver), 16, NEXT, 1), (driver.incoming.start, 0xFFFF_FFFF, WRITE, 0))


def many_huge_lengths(driver: Driver) -> None:
    parts = [(driver.incoming.start, 1 << 20, NEXT | WRITE, n + 2) for n in range(62)]
    chain(
        driver,
        (header(driver), 16, NEXT, 1),
        *parts,
        (driver.incoming.start, 0xFFFF_FFFF, WRITE, 0),
    )


def range_over_a_gap(driver: Driver) -> None:
    low_end = driver.ram.regions[0][0] + driver.ram.regions[0][1]
    chain(driver, (header(driver), 16, NEXT, 1), (low_end - 256, 513, WRITE, 0))


def write_to_rom(driver: Driver) -> None:
    chain(driver, (header(driver), 16, NEXT, 1), (ROM, 513, WRITE, 0))


def no_status(driver: Driver) -> None:
    chain(driver, (header(driver), 16, 0, 0))


def no_header(driver: Driver) -> None:
    chain(driver, (driver.incoming.start, 513, WRITE, 0))


def short_header(driver: Driver) -> None:
    chain(driver, (header(driver), 15, NEXT, 1), (driver.incoming.start, 513, WRITE, 0))


def readable_behind_writable(driver: Driver) -> None:
    chain(driver, (driver.incoming.start, 513, NEXT | WRITE, 1), (header(driver), 16, 0, 0))


def nested_table(driver: Driver) -> None:
    at = table(driver, (driver.tables, 16, INDIRECT, 0))
    chain(driver, (at, 16, INDIRECT, 0))


def table_with_a_next(driver: Driver) -> None:
    at = table(driver, (header(driver), 16, 0, 0))
    chain(driver, (at, 16, INDIRECT | NEXT, 1), (driver.incoming.start, 1, WRITE, 0))


def empty_table(driver: Driver) -> None:
    chain(driver, (driver.tables, 0, INDIRECT, 0))


def odd_table(driver: Driver) -> None:
    chain(driver, (driver.tables, 24, INDIRECT, 0))


def huge_table(driver: Driver) -> None:
    chain(driver, (driver.tables, 0xFFFF_FFF0, INDIRECT, 0))


def table_nowhere(driver: Driver) -> None:
    chain(driver, (0x10, 32, INDIRECT, 0))


ATTACKS = [
    loop,
    loop_on_itself,
    loop_in_a_table,
    next_out_of_range,
    next_out_of_table,
    head_out_of_range,
    head_far_out_of_range,
    too_many_available,
    available_goes_back,
    address_nowhere,
    address_at_the_end_of_all,
    header_nowhere,
    huge_length,
    many_huge_lengths,
    range_over_a_gap,
    write_to_rom,
    no_status,
    no_header,
    short_header,
    readable_behind_writable,
    nested_table,
    table_with_a_next,
    empty_table,
    odd_table,
    huge_table,
    table_nowhere,
]


@pytest.fixture
def rom() -> Iterator[int]:
    """Memory that the device may only read, and that nobody writes."""
    fd = os.memfd_create("rom")
    os.ftruncate(fd, GUARD)
    yield fd
    assert os.pread(fd, GUARD, 0) == bytes(GUARD)
    os.close(fd)


@pytest.mark.parametrize("messages", [False, True], ids=["mapping", "messages"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_i9_a_broken_ring_needs_a_reset_and_nothing_else(
    host: Host, rom: int, attack: Callable[..., Any], messages: bool
) -> None:
    path = host.serve(host.image())
    driver = host.boot(path, messages=messages)
    bus = driver.bus
    bus.client.dma_map(DmaMap(1, 0, ROM, GUARD), rom)
    attack(driver)
    bus.wait(0)
    assert bus.read(1, 0x14, 1) & NEEDS_RESET
    again = host.driver(bus)
    again.begin()
    assert again.read(0, 512) == host.image().read_bytes()[:512]


def test_a_ring_that_is_nowhere(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host.boot(host.serve(host.image()))
    again = host.driver(driver.bus)
    again.used = 0x10_0000
    driver.bus.write(1, 0x14, 1, 0)
    monkeypatch.setattr(again.ram, "write", lambda *_: None)
    again.begin()
    monkeypatch.undo()
    again.kick()
    driver.bus.wait(0)
    assert driver.bus.read(1, 0x14, 1) & NEEDS_RESET


@pytest.mark.parametrize(("area", "shift"), [("desc", 8), ("avail", 1), ("used", 2)])
def test_a_ring_that_is_not_aligned(host: Host, area: str, shift: int) -> None:
    driver = host.boot(host.serve(host.image()))
    again = host.driver(driver.bus)
    setattr(again, area, getattr(again, area) + shift)
    again.begin()
    again.kick()
    driver.bus.wait(0)
    assert driver.bus.read(1, 0x14, 1) & NEEDS_RESET


def test_a_descriptor_that_is_in_use(host: Host) -> None:
    path, disk = host.serve_slow()
    driver = host.boot(path)
    request = driver.submit(IN, incoming=[512])
    disk.wait_for(1)
    driver.publish(request.head)
    driver.bus.wait(0)
    assert driver.bus.read(1, 0x14, 1) & NEEDS_RESET
    disk.go.set()


def test_a_table_without_the_feature(host: Host) -> None:
    driver = host.boot(host.serve(host.image()), features=VERSION_1)
    driver.submit(GET_ID, incoming=[20], indirect=True)
    driver.bus.wait(0)
    assert driver.bus.read(1, 0x14, 1) & NEEDS_RESET


def test_a_broken_ring_with_intx(host: Host) -> None:
    driver = host.boot(host.serve(host.image()), intx=True)
    loop(driver)
    driver.bus.wait(0)
    assert driver.bus.read(3, 0, 1) == 2


def test_an_ordinary_descriptor_before_a_table_is_legal(host: Host) -> None:
    """Virtio 1.2, 2.7.5.3.2: the device has to take this."""
    driver = host.boot(host.serve(host.image()))
    at = table(
        driver,
        (driver.incoming.start, 20, WRITE | NEXT, 1),
        (driver.incoming.start + 20, 1, WRITE, 0),
    )
    chain(driver, (header(driver, GET_ID), 16, NEXT, 1), (at, 32, INDIRECT, 0))
    driver.bus.wait(1)
    assert driver.ram.read(driver.used + 4, 8) == struct.pack("<II", 0, 21)


descriptors = st.tuples(
    st.sampled_from([0, 0x10, ROM, 0x4000_0000, 0x4010_0000, 0x401F_FFF0, 0x1_0000_0000, 1 << 63]),
    st.sampled_from([0, 1, 16, 17, 512, 513, 4096, 0x8000, 0xFFFF_FFFF]),
    st.integers(0, 7),
    st.integers(0, 9),
)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(descriptors, min_size=1, max_size=8),
    st.lists(descriptors, max_size=8),
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.booleans(),
)
def test_i9_random_rings_do_not_kill_the_device(
    new_host: Callable[[], Host],
    ring: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    event: bool,
) -> None:
    """Nothing outside of the regions is written, and a reset brings the device back."""
    host = new_host()
    try:
        driver = host.boot(
            host.serve(host.image(size=64 << 10)),
            features=VERSION_1 | F_INDIRECT | (EVENT_IDX if event else 0),
        )
        for index, descriptor in enumerate(ring):
            driver.set_descriptor(index, *descriptor)
        for index, descriptor in enumerate(indirect):
            driver.ram.write(0x4010_0000 + 16 * index, struct.pack("<QIHH", *descriptor))
        for head in heads:
            driver.publish(head)
        driver.bus.unmap()
        driver.bus.map()
        again = host.driver(driver.bus)
        again.begin()
        assert again.read(0, 512)
    finally:
        host.close()
