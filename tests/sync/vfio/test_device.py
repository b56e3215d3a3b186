"""A function through the kernel's VFIO, against a double of the calls."""

import errno
import struct
from pathlib import Path

import pytest

from sync.queues.errors import WalkTimeout
from sync.queues.interface import (
    AwaitMemory,
    AwaitRegister,
    Command,
    MapScratch,
    Plan,
    ReadMemory,
    ReadRegister,
    ResetFunction,
    Signal,
    UnmapScratch,
    WriteMemory,
    WriteRegister,
)
from sync.vfio.device import VfioDevice
from sync.vfio.errors import (
    DriverInUse,
    FunctionBusy,
    GroupNotViable,
    MemoryNotPinned,
    NoIommu,
    NoVfio,
    VfioError,
)
from sync.vfio.executor import Executor, complete
from sync.vfio.sysfs import PciFunction
from sync.vfio_user.protocol import FeatureFlags, PciIrq
from tests.sync.vfio.fake_kernel import DEVICE, FakeKernel, FakeSysfs

ADDRESS = "0000:01:00.0"


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def function(tmp_path: Path) -> PciFunction:
    FakeSysfs(tmp_path).add(ADDRESS, driver="vfio-pci", group="7")
    return PciFunction(ADDRESS, tmp_path)


def test_a_function_is_opened_described_and_let_go_of(
    function: PciFunction, kernel: FakeKernel
) -> None:
    device = VfioDevice(function, kernel)
    assert {index: region.size for index, region in device.regions.items()} == {0: 0x4000, 7: 4096}
    assert device.vectors == {
        PciIrq.INTX: 1,
        PciIrq.MSI: 1,
        PciIrq.MSIX: 65,
        PciIrq.REQ: 1,
    }
    assert device.can_reset
    device.close()
    device.close()
    assert not kernel.opened
    assert kernel.closed[0] == DEVICE


def test_registers_lie_at_their_regions_offset(function: PciFunction, kernel: FakeKernel) -> None:
    device = VfioDevice(function, kernel)
    device.write(0, 0x14, b"\1\2\3\4")
    assert kernel.bar[0x14:0x18] == b"\1\2\3\4"
    device.write(7, 4, b"\6\0")
    assert device.read(7, 4, 2) == b"\6\0"
    device.set_bus_master(False)
    assert kernel.config[4] == 2
    device.set_bus_master(True)
    assert kernel.config[4] == 6


@pytest.mark.parametrize(("region", "offset"), [(0, 0x3FFE), (0, -4), (3, 0), (7, 4096)])
def test_i9_an_access_outside_of_a_region_reaches_no_kernel(
    function: PciFunction, kernel: FakeKernel, region: int, offset: int
) -> None:
    device = VfioDevice(function, kernel)
    with pytest.raises(VfioError, match="has no 4 bytes"):
        device.read(region, offset, 4)
    with pytest.raises(VfioError, match="has no 4 bytes"):
        device.write(region, offset, bytes(4))


def test_memory_is_mapped_and_taken_away(function: PciFunction, kernel: FakeKernel) -> None:
    device = VfioDevice(function, kernel)
    device.map_dma(0x10_0000, 0x2000, 0x7F00_0000)
    device.map_dma(0x20_0000, 0x1000, 0x7F10_0000, writable=False)
    assert kernel.mapped == {
        0x10_0000: (0x2000, 0x7F00_0000, 3),
        0x20_0000: (0x1000, 0x7F10_0000, 1),
    }
    device.unmap_dma(0x10_0000, 0x2000)
    assert list(kernel.mapped) == [0x20_0000]
    kernel.unmaps_less = 0x1000
    with pytest.raises(VfioError, match="0 could be unmapped"):
        device.unmap_dma(0x20_0000, 0x1000)


def test_interrupts_go_to_eventfds_of_others(function: PciFunction, kernel: FakeKernel) -> None:
    device = VfioDevice(function, kernel)
    device.set_irqs(PciIrq.MSIX, [50, -1, 52], start=4)
    device.disable_irqs(PciIrq.MSIX)
    device.mask_intx(True)
    device.mask_intx(False)
    device.trigger(PciIrq.MSIX, 3)
    trigger, none, eventfd, mask, unmask = 32, 1, 4, 8, 16
    assert kernel.irqs == [
        (eventfd | trigger, 2, 4, 3, 50, -1, 52),
        (none | trigger, 2, 0, 0),
        (none | mask, 0, 0, 1),
        (none | unmask, 0, 0, 1),
        (none | trigger, 2, 3, 1),
    ]


def test_features_are_probed(function: PciFunction, kernel: FakeKernel) -> None:
    kernel.features = {1}
    device = VfioDevice(function, kernel)
    assert device.has_feature(1, FeatureFlags.GET)
    assert not device.has_feature(6, FeatureFlags.SET)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": 1}, NoVfio, "has version 1"),
        ({"type1": 0}, NoIommu, "modprobe vfio_iommu_type1"),
        ({"viable": False}, GroupNotViable, "bind all of its functions"),
        ({"set_iommu_error": errno.EPERM}, NoIommu, "cannot remap interrupts"),
        ({"missing": {"/dev/vfio/vfio": errno.ENOENT}}, NoVfio, "modprobe vfio-pci"),
        ({"missing": {"/dev/vfio/vfio": errno.EACCES}}, NoVfio, "run as root"),
        ({"missing": {"/dev/vfio/7": errno.EBUSY}}, FunctionBusy, "another process"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_words_and_left_closed(
    function: PciFunction,
    kernel: FakeKernel,
    change: dict[str, object],
    error: type[VfioError],
    words: str,
) -> None:
    for name, value in change.items():
        setattr(kernel, name, value)
    with pytest.raises(error, match=words):
        VfioDevice(function, kernel)
    assert not kernel.opened


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOMEM, "RLIMIT_MEMLOCK"), (errno.EINVAL, "reserved"), (errno.EEXIST, "no")],
)
def test_memory_that_cannot_be_pinned_is_refused_in_words(
    function: PciFunction, kernel: FakeKernel, code: int, words: str
) -> None:
    device = VfioDevice(function, kernel)
    kernel.map_error = code
    with pytest.raises(MemoryNotPinned, match=words):
        device.map_dma(0, 0x1000, 0x1000)


# Binding, on a tree of files.


def test_a_function_with_its_own_driver_is_refused(tmp_path: Path, kernel: FakeKernel) -> None:
    FakeSysfs(tmp_path).add(ADDRESS, driver="nvme", group="7")
    with pytest.raises(DriverInUse, match="the driver nvme has"):
        VfioDevice(PciFunction(ADDRESS, tmp_path), kernel)
    assert not kernel.closed


def test_a_group_that_the_host_uses_is_refused_by_the_names_of_who_does(tmp_path: Path) -> None:
    tree = FakeSysfs(tmp_path)
    tree.add(ADDRESS, driver="vfio-pci", group="7")
    tree.add("0000:00:1c.0", driver="pcieport", group="7")
    tree.add("0000:01:00.1", driver=None, group="7")
    PciFunction(ADDRESS, tmp_path).require_viable()
    tree.add("0000:01:00.2", driver="e1000", group="7")
    with pytest.raises(GroupNotViable, match=r"0000:01:00\.2 \(e1000\)"):
        PciFunction(ADDRESS, tmp_path).require_viable()


def test_a_function_behind_no_iommu_is_refused(tmp_path: Path) -> None:
    FakeSysfs(tmp_path).add(ADDRESS, driver="vfio-pci", group=None)
    with pytest.raises(NoIommu, match="intel_iommu=on"):
        PciFunction(ADDRESS, tmp_path).require_viable()


def test_binding_writes_what_the_kernel_asks_for(tmp_path: Path) -> None:
    tree = FakeSysfs(tmp_path)
    folder = tree.add(ADDRESS, driver="nvme", group="7")
    function = PciFunction(ADDRESS, tmp_path)
    with pytest.raises(VfioError, match="could not be bound"):
        # Nobody does here what the kernel does.
        function.bind()
    assert (tmp_path / "bus/pci/drivers/nvme/unbind").read_text() == ADDRESS
    assert (folder / "driver_override").read_text() == "vfio-pci"
    assert (tmp_path / "bus/pci/drivers_probe").read_text() == ADDRESS
    (folder / "driver").unlink()
    tree.give(ADDRESS, "vfio-pci")
    assert function.bind() == "vfio-pci"
    function.restore("nvme")
    assert (tmp_path / "bus/pci/drivers/vfio-pci/unbind").read_text() == ADDRESS
    assert (folder / "driver_override").read_text() == "\n"


def test_a_driver_of_vfio_that_knows_the_device_keeps_it(tmp_path: Path) -> None:
    FakeSysfs(tmp_path).add(ADDRESS, driver="mlx5_vfio_pci", group="7")
    function = PciFunction(ADDRESS, tmp_path)
    function.require_vfio()
    assert function.bind() == function.driver == "mlx5_vfio_pci"


# Plans.


@pytest.fixture
def executor(function: PciFunction, kernel: FakeKernel) -> Executor:
    return Executor(VfioDevice(function, kernel), deadline_s=0.05)


def do(executor: Executor, command: Command) -> bytes:
    def plan() -> Plan[bytes]:
        return (yield command)

    return complete(executor.work(plan()))


def test_scratch_memory_is_the_functions_until_it_is_taken_away(
    executor: Executor, kernel: FakeKernel
) -> None:
    do(executor, MapScratch(0x5000, 0x2000))
    assert kernel.mapped[0x5000][0] == 0x2000
    do(executor, WriteMemory(0x6FFC, b"abcd"))
    assert do(executor, ReadMemory(0x6FFC, 4)) == b"abcd"
    assert do(executor, AwaitMemory(0x6FFC, 1, 0x0F, 1)) == b"a"
    do(executor, UnmapScratch(0x5000, 0x2000))
    assert not kernel.mapped
    do(executor, MapScratch(0x5000, 0x1000))
    executor.drop_scratch()
    assert not kernel.mapped


def test_registers_resets_and_waits(executor: Executor, kernel: FakeKernel) -> None:
    do(executor, WriteRegister(0x1C, struct.pack("<I", 5)))
    assert do(executor, ReadRegister(0x1C, 4)) == struct.pack("<I", 5)
    do(executor, AwaitRegister(0x1C, 4, 1, 1))
    with pytest.raises(WalkTimeout, match="did not do its part"):
        do(executor, AwaitRegister(0x1C, 4, 2, 2))
    do(executor, ResetFunction())
    assert kernel.resets == 1
    assert kernel.config[4] & 4
    assert kernel.irqs[-1] == (36, 2, 0, 65, *[-1] * 65)


def test_a_guests_vector_is_fired_by_who_owns_it(function: PciFunction, kernel: FakeKernel) -> None:
    fired: list[int] = []
    do(Executor(VfioDevice(function, kernel), fired.append), Signal(3))
    assert fired == [3]
