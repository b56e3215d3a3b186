"""The root of every error that `sync` raises, and what more than one of its parts has to know.

Each part derives its own errors beside its code.
"""


class SyncError(Exception):
    """Something about a device, a VMM or their state is not as it has to be."""


class DeviceRefusal(SyncError):
    """The device answered with an error: whoever talks to it raises this, or what derives of it."""
