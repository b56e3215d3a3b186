"""virtio-blk end to end: a driver, a server, real memory and a real image."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.devices.conftest import Driver, Host, Request

SECTOR = 512
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2
VERSION_1, EVENT_IDX, INDIRECT, F_FLUSH, F_RO = 1 << 32, 1 << 29, 1 << 28, 1 << 9, 1 << 5


@pytest.mark.parametrize("intx", [False, True], ids=["msix", "intx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("messages", [False, True], ids=["mapping", "messages"])
def test_reads_and_writes(
    host: Host,
    intx: bool,
    indirect: bool,
    messages: bool,
    make_pattern: Callable[[int, int], bytes],
) -> None:
    image = host.image()
    before = image.read_bytes()
    driver = host.boot(host.serve(image), messages=messages, intx=intx)
    assert driver.read(3, 8192, indirect=indirect) == before[3 * SECTOR : 3 * SECTOR + 8192]
    new = make_pattern(4096, 9)
    driver.write(100, new, indirect=indirect)
    assert driver.read(99, 3 * SECTOR, indirect=indirect) == (
        before[99 * SECTOR : 100 * SECTOR] + new[: 2 * SECTOR]
    )
    assert image.read_bytes()[100 * SECTOR : 100 * SECTOR + 4096] == new


@pytest.mark.parametrize("messages", [False, True], ids=["mapping", "messages"])
def test_data_in_pieces_of_any_length(
    host: Host, messages: bool, make_pattern: Callable[[int, int], bytes]
) -> None:
    image = host.image()
    driver = host.boot(host.serve(image), messages=messages)
    data = make_pattern(4 * SECTOR, 5)
    pieces = [data[:1], data[1:700], data[700:2047], data[2047:]]
    assert driver.finish(driver.submit(OUT, 7, pieces, indirect=True)) == OK
    assert image.read_bytes()[7 * SECTOR : 11 * SECTOR] == data
    request = driver.submit(IN, 7, incoming=[3, 500, 1, 1544])
    assert driver.finish(request) == OK
    assert driver.result(request) == data


@pytest.mark.parametrize("messages", [False, True], ids=["mapping", "messages"])
def test_a_request_across_two_regions_and_one_descriptor_for_header_and_data(
    host: Host, messages: bool
) -> None:
    """A driver may cut a request into descriptors as it likes (virtio 1.2, 2.7.4)."""
    image = host.image()
    ram = host.ram
    # Put the two regions side by side, so that one range goes over their border.
    low, high = ram.regions
    border = high[0]
    ram.regions = ((border - low[1], low[1], 0), high)
    bus = host.connect(host.serve(image), messages=messages)
    bus.map()
    driver = host.driver(bus, base=high[0] + 0x1000, end=high[0] + (1 << 20))
    driver.begin()
    at = border - 16 - 100
    ram.write(at, bytes([OUT]) + bytes(7) + bytes([9]) + bytes(7) + b"A" * 512)
    ram.write(at + 1000, b"\xee")
    request = driver.submit_parts([(at, 16 + 512, 0), (at + 1000, 1, 2)], at + 1000, [])
    assert driver.finish(request) == OK
    ram.write(at + 2000, bytes(8) + bytes([9]) + bytes(7))
    data = border - 300
    request = driver.submit_parts(
        [(at + 2000, 7, 0), (at + 2007, 9, 0), (data, 513, 2)], data + 512, [(data, 512)]
    )
    assert driver.finish(request) == OK
    assert driver.result(request) == b"A" * 512


def test_several_requests_are_in_flight_at_once(
    host: Host, make_pattern: Callable[[int, int], bytes]
) -> None:
    path, disk = host.serve_slow(n_workers=4)
    driver = host.boot(path, features=VERSION_1 | INDIRECT | EVENT_IDX)
    requests = [driver.submit(IN, 8 * n, incoming=[4096], indirect=n % 2 == 0) for n in range(10)]
    disk.wait_for(4)
    assert not driver.collect()
    disk.go.set()
    driver.drain()
    image = make_pattern(10 * 4096, 1)
    for number, request in enumerate(requests):
        assert driver.ram.read(request.status, 1) == b"\0"
        assert driver.result(request) == image[number * 4096 : (number + 1) * 4096]


def test_several_queues(host: Host, make_pattern: Callable[[int, int], bytes]) -> None:
    image = host.image()
    bus = host.connect(host.serve(image, n_queues=2))
    bus.map()
    first = host.driver(bus, queue=0, incoming=(0x1_0020_0000, 0x1_0030_0000))
    second = host.driver(
        bus,
        queue=1,
        base=0x1_0000_0000,
        end=0x1_0010_0000,
        incoming=(0x1_0010_0000, 0x1_0020_0000),
    )
    first.begin()
    # The second queue is set up late; this device does not mind.
    second.features, second.free = first.features, list(range(second.size))
    second.set_up_queue()
    data = make_pattern(4096, 4)
    request = second.submit(OUT, 50, [data])
    # Its own interrupt first: a driver that polls the ring may be done before it fires.
    second.wait_interrupt()
    assert second.finish(request) == OK
    assert first.read(50, 4096) == data
    # Interrupts that are under way are there when memory is given back.
    bus.unmap()
    assert bus.fired(2) == 0


def test_written_lengths_are_in_the_used_ring(host: Host) -> None:
    driver = host.boot(host.serve(host.image()))
    for kind, sector, outgoing, incoming, written in (
        (IN, 0, [], [1024], 1025),
        (OUT, 0, [bytes(512)], [], 1),
        (FLUSH, 0, [], [], 1),
        (GET_ID, 0, [], [20], 21),
        (IN, 1 << 40, [], [512], 0),
        (99, 0, [], [], 1),
    ):
        request = driver.submit(kind, sector, outgoing, incoming)
        assert driver.wait_any() == {request.head: written}


def test_get_id_and_flush(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Any] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    driver = host.boot(host.serve(host.image(), serial="target-7"))
    for room in ([20], [4, 16], [20, 100]):
        request = driver.submit(GET_ID, incoming=room)
        assert driver.finish(request) == OK
        assert driver.result(request)[:20] == b"target-7".ljust(20, b"\0")
    driver.write(0, bytes(512))
    assert not synced
    assert driver.finish(driver.submit(FLUSH)) == OK
    assert len(synced) == 1


def test_every_write_is_safe_for_a_driver_that_cannot_flush(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Any] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    driver = host.boot(host.serve(host.image()), features=VERSION_1)
    driver.write(0, bytes(512))
    assert len(synced) == 1


def test_requests_that_fail_leave_the_disk_and_the_device_alone(host: Host) -> None:
    image = host.image()
    before = image.read_bytes()
    last = len(before) // SECTOR
    driver = host.boot(host.serve(image))
    for kind, sector, length in (
        (IN, last, 512),
        (OUT, last, 512),
        (IN, last - 1, 1024),
        (OUT, (1 << 64) - 1, 512),
        (IN, 0, 511),
        (OUT, 0, 513),
    ):
        pieces = {"incoming": [length]} if kind == IN else {"outgoing": [b"x" * length]}
        assert driver.finish(driver.submit(kind, sector, **pieces)) == IOERR
    for kind in (2, 11, 13, 0x80000000):
        assert driver.finish(driver.submit(kind, incoming=[512])) == UNSUPP
    assert image.read_bytes() == before
    assert driver.read(last - 1, 512) == before[-512:]
    assert driver.finish(driver.submit(IN, 5)) == OK


def test_a_read_only_image(host: Host) -> None:
    image = host.image()
    image.chmod(0o400)
    driver = host.boot(host.serve(image, read_only=True), features=VERSION_1 | F_RO)
    before = image.read_bytes()
    assert driver.read(0, 4096) == before[:4096]
    assert driver.finish(driver.submit(OUT, 0, [bytes(512)])) == IOERR
    assert image.read_bytes() == before


def test_an_image_that_shrank(host: Host) -> None:
    image = host.image()
    driver = host.boot(host.serve(image))
    os.truncate(image, 4096)
    assert driver.read(0, 4096)
    assert driver.finish(driver.submit(IN, 4, incoming=[4096])) == IOERR
    assert driver.read(0, 512)


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX], ids=["flags", "event"])
def test_indices_wrap_around(
    host: Host, features: int, make_pattern: Callable[[int, int], bytes]
) -> None:
    driver = host.boot(host.serve(host.image()), features=features)
    start = 0xFFFF - 20
    for address in (driver.used + 2, driver.avail + 2, driver.used + 4 + 8 * driver.size):
        driver.ram.set_u16(address, start)
    driver.ram.set_u16(driver.avail + 4 + 2 * driver.size, start)
    driver.seen = driver.submitted = start
    content = make_pattern(64 * SECTOR, 1)
    for number in range(48):
        assert driver.read(number, SECTOR) == content[number * SECTOR : (number + 1) * SECTOR]
    assert driver.seen == start + 48 & 0xFFFF


def test_a_driver_may_suppress_interrupts(host: Host) -> None:
    driver = host.boot(host.serve(host.image()))
    driver.ram.set_u16(driver.avail, 1)
    request = driver.submit(GET_ID, incoming=[20])
    while not driver.collect():
        pass
    driver.bus.unmap()
    assert driver.bus.fired(1) == 0
    driver.bus.map()
    driver.ram.set_u16(driver.avail, 0)
    request = driver.submit(GET_ID, incoming=[20])
    driver.bus.wait(1)
    assert request.head in driver.collect()


requests = st.tuples(
    st.sampled_from([IN, IN, OUT, OUT, FLUSH, GET_ID, 77]),
    st.integers(0, 70),
    st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    st.booleans(),
)
setups = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 4]))


@settings(max_examples=25, deadline=None)
@given(setups, st.lists(st.lists(requests, min_size=1, max_size=6), min_size=1, max_size=8))
def test_any_mix_of_requests_is_what_a_plain_array_does(
    new_host: Callable[[], Host],
    setup: tuple[bool, bool, bool, int],
    batches: list[list[tuple[int, int, list[Any], bool]]],
) -> None:
    """A batch is in flight together; its requests touch no sector twice, so their order is free."""
    messages, intx, event, workers = setup
    host = new_host()
    try:
        image = host.image(size=64 * SECTOR)
        disk = bytearray(image.read_bytes())
        features = VERSION_1 | INDIRECT | (EVENT_IDX if event else 0)
        driver = host.boot(
            host.serve(image, n_workers=workers, serial="oracle"),
            messages=messages,
            intx=intx,
            features=features,
        )
        for batch in batches:
            _run_batch(driver, disk, batch)
        assert image.read_bytes() == disk
    finally:
        host.close()


def _run_batch(
    driver: Driver, disk: bytearray, batch: list[tuple[int, int, list[int], bool]]
) -> None:
    expected: list[tuple[Request, int, bytes | None]] = []
    busy: set[int] = set()
    for kind, sector, pieces, indirect in batch:
        length = sum(pieces)
        sectors = set(range(sector, sector + -(-length // SECTOR))) if kind in (IN, OUT) else set()
        if busy & sectors or len(driver.free) < len(pieces) + 2:
            continue
        busy |= sectors
        on_disk = length % SECTOR == 0 and sector * SECTOR + length <= len(disk)
        start = sector * SECTOR
        if kind == OUT:
            data = [os.urandom(piece) for piece in pieces]
            request = driver.submit(kind, sector, data, indirect=indirect)
            if on_disk:
                disk[start : start + length] = b"".join(data)
            expected.append((request, OK if on_disk else IOERR, None))
            continue
        request = driver.submit(kind, sector, incoming=pieces, indirect=indirect)
        if kind == IN:
            want = bytes(disk[start : start + length]) if on_disk else None
            expected.append((request, OK if on_disk else IOERR, want))
        elif kind == GET_ID:
            want = b"oracle".ljust(20, b"\0")[:length]
            expected.append((request, OK, want))
        else:
            expected.append((request, OK if kind == FLUSH else UNSUPP, None))
    driver.drain()
    for request, status, want in expected:
        assert driver.ram.read(request.status, 1) == bytes([status])
        if want is not None:
            assert driver.result(request)[: len(want)] == want
