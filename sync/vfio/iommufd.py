"""The way to a function by its character device and iommufd, which may log what is written.

Source: Linux, include/uapi/linux/iommufd.h and Documentation/userspace-api/iommufd.rst (6.12).
"""

from sync.vfio import uapi
from sync.vfio.errors import NoVfio
from sync.vfio.handles import Handles
from sync.vfio.sysfs import PciFunction
from sync.vfio.uapi import Ioctl, IommuIoctl
from sync.vfio_user.protocol import DmaFlags

IOMMU = "/dev/iommu"


class IommuFd:
    """An address space of its own, with the function attached. Raises `VfioError`, as each method
    does."""

    def __init__(self, handles: Handles, function: PciFunction) -> None:
        self._handles = handles
        self._fd = handles.take(IOMMU)
        name = function.character_device
        if name is None:
            raise NoVfio(f"the kernel gives {function.address} no character device")
        self._device = handles.take(f"/dev/vfio/devices/{name}")
        bind = bytearray(uapi.BIND_IOMMUFD.pack(uapi.BIND_IOMMUFD.size, 0, self._fd, 0))
        handles.ioctl("bind the function", self._device, Ioctl.DEVICE_BIND_IOMMUFD, bind)
        device_id = uapi.BIND_IOMMUFD.unpack(bind)[3]
        space = bytearray(uapi.IOAS_ALLOC.pack(uapi.IOAS_ALLOC.size, 0, 0))
        self._call("make an address space", IommuIoctl.IOAS_ALLOC, space)
        self._space: int = uapi.IOAS_ALLOC.unpack(space)[2]
        self._table = self._make_logging_table(device_id)
        table = self._space if self._table is None else self._table
        attach = bytearray(uapi.ATTACH_PT.pack(uapi.ATTACH_PT.size, 0, table))
        handles.ioctl("attach it", self._device, Ioctl.DEVICE_ATTACH_IOMMUFD_PT, attach)

    @property
    def has_log(self) -> bool:
        """Whether the IOMMU tells the pages that the function wrote."""
        return self._table is not None

    def open_device(self, function: PciFunction) -> int:
        """The function's descriptor."""
        return self._device

    def map(self, iova: int, length: int, address: int, flags: DmaFlags) -> None:
        """Raises OSError."""
        allowed = uapi.IoasMapFlags.FIXED_IOVA
        if flags & DmaFlags.READ:
            allowed |= uapi.IoasMapFlags.READABLE
        if flags & DmaFlags.WRITE:
            allowed |= uapi.IoasMapFlags.WRITEABLE
        argument = uapi.IOAS_MAP.pack(
            uapi.IOAS_MAP.size, allowed, self._space, address, length, iova
        )
        self._handles.kernel.ioctl(self._fd, IommuIoctl.IOAS_MAP, argument)

    def unmap(self, iova: int, length: int) -> int:
        """Returns how many bytes were unmapped."""
        argument = bytearray(uapi.IOAS_UNMAP.pack(uapi.IOAS_UNMAP.size, self._space, iova, length))
        self._call("unmap memory", IommuIoctl.IOAS_UNMAP, argument)
        unmapped: int = uapi.IOAS_UNMAP.unpack(argument)[3]
        return unmapped

    def set_log(self, on: bool) -> None:
        """Whether it is noted what is written."""
        argument = uapi.SET_DIRTY_TRACKING.pack(uapi.SET_DIRTY_TRACKING.size, on, self._table)
        self._call("log written pages", IommuIoctl.HWPT_SET_DIRTY_TRACKING, argument)

    def report(self, iova: int, length: int, page_bytes: int, address: int) -> None:
        """Sets the bits of the pages written, in the bitmap at `address`, and forgets them."""
        argument = uapi.GET_DIRTY_BITMAP.pack(
            uapi.GET_DIRTY_BITMAP.size, self._table, 0, iova, length, page_bytes, address
        )
        self._call("report written pages", IommuIoctl.HWPT_GET_DIRTY_BITMAP, argument)

    def _make_logging_table(self, device_id: int) -> int | None:
        """A page table that can log; none if the IOMMU cannot."""
        flags = uapi.HWPT_ALLOC_DIRTY_TRACKING
        argument = bytearray(
            uapi.HWPT_ALLOC.pack(uapi.HWPT_ALLOC.size, flags, device_id, self._space, 0, 0, 0, 0)
        )
        try:
            self._handles.kernel.ioctl(self._fd, IommuIoctl.HWPT_ALLOC, argument)
        except OSError:
            return None
        table: int = uapi.HWPT_ALLOC.unpack(argument)[4]
        return table

    def _call(self, what: str, request: IommuIoctl, argument: bytes | bytearray) -> None:
        self._handles.ioctl(what, self._fd, request, argument)
