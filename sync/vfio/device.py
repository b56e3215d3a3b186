"""One function of the host, open through a container and a group of its own.

Owns its descriptors, regions, interrupts and what of memory is mapped for it. Does not own memory,
nor what the registers mean. Closing it takes all memory away from the function.

A function that is not mapped to guest memory cannot reach it: the IOMMU is the fence (I4).
"""

import errno
import resource
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from sync.vfio import uapi
from sync.vfio.errors import (
    FunctionBusy,
    GroupNotViable,
    MemoryNotPinned,
    NoIommu,
    NoVfio,
    VfioError,
)
from sync.vfio.kernel import HostKernel, Kernel
from sync.vfio.sysfs import PciFunction
from sync.vfio.uapi import GroupFlags, Ioctl, IrqIndex, IrqSet

CONTAINER = "/dev/vfio/vfio"
_COMMAND = 4
_BUS_MASTER = 1 << 2
_MEMORY = 1 << 1
_MAX_INFO_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Region:
    """A region: its size, what may be done with it, and where it is in the descriptor."""

    size: int
    flags: uapi.RegionFlags
    offset: int


class VfioDevice:
    """The open function. Usable from one thread at a time.

    Raises `VfioError` and what is derived from it, here and in every method.
    """

    def __init__(self, function: PciFunction, kernel: Kernel | None = None) -> None:
        self.function = function
        self.name = function.address
        self.msix_control: int | None = None
        """Where a write to configuration space switches MSI-X: nowhere, the kernel does it."""
        self._kernel = kernel if kernel is not None else HostKernel()
        self._open: list[int] = []
        function.require_vfio()
        function.require_viable()
        try:
            self._container = self._open_container()
            self._fd = self._open_device(self._open_group())
            self.regions = self._find_regions()
            self.vectors = self._find_vectors()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the function. May be called again."""
        while self._open:
            self._kernel.close(self._open.pop())

    # Registers.

    def read(self, region: int, offset: int, length: int) -> bytes:
        """Read a register, in one access."""
        at = self._locate(region, offset, length)
        data = self._kernel.pread(self._fd, length, at)
        if len(data) != length:
            raise VfioError(f"{length} bytes at {offset:#x} of region {region} cannot be read")
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write a register, in one access."""
        at = self._locate(region, offset, len(data))
        if self._kernel.pwrite(self._fd, data, at) != len(data):
            raise VfioError(
                f"{len(data)} bytes at {offset:#x} of region {region} cannot be written"
            )

    def set_bus_master(self, on: bool) -> None:
        """Whether the function may do DMA at all; its memory BARs are decoded in any case."""
        command = int.from_bytes(self.read(uapi.CONFIG_REGION, _COMMAND, 2), "little")
        wanted = (command | _MEMORY) & ~_BUS_MASTER | (_BUS_MASTER if on else 0)
        self.write(uapi.CONFIG_REGION, _COMMAND, wanted.to_bytes(2, "little"))

    def enable_msix(self) -> None:
        """Done by `set_irqs`."""

    def reset(self) -> None:
        """Reset the function, which keeps its configuration space."""
        self._ioctl("reset", self._fd, Ioctl.DEVICE_RESET, 0)

    # Memory.

    def map_dma(
        self,
        iova: int,
        length: int,
        address: int,
        *,
        writable: bool = True,
        file: tuple[int, int] | None = None,
    ) -> None:
        """Show the function `length` bytes of this process from `address` on; they are pinned.

        `file`: the descriptor and the offset that they are a mapping of, for devices that map it
        themselves.
        """
        flags = uapi.DmaFlags.READ | (uapi.DmaFlags.WRITE if writable else uapi.DmaFlags(0))
        argument = uapi.DMA_MAP.pack(uapi.DMA_MAP.size, flags, address, iova, length)
        try:
            self._kernel.ioctl(self._container, Ioctl.IOMMU_MAP_DMA, argument)
        except OSError as error:
            raise MemoryNotPinned(self._why_not_pinned(iova, length, error)) from error

    def unmap_dma(self, iova: int, length: int) -> None:
        """Take a range away again; when this returns the function cannot reach it any more."""
        argument = bytearray(uapi.DMA_UNMAP.pack(uapi.DMA_UNMAP.size, 0, iova, length))
        self._ioctl("unmap memory", self._container, Ioctl.IOMMU_UNMAP_DMA, argument)
        _, _, _, unmapped = uapi.DMA_UNMAP.unpack(argument)
        if unmapped != length:
            raise VfioError(f"of {length} bytes at {iova:#x}, {unmapped} could be unmapped")

    def usable_iovas(self) -> list[tuple[int, int]]:
        """First and last address of each range that can be mapped; none if the kernel is silent."""
        fixed = bytearray(uapi.IOMMU_INFO.pack(uapi.IOMMU_INFO.size, 0, 0, 0))
        self._ioctl("describe the IOMMU", self._container, Ioctl.IOMMU_GET_INFO, fixed)
        size = uapi.IOMMU_INFO.unpack(fixed)[0]
        if not uapi.IOMMU_INFO.size < size <= _MAX_INFO_BYTES:
            return []
        info = bytearray(size)
        uapi.IOMMU_INFO.pack_into(info, 0, size, 0, 0, 0)
        self._ioctl("describe the IOMMU", self._container, Ioctl.IOMMU_GET_INFO, info)
        _, flags, _, at = uapi.IOMMU_INFO.unpack_from(info)
        while flags & uapi.IOMMU_INFO_CAPS and at:
            kind, _, following = uapi.CAPABILITY.unpack_from(info, at)
            if kind == uapi.CAP_IOVA_RANGE:
                content = at + uapi.CAPABILITY.size
                count, _ = uapi.IOVA_RANGES.unpack_from(info, content)
                start = content + uapi.IOVA_RANGES.size
                end = start + count * uapi.IOVA_RANGE.size
                return list(uapi.IOVA_RANGE.iter_unpack(info[start:end]))
            at = following if following > at else 0
        return []

    # Interrupts.

    def set_irqs(self, index: IrqIndex, fds: Sequence[int], start: int = 0) -> None:
        """Have interrupts signal these eventfds; -1 is nobody. They may be another process's."""
        data = struct.pack(f"={len(fds)}i", *fds)
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self._set_irqs(flags, index, start, len(fds), data)

    def disable_irqs(self, index: IrqIndex) -> None:
        """Switch all interrupts of a kind off, as MSI-X as a whole."""
        self._set_irqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, index, 0, 0)

    def mask_intx(self, masked: bool) -> None:
        """Mask or unmask the INTx line."""
        action = IrqSet.ACTION_MASK if masked else IrqSet.ACTION_UNMASK
        self._set_irqs(IrqSet.DATA_NONE | action, IrqIndex.INTX, 0, 1)

    def trigger(self, index: IrqIndex, vector: int) -> None:
        """Fire an interrupt as if the function had."""
        self._set_irqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, index, vector, 1)

    # Features.

    def has_feature(self, feature: int, access: uapi.FeatureFlags) -> bool:
        """Whether the function's driver offers a VFIO feature."""
        flags = feature | access | uapi.FeatureFlags.PROBE
        argument = bytearray(uapi.FEATURE.pack(uapi.FEATURE.size, flags))
        try:
            self._kernel.ioctl(self._fd, Ioctl.DEVICE_FEATURE, argument)
        except OSError:
            return False
        return True

    # Opening.

    def _open_container(self) -> int:
        container = self._take(CONTAINER)
        version = self._ioctl("tell its version", container, Ioctl.GET_API_VERSION, 0)
        if version != uapi.API_VERSION:
            raise NoVfio(f"the kernel's VFIO has version {version}, {uapi.API_VERSION} is needed")
        if not self._ioctl("tell", container, Ioctl.CHECK_EXTENSION, uapi.TYPE1V2_IOMMU):
            raise NoIommu("the kernel has no type 1 IOMMU driver: modprobe vfio_iommu_type1")
        return container

    def _open_group(self) -> int:
        number = self.function.group
        group = self._take(f"/dev/vfio/{number}")
        status = bytearray(uapi.GROUP_STATUS.pack(uapi.GROUP_STATUS.size, 0))
        self._ioctl("describe the group", group, Ioctl.GROUP_GET_STATUS, status)
        if not uapi.GROUP_STATUS.unpack(status)[1] & GroupFlags.VIABLE:
            raise GroupNotViable(
                f"IOMMU group {number} is not viable: bind all of its functions to vfio-pci"
            )
        container = struct.pack("=i", self._container)
        self._ioctl("join the container", group, Ioctl.GROUP_SET_CONTAINER, container)
        try:
            self._kernel.ioctl(self._container, Ioctl.SET_IOMMU, uapi.TYPE1V2_IOMMU)
        except OSError as error:
            raise NoIommu(
                f"the IOMMU of group {number} cannot be used: {error.strerror}; where the platform "
                "cannot remap interrupts, VFIO refuses unless it is told to allow unsafe ones"
            ) from error
        return group

    def _open_device(self, group: int) -> int:
        name = self.function.address.encode() + b"\0"
        fd = self._ioctl("give out the function", group, Ioctl.GROUP_GET_DEVICE_FD, name)
        self._open.append(fd)
        return fd

    def _take(self, path: str) -> int:
        try:
            fd = self._kernel.open(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise FunctionBusy(
                    f"{path} is in use: another process has {self.function.address} or a function "
                    "of its group"
                ) from error
            hint = "modprobe vfio-pci" if error.errno == errno.ENOENT else "run as root"
            raise NoVfio(f"{path}: {error.strerror} ({hint})") from error
        self._open.append(fd)
        return fd

    def _find_regions(self) -> dict[int, Region]:
        info = bytearray(uapi.DEVICE_INFO.pack(uapi.DEVICE_INFO.size, 0, 0, 0, 0))
        self._ioctl("describe the function", self._fd, Ioctl.DEVICE_GET_INFO, info)
        _, flags, n_regions, _, _ = uapi.DEVICE_INFO.unpack(info)
        if not flags & uapi.DeviceFlags.PCI:
            raise VfioError(f"{self.function.address} is no PCI function to VFIO")
        self.can_reset = bool(flags & uapi.DeviceFlags.RESET)
        regions = {}
        for index in range(min(n_regions, uapi.N_REGIONS)):
            region = bytearray(uapi.REGION_INFO.pack(uapi.REGION_INFO.size, 0, index, 0, 0, 0))
            try:
                self._kernel.ioctl(self._fd, Ioctl.DEVICE_GET_REGION_INFO, region)
            except OSError:
                # The VGA region is in the count of every function.
                continue
            _, flags, _, _, size, offset = uapi.REGION_INFO.unpack(region)
            if size:
                regions[index] = Region(size, uapi.RegionFlags(flags & 7), offset)
        return regions

    def _find_vectors(self) -> dict[IrqIndex, int]:
        vectors = {}
        for index in IrqIndex:
            info = bytearray(uapi.IRQ_INFO.pack(uapi.IRQ_INFO.size, 0, index, 0))
            try:
                self._kernel.ioctl(self._fd, Ioctl.DEVICE_GET_IRQ_INFO, info)
            except OSError:
                continue
            vectors[index] = uapi.IRQ_INFO.unpack(info)[3]
        return vectors

    # Calls.

    def _locate(self, region: int, offset: int, length: int) -> int:
        found = self.regions.get(region)
        if found is None or offset < 0 or offset + length > found.size:
            raise VfioError(f"the function has no {length} bytes at {offset:#x} of region {region}")
        return found.offset + offset

    def _set_irqs(
        self, flags: int, index: IrqIndex, start: int, count: int, data: bytes = b""
    ) -> None:
        size = uapi.SET_IRQS.size + len(data)
        argument = uapi.SET_IRQS.pack(size, flags, index, start, count) + data
        self._ioctl(f"set {index.name}", self._fd, Ioctl.DEVICE_SET_IRQS, argument)

    def _ioctl(self, what: str, fd: int, request: Ioctl, argument: int | bytes | bytearray) -> int:
        try:
            return self._kernel.ioctl(fd, request, argument)
        except OSError as error:
            raise VfioError(
                f"{self.function.address}: VFIO cannot {what}: {error.strerror}"
            ) from error

    def _why_not_pinned(self, iova: int, length: int, error: OSError) -> str:
        what = f"{length >> 10} KiB at {iova:#x} cannot be mapped for {self.function.address}"
        if error.errno == errno.ENOMEM:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            return (
                f"{what}: all of guest memory is locked, and RLIMIT_MEMLOCK is {limit >> 10} KiB; "
                "raise it (ulimit -l, LimitMEMLOCK=), or run as root"
            )
        if error.errno == errno.EINVAL:
            return f"{what}: the range is reserved by the platform, or not of whole pages"
        return f"{what}: {error.strerror}"
