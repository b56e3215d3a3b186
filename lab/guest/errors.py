"""What can go wrong inside the guest process."""

from sync.errors import SyncError


class GuestError(SyncError):
    """Something about our guest is not as it has to be."""


class GuestOptionsError(GuestError):
    """An option of the guest does not make sense, alone or with the others."""

    exit_name = "usage"


class RamError(GuestError):
    """An access to guest-physical memory that is not there."""


class GuestPanic(GuestError):
    """The guest's driver cannot go on: its device is not what it claims to be."""


class DeviceLost(GuestError):
    """The vfio-user connection to the device is gone."""


class StreamError(GuestError):
    """A migration stream is malformed, truncated or from a guest that is built differently."""


class MigrationRefused(GuestError):
    """A migration command does not fit the state that the guest is in."""
