"""What a virtio driver meets in the registers, step by step."""

import os
from pathlib import Path
from typing import Any

import pytest

from lab.devices.disk import Disk
from lab.devices.errors import DeviceError
from lab.devices.virtio.blk import VirtioBlk
from sync.vfio_user.protocol import DmaUnmap, IrqSet, SetIrqs, VfioUserError
from tests.lab.devices.conftest import Bus, Host

COMMON, NOTIFY, ISR, DEVICE, WINDOW, MSIX = 1, 2, 3, 4, 5, 0x11
VERSION_1, EVENT_IDX, INDIRECT, FLUSH = 1 << 32, 1 << 29, 1 << 28, 1 << 9
LOW = 0x4000_0000
CONFIG = 7


@pytest.fixture
def bus(host: Host) -> Bus:
    return host.connect(host.serve(host.image(), n_queues=3))


def status(bus: Bus) -> int:
    return bus.read(COMMON, 0x14, 1)


def features(bus: Bus) -> int:
    found = 0
    for half in (0, 1, 2):
        bus.write(COMMON, 0, 4, half)
        found |= bus.read(COMMON, 4, 4) << 32 * half
    return found


def negotiate(bus: Bus, wanted: int) -> bool:
    for value in (0, 1, 3):
        bus.write(COMMON, 0x14, 1, value)
    for half in (0, 1):
        bus.write(COMMON, 8, 4, half)
        bus.write(COMMON, 12, 4, wanted >> 32 * half & 0xFFFF_FFFF)
    bus.write(COMMON, 0x14, 1, 11)
    return bool(status(bus) & 8)


def test_a_driver_finds_its_structures(bus: Bus) -> None:
    assert bus.config(0, 4) == 0x1042_1AF4
    assert bus.config(8, 1) >= 1
    assert set(bus.caps) == {COMMON, NOTIFY, ISR, DEVICE, WINDOW, MSIX}
    assert bus.caps[COMMON][:3] == (0, 0x0000, 0x38)
    assert bus.caps[ISR][:3] == (0, 0x1000, 1)
    assert bus.caps[DEVICE][:3] == (0, 0x2000, 36)
    assert bus.caps[NOTIFY][:3] == (0, 0x3000, 12)
    assert bus.config(bus.caps[NOTIFY][3] + 16, 4) == 4
    assert bus.config(bus.caps[MSIX][3] + 2, 2) == 3
    assert bus.config(bus.caps[MSIX][3] + 4, 4) == 1
    assert bus.config(bus.caps[MSIX][3] + 8, 4) == 0x801
    kinds = (MSIX, COMMON, NOTIFY, ISR, DEVICE, WINDOW)
    assert [bus.caps[kind][3] for kind in kinds] == [0x40, 0x4C, 0x5C, 0x70, 0x80, 0x90]


def test_regions_and_interrupts(bus: Bus) -> None:
    info = bus.client.device_info()
    assert (info.flags, info.num_regions, info.num_irqs) == (3, 9, 5)
    sizes = [bus.client.region_info(index).size for index in range(9)]
    assert sizes == [0x4000, 0x1000, 0, 0, 0, 0, 0, 256, 0]
    assert all(not bus.client.region_info(index).flags & 4 for index in range(9))
    assert [bus.client.irq_info(index).count for index in range(5)] == [1, 0, 4, 0, 0]


def test_device_configuration(host: Host) -> None:
    bus = host.connect(host.serve(host.image(size=10 * 512 + 100)))
    assert bus.read(DEVICE, 0, 8) == 10
    assert bus.read(DEVICE, 12, 4) == 254
    assert bus.read(DEVICE, 20, 4) == 512
    assert bus.read(DEVICE, 34, 2) == 1
    bus.write(DEVICE, 0, 8, 99)
    assert bus.read(DEVICE, 0, 8) == 10
    assert bus.read(DEVICE, 36, 8) == 0


def test_features_are_accepted_only_if_they_were_offered(bus: Bus) -> None:
    offered = features(bus)
    assert offered & (VERSION_1 | EVENT_IDX | INDIRECT | FLUSH) == (
        VERSION_1 | EVENT_IDX | INDIRECT | FLUSH
    )
    assert not offered & 1 << 5
    assert not negotiate(bus, VERSION_1 | 1 << 40)
    assert not negotiate(bus, FLUSH)
    assert negotiate(bus, offered)
    bus.write(COMMON, 8, 4, 1)
    bus.write(COMMON, 12, 4, 0)
    assert bus.read(COMMON, 12, 4) == offered >> 32


def test_a_driver_cannot_skip_a_step(bus: Bus) -> None:
    bus.write(COMMON, 0x14, 1, 7)
    assert status(bus) == 3
    assert negotiate(bus, VERSION_1)
    bus.write(COMMON, 0x14, 1, 4)
    assert status(bus) == 15
    bus.write(COMMON, 0x14, 1, 0x40)
    assert status(bus) == 15
    bus.write(COMMON, 0x14, 1, 0x80)
    assert status(bus) == 0x8F
    bus.write(COMMON, 0x14, 1, 0)
    assert status(bus) == 0


def test_queue_registers_are_banked(bus: Bus) -> None:
    assert bus.read(COMMON, 0x12, 2) == 3
    for queue in range(3):
        bus.write(COMMON, 0x16, 2, queue)
        assert bus.read(COMMON, 0x18, 2) == 256
        bus.write(COMMON, 0x18, 2, 1 << queue)
        bus.write(COMMON, 0x1A, 2, queue)
        bus.write(COMMON, 0x20, 4, 0x1000 * queue)
        bus.write(COMMON, 0x24, 4, queue)
        bus.write(COMMON, 0x28, 8, 0x2000 * queue)
        bus.write(COMMON, 0x30, 8, 0x3000 * queue)
    for queue in range(3):
        bus.write(COMMON, 0x16, 2, queue)
        assert bus.read(COMMON, 0x18, 2) == 1 << queue
        assert bus.read(COMMON, 0x1A, 2) == queue
        assert bus.read(COMMON, 0x1E, 2) == queue
        assert bus.read(COMMON, 0x20, 8) == queue << 32 | 0x1000 * queue
        assert bus.read(COMMON, 0x28, 8) == 0x2000 * queue
        assert bus.read(COMMON, 0x30, 8) == 0x3000 * queue
        assert bus.read(COMMON, 0x1C, 2) == 0


def test_a_queue_that_is_not_there(bus: Bus) -> None:
    bus.write(COMMON, 0x16, 2, 3)
    for offset in (0x18, 0x1C, 0x1E):
        bus.write(COMMON, offset, 2, 1)
        assert bus.read(COMMON, offset, 2) == 0
    bus.write(COMMON, 0x1A, 2, 1)
    assert bus.read(COMMON, 0x1A, 2) == 0xFFFF
    bus.write(COMMON, 0x20, 8, 4096)
    assert bus.read(COMMON, 0x20, 8) == 0


@pytest.mark.parametrize("size", [0, 3, 512, 0xFFFF])
def test_sizes_that_a_queue_cannot_have(bus: Bus, size: int) -> None:
    bus.write(COMMON, 0x18, 2, size)
    assert bus.read(COMMON, 0x18, 2) == 256


def test_an_enabled_queue_does_not_change(bus: Bus) -> None:
    bus.write(COMMON, 0x20, 8, 0x4000)
    bus.write(COMMON, 0x1C, 2, 1)
    bus.write(COMMON, 0x1C, 2, 0)
    bus.write(COMMON, 0x20, 8, 0x8000)
    bus.write(COMMON, 0x18, 2, 16)
    bus.write(COMMON, 0x1A, 2, 2)
    assert bus.read(COMMON, 0x1C, 2) == 1
    assert bus.read(COMMON, 0x20, 8) == 0x4000
    assert bus.read(COMMON, 0x18, 2) == 256
    assert bus.read(COMMON, 0x1A, 2) == 2


def test_vectors_that_are_not_there(bus: Bus) -> None:
    for offset in (0x10, 0x1A):
        bus.write(COMMON, offset, 2, 3)
        assert bus.read(COMMON, offset, 2) == 3
        bus.write(COMMON, offset, 2, 4)
        assert bus.read(COMMON, offset, 2) == 0xFFFF


def test_registers_take_accesses_of_any_shape(bus: Bus) -> None:
    bus.write(COMMON, 0x20, 1, 0x11)
    bus.write(COMMON, 0x21, 2, 0x3322)
    bus.write(COMMON, 0x27, 1, 0x88)
    assert bus.read(COMMON, 0x20, 8) == 0x8800_0000_0033_2211
    assert bus.read(COMMON, 0x12, 8) >> 48 == 256
    assert bus.read(COMMON, 0x30, 16) == 0
    bus.write(COMMON, 0x30, 16, 1)
    assert bus.read(COMMON, 0x30, 8) == 1
    assert bus.read(ISR, 0, 4) == 0
    assert bus.read(NOTIFY, 0, 4) == 0
    bus.write(ISR, 0, 4, 1)
    bus.write(NOTIFY, 0, 2, 0)
    bus.write(NOTIFY, 0xFFC, 4, 1)


def test_the_window_shows_the_bars(bus: Bus) -> None:
    window = bus.caps[WINDOW][3]

    def point(bar: int, offset: int, length: int) -> None:
        bus.set_config(window + 4, 1, bar)
        bus.set_config(window + 8, 4, offset)
        bus.set_config(window + 12, 4, length)

    point(0, 0x2000, 4)
    assert bus.config(window + 16, 4) == 4 * (1 << 20) // 512
    point(0, 0x14, 1)
    bus.set_config(window + 16, 1, 1)
    assert status(bus) == 1
    assert bus.config(window + 16, 1) == 1
    for bar, offset, length in ((2, 0, 4), (0, 1, 2), (0, 0, 3), (0, 0, 8), (0, 0x4000, 4)):
        point(bar, offset, length)
        bus.set_config(window + 16, 4, 0)
        assert bus.config(window + 16, 4) == 0
    assert status(bus) == 1
    bus.client.region_read(CONFIG, 0, 256)


def test_the_msix_bar(bus: Bus) -> None:
    table = bytes(range(4, 20))
    bus.client.region_write(1, 16, table)
    assert bus.client.region_read(1, 16, 15) == table[:12] + bytes([table[12] & 1, 0, 0])
    bus.client.region_write(1, 0x800, b"\xff")
    assert bus.client.region_read(1, 0x800, 8) == bytes(8)


def test_interrupts_before_anybody_listens_are_pending(host: Host) -> None:
    driver = host.boot(host.serve(host.image()))
    bus = driver.bus
    bus.use_irqs(2, 2)
    bus.client.set_irqs(_all_off(2))
    driver.submit(8, incoming=[20])
    while not driver.collect():
        pass
    bus.client.dma_unmap(DmaUnmap(0, *driver.ram.regions[1][:2]))
    assert bus.client.region_read(1, 0x800, 1) == b"\2"
    bus.use_irqs(2, 2)
    bus.wait(1)
    assert bus.client.region_read(1, 0x800, 1) == b"\0"


def test_intx_follows_the_isr(host: Host) -> None:
    driver = host.boot(host.serve(host.image()), intx=True)
    bus = driver.bus
    driver.submit(8, incoming=[20])
    bus.wait(0)
    assert bus.config(6, 1) & 8
    bus.unmask()
    bus.wait(0)
    assert bus.read(ISR, 0, 1) == 1
    assert not bus.config(6, 1) & 8
    bus.unmask()
    assert bus.read(ISR, 0, 1) == 0
    assert bus.fired(0) == 0
    bus.set_config(4, 2, 0x406)
    driver.submit(8, incoming=[20])
    while len(driver.pending) > 0:
        driver.collect()
    bus.unmap()
    assert bus.fired(0) == 0
    assert bus.config(6, 1) & 8
    bus.set_config(4, 2, 0x006)
    bus.wait(0)
    # A driver that turns MSI-X on takes the line down.
    bus.set_config(bus.caps[MSIX][3] + 2, 2, 0x8000)
    bus.unmask()
    assert bus.fired(0) == 0
    assert not bus.config(6, 1) & 8


def test_a_reset_by_the_driver_ends_dma_and_clears_everything(host: Host) -> None:
    path, disk = host.serve_slow()
    driver = host.boot(path)
    bus = driver.bus
    driver.submit(0, incoming=[512])
    disk.wait_for(1)
    disk.go.set()
    bus.write(COMMON, 0x14, 1, 0)
    assert status(bus) == 0
    image = bytes(driver.ram.bytes)
    for offset in (0x00, 0x08, 0x16, 0x1C):
        assert bus.read(COMMON, offset, 2) == 0
    assert bus.read(COMMON, 0x10, 2) == bus.read(COMMON, 0x1A, 2) == 0xFFFF
    assert bus.read(COMMON, 0x18, 2) == 256
    assert bus.read(COMMON, 0x20, 8) == 0
    driver.kick()
    bus.unmap()
    assert bytes(driver.ram.bytes) == image


def test_a_device_reset_clears_the_configuration_too(host: Host) -> None:
    driver = host.boot(host.serve(host.image()))
    bus = driver.bus
    bus.set_config(0x10, 4, 0xFEB0_0000)
    bus.client.region_write(1, 0, b"\xff" * 16)
    bus.client.reset()
    assert bus.config(4, 2) == bus.config(0x10, 4) == 0
    assert bus.config(bus.caps[MSIX][3] + 2, 2) == 1
    assert bus.client.region_read(1, 0, 16) == bytes(12) + b"\1\0\0\0"
    assert status(bus) == 0
    again = host.driver(bus)
    again.begin()
    assert again.read(0, 512)


def test_no_dma_without_bus_mastering(host: Host) -> None:
    driver = host.boot(host.serve(host.image()))
    bus = driver.bus
    bus.set_config(4, 2, 0x0002)
    request = driver.submit(8, incoming=[20])
    before = bytes(driver.ram.bytes)
    bus.unmap()
    bus.map()
    assert bytes(driver.ram.bytes) == before
    bus.set_config(4, 2, 0x0006)
    assert driver.finish(request) == 0


def test_a_notification_before_driver_ok_is_not_lost(host: Host) -> None:
    bus = host.connect(host.serve(host.image()))
    bus.map()
    driver = host.driver(bus)
    bus.set_config(4, 2, 6)
    assert negotiate(bus, VERSION_1)
    bus.use_irqs(2, 2)
    driver.set_up_queue()
    request = driver.submit(8, incoming=[20])
    assert not driver.collect()
    bus.write(COMMON, 0x14, 1, 15)
    assert driver.finish(request) == 0


def test_accesses_outside_are_refused(bus: Bus) -> None:
    for region, offset, count in (
        (0, 0x4000, 1),
        (0, 0x3FFF, 2),
        (2, 0, 1),
        (7, 256, 1),
        (9, 0, 1),
    ):
        with pytest.raises(VfioUserError):
            bus.client.region_read(region, offset, count)
        with pytest.raises(VfioUserError):
            bus.client.region_write(region, offset, bytes(count))


@pytest.mark.parametrize(
    "options", [{"serial": "x" * 21}, {"serial": "\xe9"}, {"n_queues": 0}, {"n_queues": 65}]
)
def test_options_that_make_no_device(tmp_path: Path, options: dict[str, Any]) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    disk = Disk(image)
    with pytest.raises(DeviceError):
        VirtioBlk(disk, **options)
    disk.close()


def test_images_that_are_no_disk(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(511))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in ("missing", "short", "fifo", "."):
        with pytest.raises(DeviceError, match="image"):
            Disk(tmp_path / path)
        if path != "fifo":
            with pytest.raises(DeviceError, match="image"):
                Disk(tmp_path / path, read_only=True)


def _all_off(index: int) -> SetIrqs:
    return SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, index, 0, 2)
