"""Errors of this room. What a guest does wrong is answered to the guest, never raised."""

from sync.errors import SyncError


class DeviceError(SyncError):
    """A device cannot be built or served with the options given. Fix the option named."""

    exit_name = "local"


class StateStreamError(SyncError):
    """A saved device state is truncated, corrupted, or made by another kind of device."""
