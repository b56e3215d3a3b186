"""A real gateway between sockets: what a VMM, a device and a controller get, and who may come."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lab.vfio_user.client import Client
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.listener import Listener
from sync.gateway.errors import (
    AnswerLost,
    BadRequest,
    GatewayLost,
    GatewayUnreachable,
    LeaseHeld,
    LeaseRequired,
    NoDevice,
    NoVmm,
    SocketInUse,
    Unsupported,
    WrongSession,
    WrongState,
)
from sync.memory import GuestMemory
from sync.registers.record import Access, Op, pack_accesses, unpack_accesses
from sync.vfio_user.protocol import (
    Capabilities,
    DmaMap,
    DmaUnmap,
    FeatureIndex,
    IrqSet,
    MigrationState,
    RegionAccess,
    SetIrqs,
    TwinSocket,
    VfioUserError,
)
from tests.sync.gateway.conftest import House, Pause, ServedDevice

PAGE = 4096


def _ram(pages: int) -> int:
    number = os.memfd_create("ram")
    os.ftruncate(number, pages * PAGE)
    return number


def test_a_vmm_works_with_its_device_through_the_gateway(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    assert vmm.server_capabilities.twin_socket is None, "the twin socket is the gateway's own"
    assert vmm.server_capabilities.write_multiple
    assert vmm.device_info().num_regions == 9
    assert vmm.region_info(0).size == 4096
    vmm.region_write(0, 0x40, b"abcd")
    vmm.region_write(0, 0x44, b"efgh", posted=True)
    vmm.write_multi([RegionAccess(0x48, 0, 2, b"ij")])
    assert vmm.region_read(0, 0x40, 10) == b"abcdefghij"
    device.registers.refuse_offsets = {0x60}
    with pytest.raises(VfioUserError) as refused:
        vmm.region_read(0, 0x60, 4)
    assert refused.value.errno == errno.EIO
    ram = _ram(4)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 4 * PAGE), ram)
    assert device.mapped[0x10000][1], "with its descriptor"
    vmm.dma_unmap(DmaUnmap(0, 0x10000, 4 * PAGE))
    assert device.mapped == {}
    os.close(ram)


@pytest.mark.parametrize("twin", [True, False])
def test_dma_by_message_on_either_socket(
    make_house: Callable[..., House], make_device: type[ServedDevice], twin: bool
) -> None:
    """Without a twin socket the device's messages cross the VMM's on the one connection."""
    house, device = make_house(), make_device()
    house.serve(
        device,
        capabilities=Capabilities(max_msg_fds=16, twin_socket=TwinSocket(True) if twin else None),
    )
    vmm = house.vmm()
    ram = _ram(4)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 4 * PAGE), ram)

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.mediate(tracker="message", capture=False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, _hammer_dma, device)
                nursery.start_soon(trio.to_thread.run_sync, _hammer_registers, vmm)
            dirty = await gateway.dirty()
            assert dirty.half == 0

    trio.run(main)
    assert os.pread(ram, 4, 0) == (199).to_bytes(4, "little")
    os.close(ram)


def _hammer_dma(device: ServedDevice) -> None:
    for value in range(200):
        device.dma.write(0x10000, value.to_bytes(4, "little"))
        assert device.dma.read(0x10000, 4) == value.to_bytes(4, "little")


def _hammer_registers(vmm: Client) -> None:
    for value in range(200):
        vmm.region_write(0, 0, value.to_bytes(4, "little"), posted=True)
        assert vmm.region_read(0, 0, 4) == value.to_bytes(4, "little")


def test_memory_without_a_descriptor_is_the_vmms_to_serve(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    seen: list[tuple[int, bytes]] = []
    vmm = house.vmm(
        on_dma_read=lambda address, count: bytes([address & 0xFF]) * count,
        on_dma_write=lambda address, data: seen.append((address, data)),
    )
    vmm.dma_map(DmaMap(3, 0, 0x10000, PAGE), None)
    assert device.dma.read(0x10007, 3) == b"\7\7\7"
    device.dma.write(0x10010, b"data")
    assert seen == [(0x10010, b"data")]
    with pytest.raises(VfioUserError):
        device.dma.read(0x90000, 1)


def test_a_whole_migration_at_the_source(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device(v2=True, logging=True)
    house.serve(device)
    vmm = house.vmm()
    ram = _ram(8)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 8 * PAGE), ram)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    vmm.set_irqs(SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 0, 1), [event])
    state = os.urandom((3 << 20) + 5)

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE, session="s1"
        ) as gateway:
            info = gateway.info
            assert (info.identity.vendor, info.identity.device) == (0x1AF4, 0x1042)
            assert (info.supports.v2, info.supports.logging, info.supports.reset) == (True,) * 3
            assert info.regions[0].size == 4096 and info.irqs[2].count == 4
            assert len(info.config_space) == 256
            assert (info.state, info.owner, info.memory_pages) == ("passthrough", "owned", 8)
            regions = await gateway.memory()
            with GuestMemory.map(regions, writable=True) as memory:
                memory.array[PAGE] = 7
                assert memory.n_pages == info.memory_pages
            for region in regions:
                os.close(region.fd)
            assert os.pread(ram, 1, PAGE) == b"\7"
            mediation = await gateway.mediate(
                tracker="logging", capture=True, snapshot=pack_accesses([Access(Op.READ, 0, 0, 4)])
            )
            assert mediation.page_size == PAGE
            vmm.region_write(0, 4, b"late")
            device.features.wrote(0x13000, 10)
            dirty = await gateway.dirty()
            start = dirty.half * mediation.half_bytes
            assert mediation.dirty_fd is not None
            assert os.pread(mediation.dirty_fd, 8, start) == b"\x08" + bytes(7)
            assert dirty.layout_generation == mediation.layout_generation
            os.close(mediation.dirty_fd)
            journal = await gateway.journal()
            assert [access.data for access in unpack_accesses(journal.records)] == [b"late"]
            await gateway.mig_state(MigrationState.PRE_COPY)
            device.features.state_data = state
            assert await gateway.mig_read(4 << 20) == state
            await gateway.mig_state(MigrationState.STOP_COPY)
            device.features.state_data = b"left"
            assert await gateway.mig_size() == 4
            device.features.refuse.add(FeatureIndex.MIG_DATA_SIZE)
            assert await gateway.mig_size() is None
            resume = pack_accesses([Access(Op.WRITE, 0, 8, 4, b"kick")])
            await gateway.stop(fence=False, resume=resume)
            with pytest.raises(WrongSession):
                await gateway.release("another")
            await gateway.release("s1")
            await gateway.release("s1")
            assert (await gateway.status()).owner == "released"
            with pytest.raises(WrongState):
                await gateway.passthrough()
            await gateway.reclaim("s1")
            await gateway.passthrough()
            await gateway.passthrough()
            assert device.features.state is MigrationState.RUNNING
            assert bytes(device.registers.bar[8:12]) == b"kick"
            assert os.eventfd_read(event) == 1
            info = await gateway.status()
            assert (info.state, info.owner) == ("passthrough", "owned")
        vmm.region_write(0, 4, b"free")

    trio.run(main)
    os.close(ram)
    os.close(event)


def test_a_whole_migration_at_the_target(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device(v2=True)
    house.serve(device)
    vmm = house.vmm()
    ram = _ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)
    state = os.urandom((2 << 20) + 5)

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.TARGET, session="s1"
        ) as gateway:
            await gateway.standby("s1")
            assert device.mapped == {}
            await gateway.mig_state(MigrationState.RESUMING)
            await gateway.mig_write(state)
            await gateway.mig_state(MigrationState.STOP)
            vmm.region_write(0, 0, b"bell")
            assert bytes(device.registers.bar[:4]) == bytes(4)
            assert (await gateway.status()).dropped_writes == 1
            with pytest.raises(WrongState):
                await gateway.start()
            held = pack_accesses([Access(Op.WRITE, 0, 4, 4, b"held")])
            await gateway.own("s1", held)
            await gateway.own("s1")
            with pytest.raises(WrongState):
                await gateway.abandon()
            await gateway.start(pack_accesses([Access(Op.WRITE, 0, 8, 4, b"more")]))
            info = await gateway.status()
            assert (info.state, info.owner, info.session) == ("passthrough", "owned", "s1")
            assert info.sessions == {"s1": "about-to-run"}
            with pytest.raises(WrongState):
                await gateway.fence("s1")
            await gateway.running("s1")
            verdict = await gateway.verdict()
            assert (verdict.role, verdict.fate, verdict.proof) == ("target", "running", "")

    trio.run(main)
    assert device.features.loaded == state
    assert device.features.state is MigrationState.RUNNING
    assert bytes(device.registers.bar[4:12]) == b"heldmore"
    assert device.mapped[0x10000][1]
    vmm.region_write(0, 0, b"bell")
    assert bytes(device.registers.bar[:4]) == b"bell"
    os.close(ram)


# --- who may come ---


def test_sockets_are_for_their_owner_alone(make_house: Callable[..., House]) -> None:
    house = make_house()
    for path in (house.vmm_path, house.control_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    house.end()
    assert not house.vmm_path.exists() and not house.control_path.exists()
    house.open()


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    dead = Listener(path)
    os.close(os.dup(dead.fileno()))
    dead._sock.close()
    assert path.exists()
    live = Listener(path)
    with pytest.raises(SocketInUse):
        Listener(path)
    live.close()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(SocketInUse):
        Listener(path)
    assert path.read_text() == "precious"


def test_a_second_gateway_is_refused_and_disturbs_nothing(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    with pytest.raises(SocketInUse):
        house.second()
    vmm.region_write(0, 0, b"abcd")
    assert device.attachments == 1


def test_one_lease_and_many_observers(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house = make_house()
    house.serve(make_device())
    house.vmm()

    async def main() -> None:
        path = house.control_path
        async with await GatewayClient.connect(path, role=ClientRole.SOURCE, session="s") as holder:
            for role in (ClientRole.SOURCE, ClientRole.TARGET):
                with pytest.raises(LeaseHeld):
                    await GatewayClient.connect(path, role=role)
            async with await GatewayClient.connect(path) as observer:
                assert (await observer.status()).lease == "source"
                assert await observer.memory() == []
                with pytest.raises(LeaseRequired):
                    await observer.mediate(tracker="none", capture=True)
            with pytest.raises(LeaseRequired):
                await holder.standby("s")
            await holder.mediate(tracker="none", capture=True)
        await trio.to_thread.run_sync(house.wait_event, "restored")
        async with await GatewayClient.connect(path, role=ClientRole.TARGET) as holder:
            assert holder.info.lease == "target"

    trio.run(main)


def test_a_lease_that_somebody_has_for_a_moment_is_waited_for(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
) -> None:
    """`doctor` takes it to look at registers: a migration that begins just then is not to fail."""
    house = make_house()
    house.serve(make_device())
    house.vmm()
    refused = trio.Event()

    class Client(GatewayClient):
        @classmethod
        async def _connect(cls, *whom: Any) -> "Client":
            try:
                return await super()._connect(*whom)
            except LeaseHeld:
                refused.set()
                raise

    async def main() -> None:
        path = house.control_path
        holder = await GatewayClient.connect(path, role=ClientRole.SOURCE)

        async def end() -> None:
            await refused.wait()
            await holder.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            async with await Client.connect(path, role=ClientRole.TARGET) as client:
                assert client.info.lease == "target"

    trio.run(main)


def test_requests_are_refused_with_a_reason(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house = make_house()

    async def main() -> None:
        with pytest.raises(GatewayUnreachable):
            await GatewayClient.connect(house.control_path.with_name("nobody"))
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            with pytest.raises(NoDevice):
                await gateway.mediate(tracker="none", capture=True)
            house.serve(make_device())
            await trio.to_thread.run_sync(house.wait_event, "device-connected")
            with pytest.raises(NoVmm):
                await gateway.mediate(tracker="none", capture=True)
            vmm = await trio.to_thread.run_sync(house.vmm)
            with pytest.raises(Unsupported):
                await gateway.mediate(tracker="message", capture=True)
            with pytest.raises(BadRequest):
                await gateway.mediate(tracker="magic", capture=True)  # type: ignore[arg-type]
            with pytest.raises(BadRequest):
                await gateway.mediate(tracker="none", page_size=4095, capture=True)
            with pytest.raises(BadRequest):
                await gateway.batch(b"x")
            with pytest.raises(WrongState):
                await gateway.dirty()
            with pytest.raises(Unsupported):
                await gateway.mig_size()
            with pytest.raises(BadRequest):
                await gateway.arm_recovery("/x", float("nan"))
            assert vmm.region_read(0, 0, 4) == bytes(4)

    trio.run(main)


def test_many_regions_are_handed_out_in_parts(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    open_fds: Callable[[], int],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = _ram(150)
    for number in range(150):
        vmm.dma_map(DmaMap(3, number * PAGE, number * 2 * PAGE, PAGE), ram)

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path) as gateway:
            before = open_fds()
            regions = await gateway.memory()
            assert [region.iova for region in regions] == [n * 2 * PAGE for n in range(150)]
            # The gateway, in this same process, closes its own copies behind the answer.
            wait_until(lambda: open_fds() == before + 150)
            with GuestMemory.map(regions) as memory:
                assert memory.n_pages == 150
            for region in regions:
                os.close(region.fd)

    trio.run(main)
    os.close(ram)


def test_a_cancelled_request_leaves_the_connection_usable(
    make_house: Callable[..., House], make_device: type[ServedDevice], pause: Pause
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.mediate(tracker="none", capture=True)
            vmm.region_write(0, 0, b"abcd")
            device.on_read = pause
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gateway.batch, pack_accesses([Access(Op.READ, 0, 0, 4)]))
                await trio.to_thread.run_sync(pause.reached.wait)
                nursery.cancel_scope.cancel()
            device.on_read = None
            pause.release()
            assert (await gateway.status()).state == "mediated", "the answer is the right one"
            with trio.CancelScope() as scope:
                scope.cancel()
                await gateway.journal()
            part = await gateway.journal()
            assert len(part.records) == 32, "nothing was sent, so nothing was lost"

    trio.run(main)


def test_i4_a_journal_that_has_overflowed_begins_anew_behind_a_snapshot(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(journal_records=4), make_device()
    house.serve(device)
    vmm = house.vmm()
    snapshot = pack_accesses([Access(Op.READ, 0, 0, 4)])

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            with pytest.raises(WrongState):
                await gateway.recapture(snapshot)
            await gateway.mediate(tracker="none", capture=True)
            for number in range(9):
                vmm.region_write(0, 0, number.to_bytes(4, "little"))
            assert (await gateway.journal()).overflow
            values, seq = await gateway.recapture(snapshot)
            (read,) = unpack_accesses(values)
            assert read.data == (8).to_bytes(4, "little")
            vmm.region_write(0, 4, b"next")
            records, overflow = await gateway.journal()
            (written,) = unpack_accesses(records)
            assert (written.data, overflow) == (b"next", False)
            assert int.from_bytes(records[:8], "little") == seq

    trio.run(main)


def test_i4_a_journal_that_was_cut_off_is_not_continued(
    make_house: Callable[..., House], make_device: type[ServedDevice], pause: Pause
) -> None:
    """The gateway has let go of what the lost answer held."""
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.mediate(tracker="none", capture=True)
            vmm.region_write(0, 0, b"abcd")
            device.on_read = pause
            async with await GatewayClient.connect(house.control_path) as observer:
                async with trio.open_nursery() as nursery:
                    # While the device is busy with a batch, the journal's answer has to wait.
                    nursery.start_soon(_read_slowly, gateway)
                    await trio.to_thread.run_sync(pause.reached.wait)
                    nursery.cancel_scope.cancel()
                with trio.move_on_after(0.2):
                    await gateway.journal()
                device.on_read = None
                pause.release()
                assert (await observer.status()).state == "mediated"
            with pytest.raises(AnswerLost):
                await gateway.journal()
            await gateway.passthrough()
            await gateway.mediate(tracker="none", capture=True)
            assert await gateway.journal() == (b"", False)

    trio.run(main)


async def _read_slowly(gateway: GatewayClient) -> None:
    await gateway.batch(pack_accesses([Access(Op.READ, 0, 0, 4)]))


def test_the_client_hears_when_the_gateway_ends(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house = make_house()
    house.serve(make_device())

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path) as gateway:
            await trio.to_thread.run_sync(house.end)
            with pytest.raises(GatewayLost):
                await gateway.status()
            with pytest.raises(GatewayLost):
                await gateway.status()

    trio.run(main)
    house.open()
