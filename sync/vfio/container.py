"""The way to a function by the legacy container and group, with the IOMMU of type 1.

Source: Linux, Documentation/driver-api/vfio.rst.
"""

import struct

from sync.vfio import uapi
from sync.vfio.errors import GroupNotViable, NoIommu, NoVfio
from sync.vfio.handles import Handles
from sync.vfio.sysfs import PciFunction
from sync.vfio.uapi import GroupFlags, Ioctl
from sync.vfio_user.protocol import DmaFlags

CONTAINER = "/dev/vfio/vfio"


class Container:
    """A container with the function's group in it. Raises `VfioError`, as each method does."""

    def __init__(self, handles: Handles, function: PciFunction) -> None:
        self._handles = handles
        self._fd = self._open(handles)
        self._group = self._open_group(function)

    def open_device(self, function: PciFunction) -> int:
        """The function's descriptor."""
        name = function.address.encode() + b"\0"
        handles = self._handles
        fd = handles.ioctl("give out the function", self._group, Ioctl.GROUP_GET_DEVICE_FD, name)
        return handles.own(fd)

    def map(self, iova: int, length: int, address: int, flags: DmaFlags) -> None:
        """Raises OSError."""
        argument = uapi.DMA_MAP.pack(uapi.DMA_MAP.size, flags, address, iova, length)
        self._handles.kernel.ioctl(self._fd, Ioctl.IOMMU_MAP_DMA, argument)

    def unmap(self, iova: int, length: int) -> int:
        """Returns how many bytes were unmapped."""
        argument = bytearray(uapi.DMA_UNMAP.pack(uapi.DMA_UNMAP.size, 0, iova, length))
        self._handles.ioctl("unmap memory", self._fd, Ioctl.IOMMU_UNMAP_DMA, argument)
        unmapped: int = uapi.DMA_UNMAP.unpack(argument)[3]
        return unmapped

    @staticmethod
    def _open(handles: Handles) -> int:
        container = handles.take(CONTAINER)
        version = handles.ioctl("tell its version", container, Ioctl.GET_API_VERSION, 0)
        if version != uapi.API_VERSION:
            raise NoVfio(f"the kernel's VFIO has version {version}, {uapi.API_VERSION} is needed")
        if not handles.ioctl("tell", container, Ioctl.CHECK_EXTENSION, uapi.TYPE1V2_IOMMU):
            raise NoIommu("the kernel has no type 1 IOMMU driver: modprobe vfio_iommu_type1")
        return container

    def _open_group(self, function: PciFunction) -> int:
        number = function.group
        handles = self._handles
        group = handles.take(f"/dev/vfio/{number}")
        status = bytearray(uapi.GROUP_STATUS.pack(uapi.GROUP_STATUS.size, 0))
        handles.ioctl("describe the group", group, Ioctl.GROUP_GET_STATUS, status)
        if not uapi.GROUP_STATUS.unpack(status)[1] & GroupFlags.VIABLE:
            raise GroupNotViable(
                f"IOMMU group {number} is not viable: bind all of its functions to vfio-pci"
            )
        container = struct.pack("=i", self._fd)
        handles.ioctl("join the container", group, Ioctl.GROUP_SET_CONTAINER, container)
        try:
            handles.kernel.ioctl(self._fd, Ioctl.SET_IOMMU, uapi.TYPE1V2_IOMMU)
        except OSError as error:
            raise NoIommu(
                f"the IOMMU of group {number} cannot be used: {error.strerror}; where the platform "
                "cannot remap interrupts, VFIO refuses unless it is told to allow unsafe ones"
            ) from error
        return group
