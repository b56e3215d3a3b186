"""Logs of what a function writes, kept by its driver or by its IOMMU: VFIO's DMA logging, iommufd's
dirty tracking.

Source: Linux, include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_START, and iommufd.h,
IOMMU_HWPT_GET_DIRTY_BITMAP.
"""

import ctypes
from collections.abc import Sequence
from typing import Protocol

from sync.vfio import uapi
from sync.vfio.device import VfioDevice
from sync.vfio.iommufd import IommuFd
from sync.vfio.uapi import DeviceFeature
from sync.vfio_user.protocol import FeatureFlags

_PAGE_BYTES = 4096


class DmaLog(Protocol):
    """Each method raises `VfioError`."""

    def start(self, page_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Begin, for `ranges` (IOVA, length), in pages of about `page_bytes`; returns in which."""

    def stop(self) -> None: ...

    def report(self, iova: int, length: int, page_bytes: int, n_bytes: int) -> bytes:
        """A bitmap of `n_bytes` of the pages written in a range, which are clean afterwards."""


class DriverLog:
    """The function's driver keeps it."""

    def __init__(self, device: VfioDevice) -> None:
        self._device = device

    def start(self, page_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        content = b"".join(uapi.LOGGING_RANGE.pack(*each) for each in ranges)
        memory = ctypes.create_string_buffer(content, max(len(content), 1))
        request = uapi.LOGGING_START.pack(page_bytes, len(ranges), 0, ctypes.addressof(memory))
        answer = self._device.feature(DeviceFeature.DMA_LOGGING_START, FeatureFlags.SET, request)
        chosen: int = uapi.LOGGING_START.unpack(answer)[0]
        return chosen

    def stop(self) -> None:
        self._device.feature(DeviceFeature.DMA_LOGGING_STOP, FeatureFlags.SET)

    def report(self, iova: int, length: int, page_bytes: int, n_bytes: int) -> bytes:
        bitmap = ctypes.create_string_buffer(n_bytes)
        request = uapi.LOGGING_REPORT.pack(iova, length, page_bytes, ctypes.addressof(bitmap))
        self._device.feature(DeviceFeature.DMA_LOGGING_REPORT, FeatureFlags.GET, request)
        return bitmap.raw


class IommuLog:
    """The IOMMU keeps it, in its page tables."""

    def __init__(self, iommu: IommuFd) -> None:
        self._iommu = iommu

    def start(self, page_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
        self._iommu.set_log(True)
        return _PAGE_BYTES

    def stop(self) -> None:
        self._iommu.set_log(False)

    def report(self, iova: int, length: int, page_bytes: int, n_bytes: int) -> bytes:
        bitmap = ctypes.create_string_buffer(n_bytes)
        self._iommu.report(iova, length, page_bytes, ctypes.addressof(bitmap))
        return bitmap.raw


def log_of(device: VfioDevice) -> DmaLog | None:
    """The driver's log, or that of the IOMMU."""
    needed = (
        (DeviceFeature.DMA_LOGGING_START, FeatureFlags.SET),
        (DeviceFeature.DMA_LOGGING_STOP, FeatureFlags.SET),
        (DeviceFeature.DMA_LOGGING_REPORT, FeatureFlags.GET),
    )
    if all(device.has_feature(*each) for each in needed):
        return DriverLog(device)
    if isinstance(device.iommu, IommuFd) and device.iommu.has_log:
        return IommuLog(device.iommu)
    return None
