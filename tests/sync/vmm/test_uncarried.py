"""What cannot be carried is refused by name; a VMM without such names has nothing of it."""

from typing import Any

import pytest

from sync.vmm.driver import ANNOUNCEMENT, Vmm
from sync.vmm.errors import VmmNotReady
from sync.vmm.uncarried import check_carried


def test_a_vmm_with_a_viommu_is_refused(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            answer, devices = qemu.query, ["virtio-blk-pci", "memory-region"]
            qemu.query = lambda name: (
                [{"name": "x", "type": f"child<{kind}>"} for kind in devices]
                if name == "qom-list"
                else answer(name)
            )
            await check_carried(vmm)
            devices.append("virtio-iommu-pci")
            with pytest.raises(VmmNotReady, match=r"a vIOMMU \(virtio-iommu-pci\).*start the gues"):
                await check_carried(vmm)

    with_qemu(body)


def test_a_vmm_that_does_not_know_what_is_asked_has_nothing_of_it(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        for command in ("qom-list", "qom-get", "announce-self"):
            qemu.errors[command] = "CommandNotFound"
        async with await Vmm.connect(qemu.path) as vmm:
            await check_carried(vmm)
            await vmm.announce()
            qemu.errors.clear()
            await vmm.announce()
        assert qemu.arguments["announce-self"] == ANNOUNCEMENT

    with_qemu(body)
