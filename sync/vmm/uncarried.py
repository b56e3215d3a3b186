"""What of a QEMU cannot be carried, whatever its devices are: asked for by name, before anything is
touched. QEMU itself would migrate some of it, and what arrives would not work.

Source of the names: QEMU's QOM, as `qom-list` tells it (QEMU 11.1).
"""

from contextlib import suppress

from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmNotReady, VmmRefused

FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
"""Where the machine's devices are: with an id, without one, and made by the machine itself."""
DEVICES = {
    "intel-iommu": "a vIOMMU",
    "amd-iommu": "a vIOMMU",
    "virtio-iommu-pci": "a vIOMMU",
    "virtio-iommu-device": "a vIOMMU",
    "arm-smmuv3": "a vIOMMU",
    "riscv-iommu-pci": "a vIOMMU",
    "riscv-iommu-sys": "a vIOMMU",
}
"""By type: a guest behind a vIOMMU has its devices use addresses that it changes as it goes, and
neither the gateway's map of its memory nor the target's device follows these."""


async def what_is_not_carried(vmm: Vmm) -> list[str]:
    """Each thing by name, with its type; empty for a VMM of another kind, which has no such names.

    Raises `VmmError`.
    """
    found = []
    for folder in FOLDERS:
        with suppress(VmmRefused):
            for item in await vmm.execute("qom-list", {"path": folder}):
                kind = str(item.get("type")).removeprefix("child<").removesuffix(">")
                if kind in DEVICES:
                    found.append(f"{DEVICES[kind]} ({kind})")
    with suppress(VmmRefused):
        where = {"path": "/machine", "property": "confidential-guest-support"}
        guard = await vmm.execute("qom-get", where)
        if guard and isinstance(guard, str):
            kind = str(await vmm.execute("qom-get", {"path": guard, "property": "type"}))
            found.append(f"confidential memory ({kind}), which nobody but the guest can read")
    return found


async def check_carried(vmm: Vmm) -> None:
    """Raises `VmmNotReady` if the VMM has what cannot be carried."""
    if found := await what_is_not_carried(vmm):
        raise VmmNotReady(
            f"the VMM has {' and '.join(found)}: this cannot be migrated; start the guest without"
        )
