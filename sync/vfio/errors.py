"""Why a function of the host cannot be served, in words that say what to do."""

from sync.errors import SyncError


class VfioError(SyncError):
    """The kernel refused something about a function."""


class NoFunction(VfioError):
    """There is no such PCI function on this host."""

    exit_name = "local"


class NoIommu(VfioError):
    """The function is behind no IOMMU, so that it could not be kept from the guest's memory."""

    exit_name = "local"


class DriverInUse(VfioError):
    """The host's own driver has the function."""

    exit_name = "local"


class GroupNotViable(VfioError):
    """Another function of the same IOMMU group is in the host's hands."""

    exit_name = "local"


class NoVfio(VfioError):
    """The kernel offers no VFIO here."""

    exit_name = "local"


class FunctionBusy(VfioError):
    """Another process has the function."""

    exit_name = "local"


class MemoryNotPinned(VfioError):
    """Guest memory could not be mapped for the function."""

    exit_name = "local"
