"""What the guest's VMM tells of its device when it is asked for QOM objects, in QEMU's words.

Source: QEMU's qapi/qom.json; hw/vfio-user/pci.c for what a device's memory regions are called.
"""

from lab.guest.errors import GuestError
from sync.vmm.qmp import JsonObject

_BUS = "/machine/guest/pcie.0"
_DEVICE = "/machine/peripheral/disk"
_ESCAPED = str.maketrans({code: f"\\x{ord(code):02x}" for code in "/[]\\"})


class ObjectModel:
    """The machine's objects: one device, whose socket is at `device_path`."""

    def __init__(self, device_path: str) -> None:
        name = f"vfio-user:{device_path}".translate(_ESCAPED)
        self._children = {
            "/machine/peripheral": [_child("disk", "vfio-user-pci")],
            "/machine/peripheral-anon": [],
            _DEVICE: [_child(f"{name} BAR 0[0]", "memory-region")],
        }
        self._values = {
            ("/machine", "type"): "guest-machine",
            ("/machine/guest", "type"): "guest-host",
            (_DEVICE, "addr"): "04.0",
            (_DEVICE, "parent_bus"): _BUS,
        }

    def list(self, path: str) -> list[JsonObject]:
        """`qom-list`. Raises `GuestError` for an object that is not there."""
        try:
            return self._children[path]
        except KeyError:
            raise GuestError(f"Path '{path}' could not be resolved") from None

    def get(self, path: str, name: str) -> str:
        """`qom-get`. Raises `GuestError` for a property that is not there."""
        try:
            return self._values[path, name]
        except KeyError:
            raise GuestError(f"Property '{path}.{name}' not found") from None


def _child(name: str, kind: str) -> JsonObject:
    return {"name": name, "type": f"child<{kind}>"}
