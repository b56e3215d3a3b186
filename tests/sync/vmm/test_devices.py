"""How a VMM's vfio-user devices are found and read, in the words of QEMU 11.1.3."""

from typing import Any, cast

import trio

from sync.vmm.devices import VmmDevice, list_devices
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmRefused

NAMES = {
    "disk": "vfio-user:\\x2frun\\x2fvm 1\\x5bx\\x5d.sock base BAR 1[0]",
    "device[0]": "vfio-user:gateway.sock BAR 0[0]",
    "mute": "bus master[0]",
}
VALUES: dict[tuple[str, str], Any] = {
    ("/machine/q35", "type"): "q35-pcihost",
    ("/machine/peripheral/disk", "addr"): 0,
    ("/machine/peripheral/disk", "parent_bus"): "/machine/peripheral/port4/port4",
    ("/machine/peripheral/port4", "addr"): "04.1",
    ("/machine/peripheral/port4", "parent_bus"): "/machine/q35/pcie.0",
    ("/machine/peripheral-anon/device[0]", "addr"): 24,
    ("/machine/peripheral-anon/device[0]", "parent_bus"): "/machine/q35/pcie.0",
}


class Qemu:
    async def execute(self, command: str, arguments: dict[str, str]) -> Any:
        path = arguments["path"]
        if command == "qom-get":
            try:
                return VALUES[path, arguments["property"]]
            except KeyError:
                raise VmmRefused(command, "GenericError", "not found") from None
        kind = "child<vfio-user-pci>"
        if path == "/machine/peripheral":
            return [{"name": name, "type": kind} for name in ("disk", "mute")]
        if path == "/machine/peripheral-anon":
            return [{"name": "device[0]", "type": kind}, {"name": "type", "type": "string"}]
        return [
            {"name": "socket", "type": "SocketAddress"},
            {"name": NAMES[path.rpartition("/")[2]], "type": "child<memory-region>"},
        ]


def test_socket_and_place_of_each_device() -> None:
    found = trio.run(list_devices, cast(Vmm, Qemu()))
    assert found == (
        VmmDevice("/machine/peripheral/disk", "/run/vm 1[x].sock", "00: 04.1 00.0"),
        VmmDevice("/machine/peripheral/mute", "", ""),
        VmmDevice("/machine/peripheral-anon/device[0]", "gateway.sock", "00: 03.0"),
    )
