"""DMA logging of a device at work: what changed is reported, at once or at the latest next time."""

import random
import threading

import pytest

from sync.vfio_user.protocol import (
    Feature,
    LoggingControl,
    LoggingReport,
    VfioUserError,
)
from tests.lab.devices.conftest import Bus, Host

IN, OUT, GET_ID = 0, 1, 8
VERSION_1, EVENT_IDX, INDIRECT = 1 << 32, 1 << 29, 1 << 28
HIGH = 0x1_0000_0000


def probe(bus: Bus, index: int) -> bool:
    try:
        bus.client.feature(Feature.probe(index))
    except VfioUserError:
        return False
    return True


def changed(before: dict[int, bytes], after: dict[int, bytes]) -> set[int]:
    return {iova for iova, page in after.items() if before[iova] != page}


def around(iova: int, page: int) -> range:
    """The 4 KiB pages of the page that `iova` is in."""
    return range(iova & -page, (iova & -page) + page, 4096)


def test_a_device_without_logging_says_so(host: Host) -> None:
    bus = host.connect(host.serve(host.image()))
    assert not any(probe(bus, index) for index in (1, 2, 6, 7, 8))
    with pytest.raises(VfioUserError):
        bus.start_logging()


def test_a_device_with_logging_says_so(host: Host) -> None:
    bus = host.connect(host.serve(host.image(), logging_page_bytes=4096))
    assert [probe(bus, index) for index in (1, 2, 6, 7, 8)] == [False, False, True, True, True]
    with pytest.raises(VfioUserError):
        bus.dirty()


@pytest.mark.parametrize("page", [4096, 65536])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_i1_every_page_that_a_request_changes_is_reported(
    host: Host, page: int, indirect: bool
) -> None:
    """Data, status byte and used ring, and no page more."""
    driver = host.boot(host.serve(host.image(), logging_page_bytes=page))
    bus, ram = driver.bus, driver.ram
    assert bus.start_logging() == page
    driver.incoming.at += 0x1_2345
    driver.submit(IN, 0, incoming=[100 * 512], indirect=indirect, kick=False)
    driver.incoming.at += 0x2_0000
    driver.submit(IN, 0, incoming=[511], indirect=indirect, kick=False)
    driver.incoming.at += 0x1_0000
    driver.submit(OUT, 0, [bytes(512)], indirect=indirect, kick=False)
    before = ram.pages()
    driver.kick()
    driver.drain()
    bus.unmap()
    dirty = bus.dirty()
    expected = {page_ for at in changed(before, ram.pages()) for page_ in around(at, page)}
    assert dirty == expected
    assert not bus.dirty()


def test_i1_the_log_is_there_after_the_memory_is_gone(host: Host) -> None:
    driver = host.boot(host.serve(host.image(), logging_page_bytes=4096))
    bus = driver.bus
    bus.start_logging()
    request = driver.submit(IN, 0, incoming=[4096])
    driver.drain()
    bus.unmap()
    assert {at & -4096 for at, _ in request.incoming} <= bus.dirty()


def test_a_failed_read_is_logged_too(host: Host) -> None:
    """The file ends in the middle of the data: what came before is in memory."""
    image = host.image()
    driver = host.boot(host.serve(image, logging_page_bytes=4096))
    with image.open("r+b") as file:
        file.truncate(8192)
    driver.bus.start_logging()
    request = driver.submit(IN, 0, incoming=[4 * 4096])
    assert driver.finish(request) == 1
    at = request.incoming[0][0]
    assert driver.ram.read(at, 8) == image.read_bytes()[:8]
    assert {at & -4096, (at & -4096) + 4096} <= driver.bus.dirty()


def test_writes_by_message_are_not_logged(host: Host) -> None:
    driver = host.boot(host.serve(host.image(), logging_page_bytes=4096), messages=True)
    driver.bus.start_logging()
    assert driver.read(0, 4096)
    assert driver.bus.dirty() == set()


def test_logging_stops_and_begins_again(host: Host) -> None:
    driver = host.boot(host.serve(host.image(), logging_page_bytes=4096))
    bus = driver.bus
    bus.start_logging()
    with pytest.raises(VfioUserError):
        bus.start_logging()
    driver.read(0, 4096)
    bus.client.feature(Feature.set(7, LoggingControl(4096).pack()))
    with pytest.raises(VfioUserError):
        bus.dirty()
    bus.start_logging()
    assert not bus.dirty()


def test_what_cannot_be_logged_or_reported(host: Host) -> None:
    bus = host.connect(host.serve(host.image(), logging_page_bytes=4096))
    with pytest.raises(VfioUserError):
        bus.start_logging(ranges=[(1, 4096)])
    bus.start_logging()
    request = LoggingReport(0, 4096, 2048).pack()
    with pytest.raises(VfioUserError):
        bus.client.feature(Feature.get(8, 100, request))


def test_i1_a_report_before_the_data_arrives_does_not_swallow_it(host: Host) -> None:
    path, disk = host.serve_slow(logging_page_bytes=4096)
    driver = host.boot(path)
    driver.bus.start_logging()
    request = driver.submit(IN, 0, incoming=[8192])
    disk.wait_for(1)
    driver.bus.dirty()
    disk.go.set()
    driver.drain()
    assert {at & -4096 for at, _ in request.incoming} <= driver.bus.dirty()


@pytest.mark.parametrize("kind", [IN, GET_ID], ids=["in", "get-id"])
def test_i1_a_page_is_dirty_before_anybody_can_know_that_it_was_written(
    host: Host, kind: int
) -> None:
    """Rings are reached by message here, so the moment of completion can be looked at."""
    bus = host.connect(host.serve(host.image(), logging_page_bytes=4096))
    low, high = host.ram.regions
    bus.map_one(*high)
    bus.messages = True
    bus.map_one(*low)
    driver = host.driver(bus)
    driver.begin()
    bus.start_logging()
    request = driver.submit(kind, 0, incoming=[512], kick=False)
    reports = []

    def look(iova: int, data: bytes) -> None:
        if iova == driver.used + 2:
            reports.append(bus.dirty())

    bus.on_write = look
    driver.kick()
    driver.drain()
    assert reports == [{request.status & -4096, request.incoming[0][0] & -4096}]


@pytest.mark.parametrize("page", [4096, 65536])
def test_i1_a_copy_made_from_reports_under_load_is_complete(host: Host, page: int) -> None:
    """A pre-copy in miniature: report, copy what was reported, again and again, and once more
    after the device let go of memory. What only the device writes is then the same in the copy.
    """
    driver = host.boot(
        host.serve(host.image(), logging_page_bytes=page, n_workers=4),
        features=VERSION_1 | INDIRECT | EVENT_IDX,
    )
    driver.marks_status = False
    # A small area, so that pages are written again and again.
    driver.incoming = type(driver.incoming)(HIGH, HIGH + (1 << 20))
    bus, ram = driver.bus, driver.ram
    bus.start_logging()
    copy = ram.pages()
    done = threading.Event()

    def load() -> None:
        choose = random.Random(page)
        for _ in range(200):
            while len(driver.free) < 8:
                driver.wait_any()
            if choose.random() < 0.8:
                pieces = [512 * choose.randrange(1, 20), 512 * choose.randrange(1, 20)]
                driver.submit(IN, choose.randrange(4000), incoming=pieces, indirect=True)
            else:
                driver.submit(OUT, choose.randrange(64), [bytes(1024)])
        driver.drain()
        done.set()

    thread = threading.Thread(target=load)
    thread.start()
    rounds = 0
    while not done.is_set() or rounds < 3:
        for iova in bus.dirty():
            copy[iova] = ram.read(iova, 4096)
        rounds += 1
    thread.join()
    bus.unmap()
    for iova in bus.dirty():
        copy[iova] = ram.read(iova, 4096)
    written_by_device = {*range(HIGH, HIGH + (1 << 20), 4096), driver.used}
    assert all(copy[iova] == ram.read(iova, 4096) for iova in written_by_device)
    assert any(copy[iova] != bytes(4096) for iova in written_by_device)
