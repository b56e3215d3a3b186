"""One function of the host, open through a container of its own, or iommufd.

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
from sync.vfio.container import Container
from sync.vfio.errors import MemoryNotPinned, VfioError
from sync.vfio.handles import Handles
from sync.vfio.iommufd import IommuFd
from sync.vfio.kernel import HostKernel, Kernel
from sync.vfio.sysfs import PciFunction
from sync.vfio.uapi import Ioctl
from sync.vfio_user.protocol import (
    PCI_NUM_REGIONS,
    DeviceFlags,
    DmaFlags,
    FeatureFlags,
    IrqSet,
    PciIrq,
    PciRegion,
    RegionFlags,
)

_COMMAND = 4
_BUS_MASTER = 1 << 2
_MEMORY = 1 << 1


@dataclass(frozen=True, slots=True)
class Region:
    """A region: its size, what may be done with it, and where it is in the descriptor."""

    size: int
    flags: RegionFlags
    offset: int


class VfioDevice:
    """The open function; `iommufd`: by its character device. Usable from one thread at a time.

    Raises `VfioError` and what is derived from it, here and in every method.
    """

    def __init__(
        self, function: PciFunction, kernel: Kernel | None = None, *, iommufd: bool = False
    ) -> None:
        self.function = function
        self.name = function.address
        self.msix_control: int | None = None
        """Where a write to configuration space switches MSI-X: nowhere, the kernel does it."""
        self.handles = Handles(kernel if kernel is not None else HostKernel(), self.name)
        self._kernel = self.handles.kernel
        function.require_vfio()
        function.require_viable()
        try:
            self.iommu = (IommuFd if iommufd else Container)(self.handles, function)
            self.fd = self.iommu.open_device(function)
            self.regions = self._find_regions()
            self.vectors = self._find_vectors()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the function. May be called again."""
        self.handles.close()

    # Registers.

    def read(self, region: int, offset: int, length: int) -> bytes:
        """Read a register, in one access."""
        at = self._locate(region, offset, length)
        data = self._kernel.pread(self.fd, length, at)
        if len(data) != length:
            raise VfioError(f"{length} bytes at {offset:#x} of region {region} cannot be read")
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write a register, in one access."""
        at = self._locate(region, offset, len(data))
        if self._kernel.pwrite(self.fd, data, at) != len(data):
            raise VfioError(
                f"{len(data)} bytes at {offset:#x} of region {region} cannot be written"
            )

    def set_bus_master(self, on: bool) -> None:
        """Whether the function may do DMA at all; its memory BARs are decoded in any case."""
        command = int.from_bytes(self.read(PciRegion.CONFIG, _COMMAND, 2), "little")
        wanted = (command | _MEMORY) & ~_BUS_MASTER | (_BUS_MASTER if on else 0)
        self.write(PciRegion.CONFIG, _COMMAND, wanted.to_bytes(2, "little"))

    def enable_msix(self) -> None:
        """Done by `set_irqs`."""

    def reset(self) -> None:
        """Reset the function, which keeps its configuration space."""
        self._ioctl("reset", self.fd, Ioctl.DEVICE_RESET, 0)

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
        flags = DmaFlags.READ | (DmaFlags.WRITE if writable else DmaFlags(0))
        try:
            self.iommu.map(iova, length, address, flags)
        except OSError as error:
            raise MemoryNotPinned(self._why_not_pinned(iova, length, error)) from error

    def unmap_dma(self, iova: int, length: int) -> None:
        """Take a range away again; when this returns the function cannot reach it any more."""
        unmapped = self.iommu.unmap(iova, length)
        if unmapped != length:
            raise VfioError(f"of {length} bytes at {iova:#x}, {unmapped} could be unmapped")

    # Interrupts.

    def set_irqs(self, index: PciIrq, fds: Sequence[int], start: int = 0) -> None:
        """Have interrupts signal these eventfds; -1 is nobody. They may be another process's."""
        data = struct.pack(f"={len(fds)}i", *fds)
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self._set_irqs(flags, index, start, len(fds), data)

    def disable_irqs(self, index: PciIrq) -> None:
        """Switch all interrupts of a kind off, as MSI-X as a whole."""
        self._set_irqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, index, 0, 0)

    def mask_intx(self, masked: bool) -> None:
        """Mask or unmask the INTx line."""
        action = IrqSet.ACTION_MASK if masked else IrqSet.ACTION_UNMASK
        self._set_irqs(IrqSet.DATA_NONE | action, PciIrq.INTX, 0, 1)

    def trigger(self, index: PciIrq, vector: int) -> None:
        """Fire an interrupt as if the function had."""
        self._set_irqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, index, vector, 1)

    # Features.

    def has_feature(self, feature: int, access: FeatureFlags) -> bool:
        """Whether the function's driver offers a VFIO feature."""
        flags = feature | access | FeatureFlags.PROBE
        argument = bytearray(uapi.FEATURE.pack(uapi.FEATURE.size, flags))
        try:
            self._kernel.ioctl(self.fd, Ioctl.DEVICE_FEATURE, argument)
        except OSError:
            return False
        return True

    def feature(
        self, feature: uapi.DeviceFeature, access: FeatureFlags, data: bytes = b""
    ) -> bytes:
        """Set or get a feature: what stands in `data` afterwards."""
        size = uapi.FEATURE.size + len(data)
        argument = bytearray(uapi.FEATURE.pack(size, feature | access) + data)
        self._ioctl(f"do {feature.name}", self.fd, Ioctl.DEVICE_FEATURE, argument)
        return bytes(argument[uapi.FEATURE.size :])

    # Opening.

    def _find_regions(self) -> dict[int, Region]:
        info = bytearray(uapi.DEVICE_INFO.pack(uapi.DEVICE_INFO.size, 0, 0, 0, 0))
        self._ioctl("describe the function", self.fd, Ioctl.DEVICE_GET_INFO, info)
        _, flags, n_regions, _, _ = uapi.DEVICE_INFO.unpack(info)
        if not flags & DeviceFlags.PCI:
            raise VfioError(f"{self.function.address} is no PCI function to VFIO")
        self.can_reset = bool(flags & DeviceFlags.RESET)
        regions = {}
        for index in range(min(n_regions, PCI_NUM_REGIONS)):
            region = bytearray(uapi.REGION_INFO.pack(uapi.REGION_INFO.size, 0, index, 0, 0, 0))
            try:
                self._kernel.ioctl(self.fd, Ioctl.DEVICE_GET_REGION_INFO, region)
            except OSError:
                # The VGA region is in the count of every function.
                continue
            _, flags, _, _, size, offset = uapi.REGION_INFO.unpack(region)
            if size:
                regions[index] = Region(size, RegionFlags(flags & 7), offset)
        return regions

    def _find_vectors(self) -> dict[PciIrq, int]:
        vectors = {}
        for index in PciIrq:
            info = bytearray(uapi.IRQ_INFO.pack(uapi.IRQ_INFO.size, 0, index, 0))
            try:
                self._kernel.ioctl(self.fd, Ioctl.DEVICE_GET_IRQ_INFO, info)
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
        self, flags: int, index: PciIrq, start: int, count: int, data: bytes = b""
    ) -> None:
        size = uapi.SET_IRQS.size + len(data)
        argument = uapi.SET_IRQS.pack(size, flags, index, start, count) + data
        self._ioctl(f"set {index.name}", self.fd, Ioctl.DEVICE_SET_IRQS, argument)

    def _ioctl(self, what: str, fd: int, request: Ioctl, argument: int | bytes | bytearray) -> int:
        return self.handles.ioctl(what, fd, request, argument)

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
