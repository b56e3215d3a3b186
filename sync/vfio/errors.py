"""Why a function of the host cannot be served, in words that say what to do."""

from sync.errors import SyncError


class VfioError(SyncError):
    """The kernel refused something about a function."""


class NoFunction(VfioError):
    """There is no such PCI function on this host."""


class NoIommu(VfioError):
    """The function is behind no IOMMU, so that it could not be kept from the guest's memory."""


class DriverInUse(VfioError):
    """The host's own driver has the function."""


class GroupNotViable(VfioError):
    """Another function of the same IOMMU group is in the host's hands."""


class NoVfio(VfioError):
    """The kernel offers no VFIO here."""


class FunctionBusy(VfioError):
    """Another process has the function."""


class MemoryNotPinned(VfioError):
    """Guest memory could not be mapped for the function."""
