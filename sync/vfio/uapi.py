"""Numbers and forms of the kernel's VFIO interface, as far as they are used.

Owns no behaviour. What vfio-user has taken over from it stands in `sync.vfio_user.protocol`.
Source: Linux, include/uapi/linux/vfio.h and iommufd.h (6.12).
"""

import struct
from enum import IntEnum, IntFlag

API_VERSION = 0
TYPE1V2_IOMMU = 3


def _request(number: int) -> int:
    return ord(";") << 8 | 100 + number


class Ioctl(IntEnum):
    """Requests; none of them encodes a size."""

    GET_API_VERSION = _request(0)
    CHECK_EXTENSION = _request(1)
    SET_IOMMU = _request(2)
    GROUP_GET_STATUS = _request(3)
    GROUP_SET_CONTAINER = _request(4)
    GROUP_GET_DEVICE_FD = _request(6)
    DEVICE_GET_INFO = _request(7)
    DEVICE_GET_REGION_INFO = _request(8)
    DEVICE_GET_IRQ_INFO = _request(9)
    DEVICE_SET_IRQS = _request(10)
    DEVICE_RESET = _request(11)
    IOMMU_MAP_DMA = _request(13)
    IOMMU_UNMAP_DMA = _request(14)
    DEVICE_FEATURE = _request(17)
    DEVICE_BIND_IOMMUFD = _request(18)
    DEVICE_ATTACH_IOMMUFD_PT = _request(19)
    MIG_GET_PRECOPY_INFO = _request(21)


class IommuIoctl(IntEnum):
    """Requests of iommufd."""

    IOAS_ALLOC = ord(";") << 8 | 0x81
    IOAS_MAP = ord(";") << 8 | 0x85
    IOAS_UNMAP = ord(";") << 8 | 0x86
    HWPT_ALLOC = ord(";") << 8 | 0x89
    HWPT_SET_DIRTY_TRACKING = ord(";") << 8 | 0x8B
    HWPT_GET_DIRTY_BITMAP = ord(";") << 8 | 0x8C


class IoasMapFlags(IntFlag):
    FIXED_IOVA = 1 << 0
    WRITEABLE = 1 << 1
    READABLE = 1 << 2


class DeviceFeature(IntEnum):
    """Of `DEVICE_FEATURE`, as far as they have to do with migration."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9


class GroupFlags(IntFlag):
    VIABLE = 1 << 0


GROUP_STATUS = struct.Struct("=II")
DEVICE_INFO = struct.Struct("=IIIII")
"""argsz, flags, num_regions, num_irqs, cap_offset."""
REGION_INFO = struct.Struct("=IIIIQQ")
"""argsz, flags, index, cap_offset, size, offset."""
IRQ_INFO = struct.Struct("=IIII")
"""argsz, flags, index, count."""
SET_IRQS = struct.Struct("=IIIII")
"""argsz, flags, index, start, count; data behind it."""
DMA_MAP = struct.Struct("=IIQQQ")
"""argsz, flags, vaddr, iova, size."""
DMA_UNMAP = struct.Struct("=IIQQ")
"""argsz, flags, iova, size."""
FEATURE = struct.Struct("=II")
"""argsz, flags; data behind it."""

MIGRATION_FLAGS = struct.Struct("=Q")
DEVICE_STATE = struct.Struct("=Ii")
"""device_state, data_fd."""
DATA_SIZE = struct.Struct("=Q")
"""stop_copy_length."""
PRECOPY_INFO = struct.Struct("=IIQQ")
"""argsz, flags, initial_bytes, dirty_bytes."""
LOGGING_START = struct.Struct("=QIIQ")
"""page_size, num_ranges, reserved, address of the ranges."""
LOGGING_RANGE = struct.Struct("=QQ")
"""iova, length."""
LOGGING_REPORT = struct.Struct("=QQQQ")
"""iova, length, page_size, address of the bitmap."""

BIND_IOMMUFD = struct.Struct("=IIiI")
"""argsz, flags, iommufd, out_devid."""
ATTACH_PT = struct.Struct("=III")
"""argsz, flags, pt_id."""
IOAS_ALLOC = struct.Struct("=III")
"""size, flags, out_ioas_id."""
IOAS_MAP = struct.Struct("=III4xQQQ")
"""size, flags, ioas_id, user_va, length, iova."""
IOAS_UNMAP = struct.Struct("=IIQQ")
"""size, ioas_id, iova, length."""
HWPT_ALLOC = struct.Struct("=IIIII4xIIQ")
"""size, flags, dev_id, pt_id, out_hwpt_id, data_type, data_len, data_uptr."""
HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
SET_DIRTY_TRACKING = struct.Struct("=III4x")
"""size, flags, hwpt_id."""
GET_DIRTY_BITMAP = struct.Struct("=III4xQQQQ")
"""size, hwpt_id, flags, iova, length, page_size, address of the bitmap."""
