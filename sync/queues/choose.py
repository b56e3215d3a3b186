"""Which class of devices with queues knows a device: NVMe, virtio, and what plug-ins add.

A plug-in is an entry point of the group `vfio_ferry.queues`: a `DeviceClass`, or a callable without
parameters that returns one. Plug-ins are preferred to what comes with the product.
"""

from importlib.metadata import EntryPoint, entry_points

from sync.queues.errors import PluginError
from sync.queues.interface import DeviceClass
from sync.queues.nvme.device_class import Nvme
from sync.queues.virtio.device_class import Virtio
from sync.registers.profile.locate import DeviceView

ENTRY_POINT_GROUP = "vfio_ferry.queues"


def load_classes() -> tuple[DeviceClass, ...]:
    """All classes, the preferred ones first. Raises `PluginError`."""
    return (
        *(_from_plugin(point) for point in entry_points(group=ENTRY_POINT_GROUP)),
        Nvme(),
        Virtio(),
    )


def find_class(view: DeviceView, classes: tuple[DeviceClass, ...]) -> DeviceClass | None:
    """The class that fits a device most narrowly; the first one among equals."""
    fitting = [
        (precision, -order, each)
        for order, each in enumerate(classes)
        if (precision := each.precision(view)) is not None
    ]
    return max(fitting, key=lambda fit: fit[:2])[2] if fitting else None


def _from_plugin(point: EntryPoint) -> DeviceClass:
    where = f"the plug-in {point.name} ({point.value})"
    try:
        loaded = point.load()
        if callable(loaded):
            loaded = loaded()
    except Exception as error:
        raise PluginError(f"{where} fails: {error!r}") from error
    if not isinstance(loaded, DeviceClass):
        raise PluginError(f"{where} gives a {type(loaded).__name__}; a DeviceClass is needed")
    return loaded
