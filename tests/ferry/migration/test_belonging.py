"""What proves that gateways, memory and QMP socket are one VM's, and what is refused (I11)."""

import pytest

from ferry.errors import Mismatch
from ferry.migration.belonging import GatewayFacts, VmmFacts, compare_places, judge
from sync.vmm.devices import VmmDevice

QEMU, MANAGER = (1, 100), (1, 200)
RAM = frozenset({(5, 50), (5, 51)})


def disk(number: int, socket: str | None = None) -> VmmDevice:
    return VmmDevice(
        f"/machine/peripheral/disk{number}", socket or f"/run/{number}", f"q35 {number}"
    )


def vmm(*devices: VmmDevice, **more: object) -> VmmFacts:
    sockets = tuple((9, int(device.path[-1])) if device.socket else None for device in devices)
    return VmmFacts(**{"devices": devices, "sockets": sockets, **more})  # type: ignore[arg-type]


def gateway(number: int, **more: object) -> GatewayFacts:
    facts = {"listens_at": f"/run/{number}", "socket": (9, number), "memory": RAM, **more}
    return GatewayFacts(f"control{number}", **facts)  # type: ignore[arg-type]


def test_each_gateway_is_told_by_the_socket_that_its_device_was_given() -> None:
    devices = (disk(0), disk(1))
    assert judge(vmm(*devices), [gateway(1), gateway(0)], vouched=False) == devices[::-1]


def test_i11_a_gateway_of_another_vm_is_refused() -> None:
    with pytest.raises(Mismatch, match="is not of the VMM behind --qmp: it listens at /run/2"):
        judge(vmm(disk(0)), [gateway(2)], vouched=True)


def test_a_vmm_that_another_one_has_displaced_at_its_socket_is_refused() -> None:
    ours = vmm(disk(0), pid=10, program=QEMU)
    with pytest.raises(Mismatch, match="the VMM of process 11"):
        judge(ours, [gateway(0, pid=11, program=QEMU)], vouched=True)


def test_a_manager_may_have_made_the_socket_for_its_vmm() -> None:
    ours = vmm(disk(0), pid=10, program=MANAGER)
    assert judge(ours, [gateway(0, pid=11, program=QEMU)], vouched=False) == ours.devices


@pytest.mark.parametrize("proof", [{"pid": 11}, {"files": RAM | {(7, 7)}}])
def test_a_proxy_may_be_between_them_where_process_or_memory_is_the_same(
    proof: dict[str, object],
) -> None:
    ours = vmm(disk(3), **proof)
    assert judge(ours, [gateway(0, pid=11)], vouched=False) == ours.devices


def test_part_of_the_memory_proves_nothing() -> None:
    with pytest.raises(Mismatch):
        judge(vmm(files=RAM - {(5, 51)}), [gateway(0)], vouched=False)


def test_i11_what_nothing_proves_somebody_has_to_vouch_for() -> None:
    for ours in (vmm(), vmm(VmmDevice("/machine/peripheral/disk0", "", ""))):
        with pytest.raises(Mismatch, match=r"nothing proves .* --vouch-one-vm"):
            judge(ours, [gateway(0)], vouched=False)
        assert judge(ours, [gateway(0)], vouched=True) == (*ours.devices, None)[:1]


def test_a_socket_that_is_not_found_here_is_told_by_its_path() -> None:
    ours = VmmFacts(devices=(disk(0),), sockets=(None,))
    assert judge(ours, [gateway(0)], vouched=False) == (disk(0),)
    with pytest.raises(Mismatch):
        judge(ours, [gateway(1)], vouched=False)


def test_another_file_at_the_same_path_is_another_socket() -> None:
    ours = VmmFacts(devices=(disk(0),), sockets=((9, 99),))
    with pytest.raises(Mismatch):
        judge(ours, [gateway(0)], vouched=False)


def test_several_devices_that_cannot_be_told_apart_are_refused() -> None:
    ours = vmm(disk(0, "/proxy/0"), disk(1), pid=11)
    ours = VmmFacts(pid=11, devices=ours.devices, sockets=(None, (9, 1)))
    with pytest.raises(Mismatch, match="the gateway at control0 serves cannot be told"):
        judge(ours, [gateway(0, pid=11), gateway(1, pid=11)], vouched=False)


def test_i11_devices_in_another_order_are_noticed() -> None:
    compare_places(("a", "b"), ("a", "b"))
    with pytest.raises(Mismatch, match=r"device 0 is at 'b' .* same order"):
        compare_places(("b", "a"), ("a", "b"))


def test_one_device_may_be_in_a_place_that_is_not_told_but_not_several() -> None:
    compare_places(("",), ("a",))
    for here, there in ((("a", ""), ("a", "b")), (("a", "b"), ("a", ""))):
        with pytest.raises(Mismatch, match="where device 1 is"):
            compare_places(here, there)
