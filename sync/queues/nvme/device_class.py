"""NVMe as a class of devices with queues: what the interface asks for, put together."""

from sync.queues.interface import DeviceClass, Memory, Plan
from sync.queues.nvme.inventory import Inventory, take_inventory
from sync.queues.nvme.specification import CLASS_CODE
from sync.queues.nvme.state import ControllerState
from sync.queues.nvme.walk import NvmeWalk
from sync.queues.nvme.watch import NvmeWatch
from sync.registers.profile.locate import DeviceView


class Nvme(DeviceClass):
    """Controllers of the class code 0x010802, whoever made them."""

    name = "nvme"
    version = "1"
    tracks_writes = True

    def precision(self, view: DeviceView) -> int | None:
        return 0 if view.class_code == CLASS_CODE else None

    def inventory(self) -> Plan[bytes]:
        return (yield from take_inventory()).pack()

    def properties(self, inventory: bytes) -> dict[str, str]:
        return dict(Inventory.unpack(inventory).properties())

    def watch(self, memory: Memory, inventory: bytes, state: bytes | None = None) -> NvmeWatch:
        known = None if state is None else ControllerState.unpack(state)
        return NvmeWatch(memory, Inventory.unpack(inventory), known)

    def walk(self, inventory: bytes) -> NvmeWalk:
        return NvmeWalk(Inventory.unpack(inventory))
