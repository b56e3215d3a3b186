"""The root of every error that `sync` raises. Each room derives its own beside its code."""


class SyncError(Exception):
    """Something about a device, a VMM or their state is not as it has to be."""
