"""The device, the VMM or the gateway itself goes away and comes back."""

import os
import struct
import threading
from collections.abc import Callable
from functools import partial

import pytest
import trio

from lab.vfio_user.client import Client
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import DeviceLost, DeviceTimeout, VmmLost
from sync.registers.record import Access, Op, pack_accesses
from sync.vfio_user.protocol import (
    Command,
    Disconnected,
    DmaMap,
    MigrationState,
    Version,
    encode_message,
)
from tests.sync.gateway.conftest import House, Pause, ServedDevice
from tests.sync.gateway.raw_peers import PAGE, connect_raw, has_ended, new_ram, status_of


def test_a_vmm_that_is_first_waits_for_its_device(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house = make_house()
    vmms: list[Client] = []
    waiting = threading.Thread(target=lambda: vmms.append(house.vmm()))
    waiting.start()
    device = make_device()
    house.serve(device)
    waiting.join(10)
    assert vmms[0].region_read(0, 0, 4) == bytes(4)


def test_a_vmm_is_not_kept_waiting_for_ever(make_house: Callable[..., House]) -> None:
    house = make_house(device_wait_s=0.05)
    with connect_raw(house.vmm_path) as sock:
        sock.sendall(encode_message(1, Command.VERSION, Version().pack()))
        assert has_ended(sock)
    house.wait_event("vmm-refused")


def test_the_device_goes_and_comes_back(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device()
    server = house.serve(device)
    vmm = house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.mediate(tracker="none", capture=True)
            await trio.to_thread.run_sync(house.end_device, server)
            await trio.to_thread.run_sync(house.wait_event, "device-lost")
            with pytest.raises(DeviceLost):
                await gateway.journal()
            with pytest.raises(Disconnected):
                vmm.region_read(0, 0, 4)
            info = await gateway.status()
            assert (info.state, info.owner) == ("passthrough", "unowned")
            assert (info.device_connected, info.vmm_connected) == (False, False)
            await gateway.passthrough()
            again = make_device()
            await trio.to_thread.run_sync(house.serve, again)
            new = await trio.to_thread.run_sync(house.vmm)
            with pytest.raises(DeviceLost):
                await gateway.mediate(tracker="none", capture=True)
            assert new.region_read(0, 0, 4) == bytes(4)
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.mediate(tracker="none", capture=True)

    trio.run(main)


def test_the_vmm_goes_and_another_comes(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = new_ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)
    vmm.region_write(0, 0, b"mine")

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            mediation = await gateway.mediate(tracker="message", capture=True)
            assert mediation.dirty_fd is not None
            os.close(mediation.dirty_fd)
            vmm.close()
            await trio.to_thread.run_sync(house.wait_event, "vmm-lost")
            with pytest.raises(VmmLost):
                await gateway.dirty()
            info = await gateway.status()
            assert (info.state, info.owner, info.memory_pages) == ("passthrough", "unowned", 0)
            assert info.layout_generation > mediation.layout_generation

    trio.run(main)
    device.wait(lambda: device.attachments == 2)
    assert device.mapped == {}, "the device was told"
    new = house.vmm()
    assert new.region_read(0, 0, 4) == bytes(4), "what was under way for the first is void"
    os.close(ram)


def test_the_device_dies_in_the_middle_of_an_access(
    make_house: Callable[..., House], make_device: type[ServedDevice], pause: Pause
) -> None:
    house, device = make_house(), make_device()
    server = house.serve(device)
    vmm = house.vmm()
    device.on_read = pause
    errors: list[BaseException] = []

    def read() -> None:
        try:
            vmm.region_read(0, 0, 4)
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert pause.reached.wait(10)
    server.close()
    reader.join(10)
    assert isinstance(errors[0], Disconnected)
    pause.release()
    again = make_device()
    house.wait_event("device-lost")
    house.end_device(server)
    house.serve(again)
    assert house.vmm().region_read(0, 0, 4) == bytes(4)


def test_the_vmm_dies_in_the_middle_of_an_access(
    make_house: Callable[..., House], make_device: type[ServedDevice], pause: Pause
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    with connect_raw(house.vmm_path) as sock:
        sock.sendall(encode_message(1, Command.VERSION, Version().pack()))
        assert sock.recv(1 << 16)
        device.on_read = pause
        sock.sendall(encode_message(2, Command.REGION_READ, struct.pack("<QII", 0, 0, 4)))
        assert pause.reached.wait(10)
    house.wait_event("vmm-lost")
    device.on_read = None
    pause.release()
    vmm = house.vmm()
    assert vmm.region_read(0, 0, 4) == bytes(4), "the late reply is nobody else's"


def test_i8_a_device_that_stalls_in_a_job_costs_the_job_and_not_the_guest_its_device(
    make_house: Callable[..., House], make_device: type[ServedDevice], pause: Pause
) -> None:
    house, device = make_house(device_deadline_s=0.2), make_device()
    house.serve(device)
    vmm = house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            device.on_read = pause
            with pytest.raises(DeviceTimeout):
                await gateway.mediate(
                    tracker="none",
                    capture=True,
                    snapshot=pack_accesses([Access(Op.READ, 0, 0, 4)]),
                )
            device.on_read = None
            pause.release()
            await gateway.passthrough()
        assert vmm.region_read(0, 0, 4) == bytes(4)

    trio.run(main)


def test_i8_nobody_waits_for_a_device_that_does_not_answer_any_more(
    make_house: Callable[..., House], make_device: type[ServedDevice], pause: Pause
) -> None:
    """The way back is tried, and whoever looks hears what is the matter; it is taken when the
    device answers. A target is fenced whatever its device does."""
    house, device = make_house(device_deadline_s=0.2), make_device()
    house.serve(device)
    vmm = house.vmm()
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), (ram := new_ram(2)))

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.mediate(tracker="none", capture=True)
            device.on_unmap = lambda: pause(0)
            for call in (partial(gateway.stop, fence=True), gateway.passthrough):
                with pytest.raises(DeviceTimeout):
                    await call()
            assert (await status_of(house)).lease == "source"
        device.on_unmap = None
        pause.release()
        await trio.to_thread.run_sync(house.wait_event, "restored")
        assert vmm.region_read(0, 0, 4) == bytes(4)

    trio.run(main)
    os.close(ram)


def test_a_gateway_that_was_started_anew_finds_the_device_as_it_was(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    """Nothing is stored that the VMM does not send again; a device that a migration had stopped is
    set running when the VMM has shared its memory and touches a register."""
    house, device = make_house(), make_device(v2=True)
    house.serve(device)
    vmm = house.vmm()
    vmm.region_write(0, 0, b"keep")
    ram = new_ram(2)

    async def migrate() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.mediate(tracker="none", capture=False)
            await gateway.mig_state(MigrationState.STOP_COPY)
            await trio.to_thread.run_sync(house.end)

    trio.run(migrate)
    assert device.features.state is MigrationState.STOP_COPY
    house.open()
    again = house.vmm()
    again.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)
    assert device.features.state is MigrationState.STOP_COPY, "it has no memory yet"
    assert again.region_read(0, 0, 4) == b"keep"
    assert device.features.state.name == "RUNNING"
    info = trio.run(status_of, house)
    assert (info.owner, info.session) == ("owned", "")
    os.close(ram)
