"""virtio as a class of devices with queues: what the interface asks for, put together."""

from sync.queues.interface import DeviceClass, Memory, Plan
from sync.queues.virtio.inventory import Inventory, take_inventory
from sync.queues.virtio.specification import ACCESS_PLATFORM, VENDOR, kind_of
from sync.queues.virtio.state import DeviceState
from sync.queues.virtio.walk import VirtioWalk
from sync.queues.virtio.watch import VirtioWatch
from sync.registers.profile.locate import DeviceView


class Virtio(DeviceClass):
    """Block and entropy devices over PCI. The state of other types is more than their rings."""

    name = "virtio"
    version = "1"
    tracks_writes = False

    def precision(self, view: DeviceView) -> int | None:
        return 0 if view.vendor == VENDOR and kind_of(view.device) is not None else None

    def inventory(self) -> Plan[bytes]:
        return (yield from take_inventory()).pack()

    def properties(self, inventory: bytes) -> dict[str, str]:
        return dict(Inventory.unpack(inventory).properties())

    def unfenced(self, inventory: bytes) -> str:
        if Inventory.unpack(inventory).features & ACCESS_PLATFORM:
            return ""
        return (
            "it does not offer VIRTIO_F_ACCESS_PLATFORM, so that its DMA may go past the IOMMU "
            "(QEMU: iommu_platform=on)"
        )

    def watch(self, memory: Memory, inventory: bytes, state: bytes | None = None) -> VirtioWatch:
        known = None if state is None else DeviceState.unpack(state)
        return VirtioWatch(memory, Inventory.unpack(inventory), known)

    def walk(self, inventory: bytes) -> VirtioWalk:
        return VirtioWalk(Inventory.unpack(inventory))
