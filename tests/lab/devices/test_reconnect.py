"""Memory that goes and comes back, and clients that do."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.devices.workers import Hold
from sync.vfio_user.protocol import DmaUnmap, MigrationState
from tests.lab.devices.conftest import Driver, Host, SlowDisk

IN, OUT, GET_ID = 0, 1, 8
SECTOR = 512
VERSION_1, EVENT_IDX, INDIRECT = 1 << 32, 1 << 29, 1 << 28


def reconnect(
    host: Host, driver: Driver, path: Path, *, messages: bool = False, intx: bool = False
) -> None:
    """What a restarted gateway does: connect, map, set interrupts. Registers are left alone."""
    bus = host.connect(path, messages=messages)
    bus.map()
    bus.use_irqs(0 if intx else 2, 1 if intx else 2)
    driver.bus = bus


def watch(disk: SlowDisk, name: str) -> list[Any]:
    """Let the disk go on when the device waits for it; the transfers under way when its memory's
    method `name` is called, or an empty list if it was not."""
    seen = []
    memory, workers = disk.device.memory, disk.device.workers
    method, hold = getattr(memory, name), workers.hold

    def called(*arguments: Any) -> None:
        seen.append(disk.busy)
        method(*arguments)

    def held(reason: Hold) -> None:
        disk.go.set()
        hold(reason)

    setattr(memory, name, called)
    workers.hold = held  # type: ignore[method-assign]
    return seen


def test_unmap_returns_when_requests_in_flight_are_complete(host: Host) -> None:
    path, disk = host.serve_slow()
    driver = host.boot(path)
    requests = [driver.submit(IN, n, incoming=[SECTOR]) for n in range(3)]
    disk.wait_for(3)
    seen = watch(disk, "unmap")
    driver.bus.client.dma_unmap(DmaUnmap(0, *driver.ram.regions[1][:2]))
    assert seen == [0]
    # Data, used ring and interrupt: all there when the reply is.
    assert set(driver.collect()) == {request.head for request in requests}
    assert driver.bus.fired(1) == 3
    assert all(driver.ram.read(request.status, 1) == b"\0" for request in requests)


def test_a_client_that_goes_is_let_go_when_nothing_uses_its_memory(host: Host) -> None:
    path, disk = host.serve_slow()
    driver = host.boot(path)
    requests = [driver.submit(IN, n, incoming=[SECTOR]) for n in range(3)]
    disk.wait_for(3)
    seen = watch(disk, "unmap_all")
    driver.bus.close()
    host.connect(path).read(1, 0x14, 1)
    assert seen == [0]
    # What was under way has not been completed: nobody was there any more.
    assert not driver.collect()
    assert all(driver.ram.read(request.status, 1) == b"\xee" for request in requests)


def test_a_device_touches_nothing_that_is_unmapped(host: Host) -> None:
    driver = host.boot(host.serve(host.image()))
    driver.bus.unmap()
    before = bytes(driver.ram.bytes)
    request = driver.submit(GET_ID, incoming=[20])
    submitted = bytes(driver.ram.bytes)
    assert submitted != before
    for _ in range(3):
        driver.kick()
    assert driver.bus.read(1, 0x14, 1) == 15
    assert bytes(driver.ram.bytes) == submitted
    driver.bus.map()
    assert driver.finish(request) == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["rings-first", "data-first"])
def test_memory_may_come_back_in_pieces(host: Host, order: tuple[int, int]) -> None:
    """Rings and headers are in one region, data in another; the device waits for both."""
    driver = host.boot(host.serve(host.image()))
    bus, regions = driver.bus, driver.ram.regions
    driver.read(0, SECTOR)
    bus.unmap()
    request = driver.submit(IN, 5, incoming=[SECTOR])
    bus.map_one(*regions[order[0]])
    driver.kick()
    assert bus.read(1, 0x14, 1) == 15
    bus.map_one(*regions[order[1]])
    assert driver.finish(request) == 0


def test_a_used_ring_that_is_gone_when_a_request_is_done(host: Host) -> None:
    """The used ring lies in a region of its own: taken with it unmapped, completed with it back."""
    ram = host.ram
    driver = host.boot(host.serve(host.image()))
    bus = driver.bus
    again = host.driver(bus, incoming=(0x1_0000_2000, 0x1_0004_0000))
    again.used = 0x1_0000_0000
    again.begin()
    again.read(0, SECTOR)
    (low, high) = ram.regions
    ram.regions = (
        low,
        (high[0], 0x2000, high[2]),
        (high[0] + 0x2000, high[1] - 0x2000, high[2] + 0x2000),
    )
    bus.client.dma_unmap(DmaUnmap(0, *high[:2]))
    request = again.submit(IN, 3, incoming=[SECTOR])
    bus.map_one(*ram.regions[2])
    bus.map_one(*ram.regions[1])
    assert again.finish(request) == 0


def test_remapping_under_load(host: Host, make_pattern: Callable[[int, int], bytes]) -> None:
    driver = host.boot(host.serve(host.image()), features=VERSION_1 | INDIRECT | EVENT_IDX)
    content = make_pattern(64 * 4096, 1)
    requests = []
    for n in range(60):
        while len(driver.free) < 4:
            driver.wait_any()
        requests.append(driver.submit(IN, 8 * n, incoming=[4096], indirect=True))
        if n % 7 == 0:
            driver.bus.unmap()
            driver.bus.map()
    driver.drain()
    for n, request in enumerate(requests):
        assert driver.result(request) == content[4096 * n : 4096 * (n + 1)]


@pytest.mark.parametrize("intx", [False, True], ids=["msix", "intx"])
@pytest.mark.parametrize("messages", [False, True], ids=["mapping", "messages"])
def test_a_client_that_dies_in_the_middle_loses_nothing(
    host: Host, messages: bool, intx: bool
) -> None:
    path, disk = host.serve_slow(n_workers=3)
    driver = host.boot(path, messages=messages, intx=intx)
    data = b"new" * 512
    reads = [driver.submit(IN, 8 * n, incoming=[4096]) for n in range(4)]
    write = driver.submit(OUT, 100, [data])
    disk.wait_for(3)
    driver.bus.close()
    disk.go.set()
    reconnect(host, driver, path, messages=messages, intx=intx)
    driver.drain()
    for n, request in enumerate(reads):
        assert driver.ram.read(request.status, 1) == b"\0"
        assert driver.result(request)[:8] == (1).to_bytes(8, "little")
        assert driver.result(request)[8:16] == (8 * n).to_bytes(8, "little")
    assert driver.ram.read(write.status, 1) == b"\0"
    assert driver.read(100, len(data)) == data


def test_nothing_is_touched_after_the_client_went(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, disk = host.serve_slow(n_workers=2)
    memory = disk.device.memory
    lose, lost = memory.lose, threading.Event()

    def lose_noted() -> None:
        lose()
        lost.set()

    monkeypatch.setattr(memory, "lose", lose_noted)
    driver = host.boot(path)
    requests = [driver.submit(OUT, n, [bytes(SECTOR)]) for n in range(2)]
    disk.wait_for(2)
    before = bytes(driver.ram.bytes)
    driver.bus.close()
    # Until the server knows, requests may end as usual.
    assert lost.wait(10)
    disk.go.set()
    # The server takes the next client only when the device has let go of the last one.
    bus = host.connect(path)
    assert bytes(driver.ram.bytes) == before
    assert bus.read(1, 0x14, 1) == 15
    driver.bus = bus
    bus.use_irqs(2, 2)
    assert bytes(driver.ram.bytes) == before
    bus.map()
    driver.drain()
    assert [driver.ram.read(request.status, 1) for request in requests] == [b"\0", b"\0"]


@pytest.mark.parametrize("intx", [False, True], ids=["msix", "intx"])
def test_an_interrupt_that_nobody_saw_is_repeated(host: Host, intx: bool) -> None:
    path = host.serve(host.image())
    driver = host.boot(path, intx=intx)
    request = driver.submit(GET_ID, incoming=[20])
    driver.bus.wait(0 if intx else 1)
    driver.bus.close()
    reconnect(host, driver, path, intx=intx)
    driver.wait_interrupt()
    assert request.head in driver.collect()


def test_a_client_that_starts_over_gets_a_fresh_device(host: Host) -> None:
    path, disk = host.serve_slow()
    driver = host.boot(path)
    driver.submit(IN, incoming=[SECTOR])
    disk.wait_for(1)
    driver.bus.close()
    disk.go.set()
    again = host.boot(path)
    assert again.read(0, SECTOR)
    assert not again.collect()


def test_many_reconnects_under_load(host: Host, make_pattern: Callable[[int, int], bytes]) -> None:
    path = host.serve(host.image())
    driver = host.boot(path)
    content = make_pattern(64 * 4096, 1)
    for turn in range(8):
        requests = [driver.submit(IN, 8 * n, incoming=[4096]) for n in range(turn, turn + 12)]
        driver.bus.close()
        reconnect(host, driver, path)
        driver.drain()
        for n, request in enumerate(requests, turn):
            assert driver.result(request) == content[4096 * n : 4096 * (n + 1)]


def test_a_stopped_device_stays_stopped_when_its_client_goes(host: Host) -> None:
    path = host.serve(host.image(), v2=True)
    driver = host.boot(path)
    driver.bus.set_state(MigrationState.STOP_COPY)
    request = driver.submit(GET_ID, incoming=[20])
    driver.bus.close()
    reconnect(host, driver, path)
    assert driver.bus.state() == MigrationState.STOP
    assert not driver.collect()
    driver.bus.set_state(MigrationState.RUNNING)
    assert driver.finish(request) == 0


def test_logging_ends_with_its_client(host: Host) -> None:
    path = host.serve(host.image(), logging_page_bytes=4096)
    driver = host.boot(path)
    driver.bus.start_logging()
    driver.bus.close()
    reconnect(host, driver, path)
    driver.bus.start_logging()
    assert driver.bus.dirty() == set()
