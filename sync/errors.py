"""The root of every error that `sync` raises, and what more than one of its parts has to know.

Each part derives its own errors beside its code.
"""

from typing import ClassVar


class SyncError(Exception):
    """Something about a device, a VMM or their state is not as it has to be."""

    exit_name: ClassVar[str] = "device"
    """The name of the exit code of a command that ends with it (`vfio-ferry exit-codes`)."""


class DeviceRefusal(SyncError):
    """The device answered with an error: whoever talks to it raises this, or what derives of it."""
