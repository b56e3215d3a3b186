"""The virtio-pci profile on the project's own virtio-blk device: what a driver did on one device is
found on the other one."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trio.testing import trio_test

from lab.devices.disk import Disk
from lab.devices.virtio.blk import VirtioBlk
from sync.registers.choose import source_for, target_for
from sync.registers.errors import (
    FeatureNotCarried,
    IdentityMismatch,
    RefusedAccess,
    RegisterMismatch,
)
from sync.registers.find import load_profiles
from sync.registers.profile.locate import DeviceView
from sync.registers.record import Access, Op

COMMON, NOTIFY, ISR = 0x0000, 0x3000, 0x1000
CONFIG = 7
PROFILES = load_profiles()
N_QUEUES = 3


class Blk:
    """The device as the model's gateway wants it: `read`, `write`, `reset`."""

    def __init__(self, folder: Path, n_queues: int = N_QUEUES, sectors: int = 8) -> None:
        image = folder / f"{len(list(folder.iterdir()))}.img"
        image.write_bytes(bytes(512 * sectors))
        self.blk = VirtioBlk(Disk(image), n_queues=n_queues, n_workers=1)
        self.writes: list[tuple[int, int, bytes]] = []

    def read(self, region: int, offset: int, size: int) -> bytes:
        return self.blk.region_read(region, offset, size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.writes.append((region, offset, data))
        self.blk.region_write(region, offset, data)

    def reset(self) -> None:
        self.blk.reset()

    def view(self) -> DeviceView:
        sizes = {index: self.blk.region_info(index).size for index in range(9)}
        config = self.read(CONFIG, 0, 256)
        return DeviceView(
            vendor=int.from_bytes(config[0:2], "little"),
            device=int.from_bytes(config[2:4], "little"),
            subsystem_vendor=int.from_bytes(config[0x2C:0x2E], "little"),
            subsystem=int.from_bytes(config[0x2E:0x30], "little"),
            class_code=int.from_bytes(config[9:12], "little"),
            config_space=config,
            region_sizes=sizes,
        )

    def everything(self) -> dict[str, Any]:
        """What a driver can see, by B's own fields and not by registers."""
        common = self.blk.common
        queues = [
            (q.size, q.vector, q.enabled, q.descriptors, q.driver_area, q.device_area)
            for q in common.queues
        ]
        return {
            "config": self.read(CONFIG, 0, 256).hex(),
            "msix": self.read(1, 0, 0x80).hex(),
            "common": self.read(0, COMMON, 0x18).hex(),
            "features": common.driver_features,
            "status": common.status,
            "queues": queues,
        }


class Driver:
    """The steps of a virtio driver (virtio 1.2, 3.1.1), as accesses of a guest."""

    def __init__(self, guest: Any) -> None:
        self.guest = guest

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        data = value.to_bytes(size, "little")
        assert not self.guest.do(Access(Op.WRITE, region, offset, size, data)).failed

    def read(self, region: int, offset: int, size: int) -> int:
        return int.from_bytes(self.guest.do(Access(Op.READ, region, offset, size)).data, "little")

    def enumerate(self) -> None:
        for bar in (0x10, 0x14):
            self.write(CONFIG, bar, 4, 0xFFFFFFFF)
            self.read(CONFIG, bar, 4)
            self.write(CONFIG, bar, 4, 0xFE000000 + 0x10000 * bar)
        self.write(CONFIG, 0x3C, 1, 11)
        self.write(CONFIG, 0x04, 2, 0x0406)
        self.write(CONFIG, 0x42, 2, 0x8000)
        for vector in range(N_QUEUES + 1):
            self.write(1, 16 * vector, 4, 0xFEE00000 + vector)
            self.write(1, 16 * vector + 8, 4, 0x4000 + vector)
            self.write(1, 16 * vector + 12, 4, 0)

    def reset(self) -> None:
        self.write(0, COMMON + 0x14, 1, 0)
        assert self.read(0, COMMON + 0x14, 1) == 0

    def negotiate(self) -> None:
        self.write(0, COMMON + 0x14, 1, 1)
        self.write(0, COMMON + 0x14, 1, 3)
        offered = 0
        for word in (0, 1):
            self.write(0, COMMON + 0x00, 4, word)
            offered |= self.read(0, COMMON + 0x04, 4) << 32 * word
        for word in (0, 1):
            self.write(0, COMMON + 0x08, 4, word)
            self.write(0, COMMON + 0x0C, 4, offered >> 32 * word & 0xFFFFFFFF)
        self.write(0, COMMON + 0x14, 1, 0x0B)
        assert self.read(0, COMMON + 0x14, 1) == 0x0B

    def set_up(self, queue: int) -> None:
        self.write(0, COMMON + 0x16, 2, queue)
        self.write(0, COMMON + 0x18, 2, 64)
        self.write(0, COMMON + 0x1A, 2, queue + 1)
        for offset, address in ((0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000)):
            self.write(0, COMMON + offset, 4, address + 0x10000 * queue)
            self.write(0, COMMON + offset + 4, 4, 1)
        self.write(0, COMMON + 0x1C, 2, 1)

    def finish(self) -> None:
        self.write(0, COMMON + 0x10, 2, 0)
        self.write(0, COMMON + 0x14, 1, 0x0F)

    def ring(self, queue: int) -> None:
        self.write(0, NOTIFY + 4 * queue, 2, queue)

    def steps(self) -> list[Any]:
        return [
            self.enumerate,
            self.reset,
            self.negotiate,
            lambda: self.set_up(0),
            lambda: self.ring(0),
            lambda: self.set_up(2),
            self.finish,
            lambda: self.ring(2),
            lambda: self.ring(0),
            lambda: self.read(0, ISR, 1),
        ]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Any]:
    made: list[Blk] = []

    def make(**options: Any) -> Blk:
        made.append(Blk(tmp_path, **options))
        return made[-1]

    yield make
    for blk in made:
        blk.blk.close()


@pytest.mark.parametrize("at", range(11))
@trio_test
async def test_i4_a_driver_at_any_step_is_carried_over(
    model: SimpleNamespace, machines: Any, at: int
) -> None:
    """The snapshot falls between any two steps, once with a fresh and once with a used device."""
    for used in (False, True):
        source, target = machines(), machines()
        gateways = [model.Gateway(source), model.Gateway(target)]
        guest = model.Guest(gateways[0])
        driver = Driver(guest)
        steps = driver.steps()
        for step in (*steps, driver.reset) if used else ():
            step()
        for step in steps[:at]:
            step()
        near = source_for(source.view(), gateways[0], PROFILES)
        offer = await near.offer()
        far = target_for(offer, target.view(), gateways[1], PROFILES)
        await far.check()
        target.reset()
        before = source.everything()
        values = await gateways[0].batch(await near.snapshot())
        assert source.everything() == before
        guest.seq = 0
        async for payload in near.begin(values, 0):
            await far.receive(payload)
        for step in steps[at:]:
            step()
            async for payload in near.precopy():
                await far.receive(payload)
        await near.quiesce()
        async for payload in near.final():
            await far.receive(payload)
        report = await far.finish()
        assert report.divergences == {}
        assert not target.blk.common.status & 4
        assert not int.from_bytes(target.read(CONFIG, 4, 2), "little") & 4
        assert all(offset < NOTIFY for region, offset, _ in target.writes if region == 0)
        await gateways[1].batch(far.start_records())
        assert target.everything() == source.everything()
        rung = [offset for region, offset, _ in target.writes if region == 0 and offset >= NOTIFY]
        assert sorted(rung) == [NOTIFY, NOTIFY + 8]
        await gateways[0].batch(near.resume_records())
        again = [offset for region, offset, _ in source.writes if region == 0 and offset >= NOTIFY]
        assert again[-2:] == [NOTIFY, NOTIFY + 8]


@trio_test
async def test_a_target_that_is_built_differently_is_refused(
    model: SimpleNamespace, machines: Any
) -> None:
    source = machines()
    gateway = model.Gateway(source)
    near = source_for(source.view(), gateway, PROFILES)
    offer = await near.offer()
    fewer = machines(n_queues=1)
    with pytest.raises(IdentityMismatch, match="virtio:notify"):
        target_for(offer, fewer.view(), model.Gateway(fewer), PROFILES)


NOT_CARRIED = {
    "zoned": 17,
    "bit 27": 27,
    "ring_packed": 34,
    "in_order": 35,
    "notification_data": 38,
    "ring_reset": 40,
    "admin_vq": 41,
    "bit 63": 63,
}


@pytest.mark.parametrize("name", NOT_CARRIED)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@trio_test
async def test_a_feature_that_the_profile_does_not_know_ends_the_migration_by_name(
    model: SimpleNamespace, machines: Any, name: str, when: str
) -> None:
    """Before anything is touched, or when the guest, which has negotiated anew, is paused."""
    source = machines()
    gateway = model.Gateway(source)
    driver = Driver(model.Guest(gateway))
    for step in driver.steps():
        step()
    common = source.blk.common
    near = source_for(source.view(), gateway, PROFILES)
    if when == "meanwhile":
        await near.offer()
        await gateway.batch(await near.snapshot())
    common.driver_features |= 1 << NOT_CARRIED[name]
    before = source.everything()
    with pytest.raises(FeatureNotCarried, match=rf"uses {name}\b.*profile virtio-pci 4"):
        await (near.offer() if when == "before" else near.quiesce())
    assert source.everything() == before


@trio_test
async def test_every_feature_of_the_profile_is_carried(
    model: SimpleNamespace, machines: Any
) -> None:
    source = machines()
    gateway = model.Gateway(source)
    near = source_for(source.view(), gateway, PROFILES)
    (profile,) = (p for origin in PROFILES for p in origin if p.name == "virtio-pci")
    (carried,) = profile.carried
    for bit in carried.bits:
        source.blk.common.driver_features |= 1 << bit
    await near.offer()


@trio_test
async def test_a_target_with_another_disk_is_refused(model: SimpleNamespace, machines: Any) -> None:
    source, target = machines(), machines(sectors=16)
    gateway = model.Gateway(source)
    near = source_for(source.view(), gateway, PROFILES)
    far = target_for(await near.offer(), target.view(), model.Gateway(target), PROFILES)
    await far.check()
    values = await gateway.batch(await near.snapshot())
    with pytest.raises(RegisterMismatch, match="device_config"):
        async for payload in near.begin(values, 0):
            await far.receive(payload)


@trio_test
async def test_the_window_of_the_configuration_space_is_not_replayed(
    model: SimpleNamespace, machines: Any
) -> None:
    source, target = machines(), machines()
    gateway = model.Gateway(source)
    guest = model.Guest(gateway)
    near = source_for(source.view(), gateway, PROFILES)
    far = target_for(await near.offer(), target.view(), model.Gateway(target), PROFILES)
    await far.check()
    values = await gateway.batch(await near.snapshot())
    guest.seq = 0
    async for payload in near.begin(values, 0):
        await far.receive(payload)
    window = source.view().locate("virtio:window")
    assert window is not None
    Driver(guest).write(CONFIG, window.offset, 4, 0)
    with pytest.raises(RefusedAccess, match="pci_cfg_data"):
        async for payload in near.precopy():
            await far.receive(payload)
