"""What can go wrong with devices that have queues."""

from collections.abc import Sequence

from sync.errors import SyncError
from sync.registers.errors import RegisterError


class QueueError(RegisterError):
    """A device with queues could not be watched, walked or started."""


class MemoryUnreadable(SyncError):
    """A device was told of memory that is not the guest's."""


class CannotMove(QueueError):
    """The device is in a state that cannot be carried to another one."""

    exit_name = "refused"

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"the device cannot be moved now: {'; '.join(self.reasons)}")


class WalkFailed(QueueError):
    """The target's device refused a command of the walk; it is reset by the next attempt."""


class WalkTimeout(QueueError):
    """The target's device did not do in time what the walk waits for."""


class StateError(QueueError):
    """The source's description of a device's queues is malformed."""


class PluginError(QueueError):
    """A plug-in of the group `vfio_ferry.queues` cannot be used."""

    exit_name = "usage"
