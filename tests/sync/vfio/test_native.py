"""What the kernel's driver of a function offers by itself: migration v2, DMA logging; and iommufd.
All of it against a double of the kernel's calls."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from sync.vfio.device import VfioDevice
from sync.vfio.errors import MemoryNotPinned
from sync.vfio.sysfs import PciFunction
from sync.vfio_user.protocol import (
    Command,
    DataSize,
    Feature,
    FeatureFlags,
    FeatureIndex,
    LoggingControl,
    LoggingReport,
    MigData,
    MigrationFlags,
    MigrationState,
)
from tests.sync.queues.world import GUEST_IOVA
from tests.sync.vfio.fake_kernel import FakeSysfs
from tests.sync.vfio.migrating_kernel import PRE_COPY, RUNNING, MigratingKernel
from tests.sync.vfio.test_endpoint import ADDRESS, RAM_BYTES, Client, Ram, Refused

Model = Client[MigratingKernel]


@pytest.fixture
def kernel() -> MigratingKernel:
    return MigratingKernel()


@pytest.fixture
def client(kernel: MigratingKernel, tmp_path: Path) -> Iterator[Model]:
    client = Client(kernel, tmp_path / "a")
    yield client
    client.endpoint.close()
    assert not kernel.opened


def test_the_drivers_own_migration_is_offered(client: Model) -> None:
    answer = client.ask(Command.DEVICE_FEATURE, Feature.get(1, 8).pack())
    assert MigrationFlags.unpack(Feature.unpack(answer).data).flags == 5
    assert not client.endpoint.tracks_writes


def test_a_state_goes_by_descriptor(client: Model, kernel: MigratingKernel, tmp_path: Path) -> None:
    there = MigratingKernel()
    target = Client(there, tmp_path / "b")
    kernel.hangs = there.hangs = 3
    client.enter(MigrationState.PRE_COPY)
    target.enter(MigrationState.RESUMING)
    stream = client.stream()
    assert stream == b"initial state" and kernel.state == PRE_COPY
    target.give(stream)
    client.enter(MigrationState.STOP_COPY)
    kernel.hangs = there.hangs = 3
    rest = client.stream()
    assert rest == b"the rest of it"
    target.give(rest)
    target.enter(MigrationState.STOP)
    target.enter(MigrationState.RUNNING)
    assert there.taken == stream + rest and there.state == RUNNING
    client.enter(MigrationState.RUNNING)
    assert client.state() is MigrationState.RUNNING
    for each in (kernel, there):
        assert not [fd for fd in each.opened if fd > 300], "a stream is left open"
    target.endpoint.close()


def test_a_reset_ends_the_stream(client: Model, kernel: MigratingKernel) -> None:
    client.enter(MigrationState.PRE_COPY)
    client.ask(Command.DEVICE_RESET)
    assert kernel.state == RUNNING
    with pytest.raises(Refused, match="EINVAL"):
        client.ask(Command.MIG_DATA_READ, MigData(10).pack())


def test_a_state_that_is_too_large_is_refused_before_the_guest_stands(
    client: Model, kernel: MigratingKernel
) -> None:
    kernel.size = 1 << 40
    client.enter(MigrationState.PRE_COPY)
    with pytest.raises(Refused, match="EBUSY"):
        client.enter(MigrationState.STOP_COPY)
    assert "its state has" in client.endpoint.reason
    assert kernel.state == PRE_COPY


def test_how_much_state_is_left_is_told_where_the_driver_tells_it(
    client: Model, kernel: MigratingKernel
) -> None:
    ask = Feature.get(FeatureIndex.MIG_DATA_SIZE, 8).pack()
    answer = client.ask(Command.DEVICE_FEATURE, ask)
    assert DataSize.unpack(Feature.unpack(answer).data).length == kernel.size == 27
    kernel.features.remove(9)
    with pytest.raises(Refused, match="ENOTSUP"):
        client.ask(Command.DEVICE_FEATURE, ask)


def test_a_way_that_the_driver_does_not_go_is_refused(client: Model) -> None:
    client.enter(MigrationState.STOP_COPY)
    with pytest.raises(Refused, match="EIO"):
        client.enter(MigrationState.RESUMING)


def test_a_stream_that_does_not_move_on_is_given_up(
    client: Model, kernel: MigratingKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sync.vfio.native_migration.STREAM_DEADLINE_S", 0.01)
    client.enter(MigrationState.STOP_COPY)
    kernel.hangs = 1 << 30
    with pytest.raises(Refused, match="EIO"):
        client.stream()
    assert "does not move on" in client.endpoint.reason


def start(client: Model, ranges: tuple[tuple[int, int], ...]) -> int:
    body = Feature.set(6, LoggingControl(4096, ranges).pack()).pack()
    answer = client.ask(Command.DEVICE_FEATURE, body)
    return LoggingControl.unpack(Feature.unpack(answer).data).page_size


def logged(client: Model) -> set[int]:
    request = LoggingReport(GUEST_IOVA, RAM_BYTES, 4096)
    size = len(request.pack()) + request.bitmap_bytes
    answer = client.ask(Command.DEVICE_FEATURE, Feature.get(8, size, request.pack()).pack())
    bitmap = LoggingReport.unpack(Feature.unpack(answer).data).bitmap
    return {at for at in range(len(bitmap) * 8) if bitmap[at >> 3] >> (at & 7) & 1}


@pytest.mark.parametrize("ranges", [((GUEST_IOVA, RAM_BYTES),), ()])
def test_the_drivers_log(
    client: Model, kernel: MigratingKernel, ranges: tuple[tuple[int, int], ...]
) -> None:
    client.share(Ram())
    client.ask(Command.DEVICE_FEATURE, Feature.probe(8, FeatureFlags.GET).pack())
    assert start(client, ranges) == 4096
    assert kernel.logging == (4096, [(GUEST_IOVA, RAM_BYTES)])
    first = GUEST_IOVA // 4096
    kernel.dirty = {first, first + 9, first + 511, first + 512}
    assert logged(client) == {0, 9, 511}
    assert logged(client) == set()
    client.ask(Command.DEVICE_FEATURE, Feature.set(7).pack())
    assert kernel.logging is None


# iommufd.


@pytest.fixture
def function(tmp_path: Path) -> PciFunction:
    folder = FakeSysfs(tmp_path / "sys").add(ADDRESS, driver="vfio-pci", group="7")
    (folder / "vfio-dev/vfio3").mkdir(parents=True)
    return PciFunction(ADDRESS, tmp_path / "sys")


def test_a_function_by_its_character_device(function: PciFunction, kernel: MigratingKernel) -> None:
    device = VfioDevice(function, kernel, iommufd=True)
    assert {index: region.size for index, region in device.regions.items()} == {0: 0x4000, 7: 4096}
    assert kernel.attached == 12
    device.map_dma(0x5000, 0x1000, 0x7000_0000)
    device.map_dma(0x9000, 0x1000, 0x7000_1000, writable=False)
    assert kernel.mapped == {
        0x5000: (0x1000, 0x7000_0000, 7),
        0x9000: (0x1000, 0x7000_1000, 5),
    }
    device.unmap_dma(0x5000, 0x1000)
    kernel.map_error = errno.ENOMEM
    with pytest.raises(MemoryNotPinned, match="RLIMIT_MEMLOCK"):
        device.map_dma(0x5000, 0x1000, 0x7000_0000)
    device.close()
    assert not kernel.opened


def test_an_iommu_that_logs_does_so_where_the_driver_does_not(
    tmp_path: Path, kernel: MigratingKernel
) -> None:
    kernel.features = {1, 2}
    client = Client(kernel, tmp_path / "a", iommufd=True)
    client.share(Ram())
    start(client, ())
    assert kernel.tracking
    kernel.dirty = {GUEST_IOVA // 4096 + 3}
    assert logged(client) == {3}
    client.ask(Command.DEVICE_FEATURE, Feature.set(7).pack())
    assert not kernel.tracking
    client.endpoint.close()


def test_an_iommu_that_cannot_log_is_used_without(tmp_path: Path, kernel: MigratingKernel) -> None:
    kernel.features, kernel.tracks = {1, 2}, False
    client = Client(kernel, tmp_path / "a", iommufd=True)
    assert kernel.attached == 11
    with pytest.raises(Refused, match="ENOTSUP"):
        start(client, ())
    client.endpoint.close()
