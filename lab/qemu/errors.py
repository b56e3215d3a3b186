"""What can be wrong with QEMU, its environment or its guest. Each message says what to do."""

from ferry.errors import QemuError


class EnvironmentFailed(QemuError):
    """Making the environment failed; what was downloaded is kept, so running it again goes on."""


class GuestImageError(QemuError):
    """A kernel, a module or a program that the guest needs cannot be used."""


class MachineError(QemuError):
    """A QEMU process did not start, did not get ready or ended."""


class GuestReportError(QemuError):
    """The guest's report is malformed, or did not come in time."""


class LanUnavailable(QemuError):
    """The machine does not let us have a network namespace with a TAP device."""
