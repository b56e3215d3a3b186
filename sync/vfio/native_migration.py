"""VFIO migration v2 of a function whose kernel driver offers it: states and a stream by descriptor.

Owns the stream's descriptor. The gateway's thread waits for no stream: what is not there yet is
looked for again in the next turn (`executor`). A change of state is the driver's business, and is
waited for.

Source: Linux, include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_MIGRATION and MIG_DEVICE_STATE.
"""

import errno
import time
from collections.abc import Mapping

from sync.queues.errors import CannotMove
from sync.vfio import uapi
from sync.vfio.device import VfioDevice
from sync.vfio.errors import VfioError
from sync.vfio.executor import PAUSE_S, Work
from sync.vfio.uapi import DeviceFeature
from sync.vfio_user.protocol import (
    FeatureFlags,
    MigrationState,
    MigrationSupport,
    VfioUserError,
)

MAX_STREAM_BYTES = 16 << 30
"""A state that is longer could not be moved in time, and is refused before the guest stands."""
STREAM_DEADLINE_S = 5.0
"""For the next byte of a stream."""
_ENDS_STREAM = (MigrationState.RUNNING, MigrationState.STOP)


def supported(device: VfioDevice) -> MigrationSupport:
    """What of migration the function's driver offers."""
    if not device.has_feature(DeviceFeature.MIGRATION, FeatureFlags.GET):
        return MigrationSupport(0)
    data = device.feature(
        DeviceFeature.MIGRATION, FeatureFlags.GET, bytes(uapi.MIGRATION_FLAGS.size)
    )
    return MigrationSupport(uapi.MIGRATION_FLAGS.unpack(data)[0] & sum(MigrationSupport))


class NativeMigration:
    """That of `device`, whose driver offers `support`."""

    tracks_writes = False

    def __init__(self, device: VfioDevice, support: MigrationSupport) -> None:
        self.support = support
        self.holds: Mapping[str, str] = {}
        """What it is and holds only its driver knows, who judges the stream."""
        self._device = device
        self._kernel = device.handles.kernel
        self._stream = -1

    @property
    def state(self) -> MigrationState:
        """Raises `VfioError`."""
        data = bytes(uapi.DEVICE_STATE.size)
        answer = self._device.feature(DeviceFeature.MIG_DEVICE_STATE, FeatureFlags.GET, data)
        return MigrationState(uapi.DEVICE_STATE.unpack(answer)[0])

    def reset(self) -> None:
        """The function was reset, and runs."""
        self._end_stream()

    def close(self) -> None:
        self._end_stream()

    def set_state(self, wanted: MigrationState) -> Work[None]:
        """Raises `VfioError`, `CannotMove`."""
        yield from ()
        if wanted is MigrationState.STOP_COPY and (length := self.size() or 0) > MAX_STREAM_BYTES:
            raise CannotMove([f"its state has {length} bytes, more than {MAX_STREAM_BYTES}"])
        request = uapi.DEVICE_STATE.pack(wanted, -1)
        answer = self._device.feature(DeviceFeature.MIG_DEVICE_STATE, FeatureFlags.SET, request)
        _, stream = uapi.DEVICE_STATE.unpack(answer)
        if stream >= 0 or wanted in _ENDS_STREAM:
            self._end_stream()
            self._stream = stream

    def size(self) -> int | None:
        """The driver's estimate of what is left to read at rest, in bytes; None if it has none."""
        if not self._device.has_feature(DeviceFeature.MIG_DATA_SIZE, FeatureFlags.GET):
            return None
        data = bytes(uapi.DATA_SIZE.size)
        answer = self._device.feature(DeviceFeature.MIG_DATA_SIZE, FeatureFlags.GET, data)
        (length,) = uapi.DATA_SIZE.unpack(answer)
        return int(length)

    def read(self, size: int) -> Work[bytes]:
        """Up to `size` bytes of the stream; less if there are no more now."""
        parts = []
        until = time.monotonic() + STREAM_DEADLINE_S
        in_precopy = self.state is MigrationState.PRE_COPY
        while size:
            wanted = min(size, self._ready_bytes()) if in_precopy else size
            try:
                data = self._kernel.read(self._require_stream(), wanted) if wanted else b""
            except BlockingIOError:
                yield from self._wait(until)
                continue
            except OSError as error:
                if error.errno == errno.ENOMSG:
                    break
                raise VfioError(f"{self._device.name}: its state: {error.strerror}") from error
            if not data:
                break
            parts.append(data)
            size -= len(data)
            until = time.monotonic() + STREAM_DEADLINE_S
        return b"".join(parts)

    def write(self, data: bytes) -> Work[None]:
        """More of the stream."""
        until = time.monotonic() + STREAM_DEADLINE_S
        while data:
            try:
                count = self._kernel.write(self._require_stream(), data)
            except BlockingIOError:
                yield from self._wait(until)
                continue
            except OSError as error:
                raise VfioError(
                    f"{self._device.name} does not take its state: {error.strerror}"
                ) from error
            data = data[count:]
            until = time.monotonic() + STREAM_DEADLINE_S

    def _ready_bytes(self) -> int:
        info = bytearray(uapi.PRECOPY_INFO.pack(uapi.PRECOPY_INFO.size, 0, 0, 0))
        self._device.handles.ioctl(
            "tell of its state", self._require_stream(), uapi.Ioctl.MIG_GET_PRECOPY_INFO, info
        )
        _, _, initial_bytes, dirty_bytes = uapi.PRECOPY_INFO.unpack(info)
        return int(initial_bytes + dirty_bytes)

    def _wait(self, until: float) -> Work[None]:
        if time.monotonic() > until:
            raise VfioError(
                f"{self._device.name}: its state does not move on within {STREAM_DEADLINE_S:g} s"
            )
        yield PAUSE_S

    def _require_stream(self) -> int:
        if self._stream < 0:
            raise VfioUserError(errno.EINVAL, "there is no stream in this state")
        return self._stream

    def _end_stream(self) -> None:
        if self._stream >= 0:
            self._kernel.close(self._stream)
            self._stream = -1
