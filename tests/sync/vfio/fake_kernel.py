"""A double of the kernel's VFIO and of sysfs, written from the kernel's header: numbers and forms
stand here a second time on purpose."""

import errno
import os
import struct
from pathlib import Path

CONTAINER, GROUP, DEVICE = 100, 101, 102
BAR_OFFSET, CONFIG_OFFSET = 0, 7 << 40


class FakeKernel:
    """One group with one function. What is to go wrong is set as an attribute."""

    def __init__(self) -> None:
        self.bar = bytearray(0x4000)
        self.config = bytearray(4096)
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.mapped: dict[int, tuple[int, int, int]] = {}
        self.irqs: list[tuple[int, ...]] = []
        self.told: dict[int, int] = {}
        self.express = False
        self.resets = 0
        self.version = 0
        self.type1 = 1
        self.viable = True
        self.missing: dict[str, int] = {}
        self.map_error = 0
        self.unmaps_less = 0
        self.set_iommu_error = 0
        self.container_of_group: int | None = None
        self.iommu: int | None = None
        self.features: set[int] = set()

    def open(self, path: str) -> int:
        if path in self.missing:
            raise OSError(self.missing[path], "no")
        fd = {"/dev/vfio/vfio": CONTAINER, "/dev/vfio/7": GROUP}[path]
        self.opened.append(fd)
        return fd

    def close(self, fd: int) -> None:
        assert fd in self.opened
        self.opened.remove(fd)
        self.closed.append(fd)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        assert fd == DEVICE
        memory, at = self._memory(offset)
        return bytes(memory[at : at + count])

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        assert fd == DEVICE
        memory, at = self._memory(offset)
        memory[at : at + len(data)] = data
        return len(data)

    def read(self, fd: int, count: int) -> bytes:
        raise AssertionError("no driver here has a stream")

    def write(self, fd: int, data: bytes) -> int:
        raise AssertionError("no driver here has a stream")

    def _memory(self, offset: int) -> tuple[bytearray, int]:
        if offset >= CONFIG_OFFSET:
            return self.config, offset - CONFIG_OFFSET
        return self.bar, offset

    def ioctl(self, fd: int, request: int, argument: int | bytearray | bytes) -> int:
        number = request - (0x3B << 8) - 100
        handler = {
            (CONTAINER, 0): lambda _: self.version,
            (CONTAINER, 1): lambda kind: self.type1 if kind == 3 else 0,
            (CONTAINER, 2): self._set_iommu,
            (CONTAINER, 13): self._map,
            (CONTAINER, 14): self._unmap,
            (GROUP, 3): self._status,
            (GROUP, 4): self._set_container,
            (GROUP, 6): self._device,
            (DEVICE, 7): self._device_info,
            (DEVICE, 8): self._region,
            (DEVICE, 9): self._irq,
            (DEVICE, 10): self._set_irqs,
            (DEVICE, 11): self._reset,
            (DEVICE, 17): self._feature,
        }.get((fd, number))
        if handler is None:
            raise OSError(errno.ENOTTY, f"{fd} {number}")
        return handler(argument) or 0  # type: ignore[operator]

    def _set_iommu(self, kind: int) -> None:
        assert self.container_of_group is not None, "a container without a group has no IOMMU"
        if self.set_iommu_error:
            raise OSError(self.set_iommu_error, "not permitted")
        self.iommu = kind

    def _map(self, argument: bytes) -> None:
        size, flags, address, iova, length = struct.unpack("=IIQQQ", argument)
        assert size == 32 and self.iommu == 3
        if self.map_error:
            raise OSError(self.map_error, "no")
        assert iova not in self.mapped
        self.mapped[iova] = (length, address, flags)

    def _unmap(self, argument: bytearray) -> None:
        size, flags, iova, length = struct.unpack("=IIQQ", argument)
        assert size == 24 and flags == 0
        assert self.mapped.pop(iova)[0] == length
        struct.pack_into("=Q", argument, 16, length - self.unmaps_less)

    def _status(self, argument: bytearray) -> None:
        assert struct.unpack("=II", argument)[0] == 8
        struct.pack_into("=I", argument, 4, int(self.viable))

    def _set_container(self, argument: bytes) -> None:
        (self.container_of_group,) = struct.unpack("=i", argument)

    def _device(self, name: bytes) -> int:
        assert name == b"0000:01:00.0\0" and self.iommu == 3
        self.opened.append(DEVICE)
        return DEVICE

    def _device_info(self, info: bytearray) -> None:
        assert struct.unpack("=IIIII", info)[0] == 20
        struct.pack_into("=IIIII", info, 0, 20, 3, 9, 5, 0)

    def _region(self, info: bytearray) -> None:
        _, _, index, _, _, _ = struct.unpack("=IIIIQQ", info)
        if index == 8:
            raise OSError(errno.EINVAL, "no VGA")
        size = {0: len(self.bar), 7: len(self.config)}.get(index, 0)
        offset = CONFIG_OFFSET if index == 7 else BAR_OFFSET
        struct.pack_into("=IIIIQQ", info, 0, 32, 7 if size else 0, index, 0, size, offset)

    def _irq(self, info: bytearray) -> None:
        _, _, index, _ = struct.unpack("=IIII", info)
        if index == 3 and not self.express:
            raise OSError(errno.EINVAL, "no PCI Express")
        struct.pack_into("=IIII", info, 0, 16, 1, index, {0: 1, 1: 1, 2: 65, 3: 1, 4: 1}[index])

    def _set_irqs(self, argument: bytes) -> None:
        size, flags, index, start, count = struct.unpack_from("=IIIII", argument)
        assert size == len(argument)
        fds = struct.unpack_from(f"={count}i", argument, 20) if flags & 4 else ()
        self.irqs.append((flags, index, start, count, *fds))
        if index in (3, 4) and fds:
            self.told[index] = fds[0]

    def fire(self, index: int) -> None:
        """ERR or REQ."""
        os.eventfd_write(self.told[index], 1)

    def _reset(self, _: int) -> None:
        self.resets += 1

    def _feature(self, argument: bytearray) -> None:
        _, flags = struct.unpack_from("=II", argument)
        assert flags & 1 << 18
        if flags & 0xFFFF not in self.features:
            raise OSError(errno.ENOTTY, "no")


class FakeSysfs:
    """A tree as sysfs shows it. What the kernel would do on a write is done by `settle`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "bus/pci/drivers_probe").write_text("")

    def add(
        self,
        address: str,
        *,
        driver: str | None,
        group: str | None,
        class_code: int = 0x010802,
        ids: tuple[int, int] = (0x1B36, 0x0010),
    ) -> Path:
        folder = self.root / "bus/pci/devices" / address
        folder.mkdir()
        (folder / "class").write_text(f"{class_code:#08x}\n")
        for name, number in zip(("vendor", "device"), ids, strict=True):
            (folder / name).write_text(f"{number:#06x}\n")
            (folder / f"subsystem_{name}").write_text(f"{number:#06x}\n")
        (folder / "driver_override").write_text("(null)\n")
        if group is not None:
            devices = self.root / "kernel/iommu_groups" / group / "devices"
            devices.mkdir(parents=True, exist_ok=True)
            (devices / address).mkdir()
            (folder / "iommu_group").symlink_to(devices.parent)
        if driver is not None:
            self.give(address, driver)
        return folder

    def give(self, address: str, driver: str) -> None:
        home = self.root / "bus/pci/drivers" / driver
        home.mkdir(parents=True, exist_ok=True)
        (home / "unbind").write_text("")
        (self.root / "bus/pci/devices" / address / "driver").symlink_to(home)
