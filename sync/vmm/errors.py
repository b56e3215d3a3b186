"""What can go wrong between us and a VMM. Each message says what to do next where it can."""

from sync.errors import SyncError


class VmmError(SyncError):
    """Something about a VMM or its control connection is not as it has to be."""

    exit_name = "vmm"


class QmpProtocolError(VmmError):
    """The VMM sent something that is no QMP. The connection is of no further use."""


class VmmGone(VmmError):
    """The VMM's control connection ended, or the VMM is not there."""


class VmmBusy(VmmGone):
    """The VMM's socket is there, and the VMM does not greet: it serves one client at a time."""


class VmmNotReady(VmmError):
    """The VMM is in a state that does not allow what was asked, or did not leave it in time."""


class VmmRefused(VmmError):
    """The VMM answered a command with an error.

    `command` is its name, `error_class` and `description` are the VMM's own words.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description} ({error_class})")
        self.command = command
        self.error_class = error_class
        self.description = description


class MigrationFailed(VmmError):
    """The VMM's migration ended as `status` (`failed`, `cancelled`, …) with the VMM's reason."""

    def __init__(self, status: str, description: str) -> None:
        reason = f": {description}" if description else ""
        super().__init__(f"the VMM's migration is {status}{reason}")
        self.status = status
        self.description = description
