"""A device goes on where another one stopped: by its v2 state, or by a replay of its registers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.devices.state_stream import Section, pack_section, unpack_stream
from sync.vfio_user.protocol import Feature, MigrationState, VfioUserError
from tests.lab.devices.conftest import Bus, Driver, Host

STOP, RUNNING = MigrationState.STOP, MigrationState.RUNNING
STOP_COPY, RESUMING = MigrationState.STOP_COPY, MigrationState.RESUMING
PRE_COPY, ERROR = MigrationState.PRE_COPY, MigrationState.ERROR

IN, OUT, GET_ID = 0, 1, 8
SECTOR = 512
VERSION_1, EVENT_IDX, INDIRECT, FLUSH = 1 << 32, 1 << 29, 1 << 28, 1 << 9
FEATURES = {"flags": VERSION_1 | INDIRECT | FLUSH, "event": VERSION_1 | INDIRECT | EVENT_IDX}


@pytest.fixture
def image(host: Host) -> Path:
    return host.image()


def attach(driver: Driver, bus: Bus, *, intx: bool = False) -> None:
    """The driver goes on with another bus, as a guest does after it was moved."""
    driver.bus = bus
    bus.use_irqs(0 if intx else 2, 1 if intx else driver_vectors(bus))


def driver_vectors(bus: Bus) -> int:
    return bus.client.irq_info(2).count


def transfer(source: Bus, target: Bus, chunk: int = 64) -> None:
    stream = source.read_stream()
    target.set_state(RESUMING)
    for at in range(0, len(stream), chunk):
        target.client.mig_write(stream[at : at + chunk])
    target.set_state(STOP)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("intx", [False, True], ids=["msix", "intx"])
@pytest.mark.parametrize("pre_copy", [False, True], ids=["stop", "pre-copy"])
def test_v2_moves_a_device_under_load(
    host: Host, image: Path, features: int, intx: bool, pre_copy: bool
) -> None:
    driver = host.boot(host.serve(image, v2=True), features=features, intx=intx)
    source = driver.bus
    target = host.connect(host.serve(image, v2=True))
    content = image.read_bytes()
    submitted = [
        (driver.submit(IN, 8 * n, incoming=[4096], indirect=True), 8 * n) for n in range(20)
    ]
    identity = b""
    if pre_copy:
        source.set_state(PRE_COPY)
        identity = source.read_stream()
        assert identity
        assert source.client.mig_read(10) == b""
    source.set_state(STOP_COPY)
    # Some are completed, some are not even fetched. These were submitted to a stopped device.
    submitted += [(driver.submit(IN, 8 * n, incoming=[4096]), 8 * n) for n in range(20, 26)]
    before = bytes(driver.ram.bytes)
    stream = identity + source.read_stream()
    assert source.state() == STOP_COPY
    source.unmap()

    target.set_state(RESUMING)
    for at in range(0, len(stream), 50):
        target.client.mig_write(stream[at : at + 50])
    target.set_state(STOP)
    target.map()
    attach(driver, target, intx=intx)
    assert bytes(driver.ram.bytes) == before
    target.set_state(RUNNING)
    driver.kick()
    driver.collect()
    driver.drain()
    for request, sector in submitted:
        assert driver.ram.read(request.status, 1) == b"\0"
        assert driver.result(request) == content[SECTOR * sector : SECTOR * sector + 4096]
    driver.write(5, b"moved" * 1024)
    assert image.read_bytes()[5 * SECTOR :][:5120] == b"moved" * 1024


def test_v2_carries_every_register(host: Host, image: Path) -> None:
    source = host.connect(host.serve(image, v2=True, n_queues=2))
    source.map()
    driver = host.driver(source)
    driver.begin()
    source.set_config(0x10, 4, 0xFEB0_0000)
    source.set_config(0x3C, 1, 11)
    source.client.region_write(1, 0, bytes(range(4, 20)))
    source.write(1, 0x16, 2, 1)
    source.write(1, 0x20, 8, 0x1234_5000)
    source.write(1, 0x00, 4, 1)
    target = host.connect(host.serve(image, v2=True, n_queues=2))
    source.set_state(STOP_COPY)
    transfer(source, target)
    for region, size in ((0, 0x4000), (1, 0x1000), (7, 256)):
        mine, theirs = (bus.client.region_read(region, 0, size) for bus in (source, target))
        assert mine == theirs
    assert target.state() == STOP


def test_v2_back_and_forth_and_an_abort(host: Host, image: Path) -> None:
    driver = host.boot(host.serve(image, v2=True))
    buses = [driver.bus, host.connect(host.serve(image, v2=True))]
    content = image.read_bytes()
    for turn in range(4):
        source, target = buses[turn % 2], buses[(turn + 1) % 2]
        source.set_state(PRE_COPY)
        source.set_state(RUNNING)
        assert driver.read(turn, SECTOR) == content[turn * SECTOR :][:SECTOR]
        source.set_state(STOP_COPY)
        transfer(source, target)
        source.set_state(RUNNING)
        assert driver.read(turn, SECTOR) == content[turn * SECTOR :][:SECTOR]
        # Now for real; what the target was given before is of no use any more.
        source.set_state(STOP_COPY)
        transfer(source, target)
        source.unmap()
        target.map()
        attach(driver, target)
        target.set_state(RUNNING)
        assert driver.read(turn, SECTOR) == content[turn * SECTOR :][:SECTOR]
        source.client.reset()
        assert source.state() == RUNNING


def test_a_stopped_device_completes_and_then_touches_nothing(host: Host) -> None:
    path, disk = host.serve_slow(v2=True)
    driver = host.boot(path)
    first = driver.submit(IN, incoming=[512])
    disk.wait_for(1)
    disk.go.set()
    driver.bus.set_state(STOP)
    assert first.head in driver.collect()
    before = bytes(driver.ram.bytes)
    second = driver.submit(GET_ID, incoming=[20], kick=False)
    submitted = bytes(driver.ram.bytes)
    assert submitted != before
    driver.kick()
    driver.bus.unmap()
    driver.bus.map()
    assert bytes(driver.ram.bytes) == submitted
    driver.bus.set_state(RUNNING)
    assert driver.finish(second) == 0


def test_a_device_that_is_not_migratable_says_so(host: Host, image: Path) -> None:
    bus = host.connect(host.serve(image))
    for call in (
        bus.state,
        lambda: bus.set_state(STOP),
        lambda: bus.client.mig_read(10),
        lambda: bus.client.mig_write(b"x"),
    ):
        with pytest.raises(VfioUserError):
            call()


def test_what_a_migratable_device_offers(host: Host, image: Path) -> None:
    bus = host.connect(host.serve(image, v2=True))
    assert bus.client.feature(Feature.get(1, 8)).data == b"\5" + bytes(7)
    bus.client.feature(Feature.probe(2, 1 << 16 | 1 << 17))
    with pytest.raises(VfioUserError):
        bus.client.feature(Feature.probe(1, 1 << 17))
    assert bus.state() == RUNNING
    for state in (ERROR,):
        with pytest.raises(VfioUserError):
            bus.set_state(state)
    bus.set_state(STOP_COPY)
    with pytest.raises(VfioUserError):
        bus.set_state(PRE_COPY)
    bus.set_state(STOP)
    for call in (lambda: bus.client.mig_read(1), lambda: bus.client.mig_write(b"x")):
        with pytest.raises(VfioUserError):
            call()


def corrupted(stream: bytes) -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "cut", stream[:-1]
    yield "longer", stream + b"x"
    yield "flipped", stream[:-5] + bytes([stream[-5] ^ 1]) + stream[-4:]
    yield "twice", stream + stream


def test_i9_data_that_is_no_state_is_refused_and_changes_nothing(host: Host, image: Path) -> None:
    driver = host.boot(host.serve(image, v2=True))
    driver.bus.set_state(STOP_COPY)
    stream = driver.bus.read_stream()
    path = host.serve(image, v2=True)
    target = host.connect(path)
    target.set_config(4, 2, 2)
    for _, bad in corrupted(stream):
        before = [target.client.region_read(region, 0, 256) for region in (0, 7)]
        target.set_state(RESUMING)
        if bad:
            target.client.mig_write(bad)
        with pytest.raises(VfioUserError):
            target.set_state(STOP)
        assert target.state() == ERROR
        assert [target.client.region_read(region, 0, 256) for region in (0, 7)] == before
        with pytest.raises(VfioUserError):
            target.set_state(RUNNING)
        target.client.reset()
        assert target.state() == RUNNING
        target.set_config(4, 2, 2)
    target.set_state(RESUMING)
    with pytest.raises(VfioUserError):
        for _ in range(3):
            target.client.mig_write(bytes(1 << 19))


@pytest.mark.parametrize(
    "other", [{"n_queues": 2}, {"read_only": True}, {"size": 1 << 20}], ids=["queues", "ro", "size"]
)
def test_a_device_that_is_built_differently_is_refused(
    host: Host, image: Path, other: dict[str, Any]
) -> None:
    source = host.connect(host.serve(image, v2=True))
    source.set_state(STOP_COPY)
    other_image = host.image(size=other.pop("size", 4 << 20))
    target = host.connect(host.serve(other_image, v2=True, **other))
    with pytest.raises(VfioUserError):
        transfer(source, target)


def test_the_serial_tells_devices_apart_and_does_not_hinder(host: Host, image: Path) -> None:
    driver = host.boot(host.serve(image, v2=True, serial="here"))
    source = driver.bus
    target = host.connect(host.serve(image, v2=True, serial="there"))
    source.set_state(STOP_COPY)
    transfer(source, target)
    source.unmap()
    target.map()
    attach(driver, target)
    target.set_state(RUNNING)
    request = driver.submit(GET_ID, incoming=[20])
    assert driver.finish(request) == 0
    assert driver.result(request) == b"there".ljust(20, b"\0")


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 400))
def test_i9_a_state_with_a_right_checksum_and_wrong_content(
    new_host: Callable[[], Host], noise: bytes, at: int
) -> None:
    """Who can write a checksum can write anything: the content is checked, too."""
    host = new_host()
    try:
        image = host.image(size=64 << 10)
        driver = host.boot(host.serve(image, v2=True))
        driver.bus.set_state(STOP_COPY)
        identity, state = unpack_stream(driver.bus.read_stream())
        start = at % len(state)
        bad = state[:start] + noise + state[start + len(noise) :]
        target = host.connect(host.serve(image, v2=True))
        target.set_state(RESUMING)
        target.client.mig_write(
            pack_section(Section.IDENTITY, identity) + pack_section(Section.STATE, bad)
        )
        try:
            target.set_state(RUNNING)
        except VfioUserError:
            assert target.state() == ERROR
        target.map()
        target.unmap()
        target.client.reset()
        target.map()
        again = host.driver(target)
        again.begin()
        assert again.read(0, SECTOR)
    finally:
        host.close()


def snapshot(bus: Bus) -> list[tuple[int, int, int]]:
    """The registers that a driver wrote, as a replay would write them."""
    queue = [(0x18, 2), (0x1A, 2), (0x20, 8), (0x28, 8), (0x30, 8), (0x1C, 2)]
    writes = []
    for half in (0, 1):
        bus.write(1, 8, 4, half)
        writes += [(8, 4, half), (0xC, 4, bus.read(1, 0xC, 4))]
    status = bus.read(1, 0x14, 1)
    writes += [(0x10, 2, bus.read(1, 0x10, 2)), (0x14, 1, status & ~4)]
    for index in range(bus.read(1, 0x12, 2)):
        bus.write(1, 0x16, 2, index)
        writes += [(0x16, 2, index)]
        writes += [(offset, size, bus.read(1, offset, size)) for offset, size in queue]
    return [*writes, (0x14, 1, status)]


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("intx", [False, True], ids=["msix", "intx"])
def test_i4_a_replay_of_registers_moves_a_device_that_offers_nothing(
    host: Host, features: int, intx: bool
) -> None:
    """The target finds its place in the ring by itself, and touches nothing before a doorbell."""
    image = host.image()
    driver = host.boot(host.serve(image), features=features, intx=intx)
    source = driver.bus
    for sector in range(70):
        driver.read(sector, SECTOR)
    left = [driver.submit(IN, 8 * n, incoming=[4096]) for n in range(10)]
    source.unmap()
    left += [driver.submit(IN, 8 * n, incoming=[4096], kick=False) for n in range(10, 15)]
    target = host.connect(host.serve(image))
    target.set_config(4, 2, source.config(4, 2))
    control = source.caps[0x11][3] + 2
    target.set_config(control, 2, source.config(control, 2))
    for offset, size, value in snapshot(source):
        target.write(1, offset, size, value)
    before = bytes(driver.ram.bytes)
    target.map()
    attach(driver, target, intx=intx)
    target.unmap()
    target.map()
    assert bytes(driver.ram.bytes) == before
    driver.collect()
    driver.kick()
    driver.drain()
    content = image.read_bytes()
    for number, request in enumerate(left):
        assert driver.result(request) == content[4096 * number : 4096 * (number + 1)]
    driver.write(3, bytes(SECTOR))
