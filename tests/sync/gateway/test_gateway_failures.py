"""A real gateway whose device, VMM, controller or own process goes away or misbehaves."""

import os
import random
import socket
import struct
import threading

import pytest
import trio

import sync.vmm.recover
from sync.gateway.client import GatewayClient
from sync.gateway.control import MAX_BLOB_BYTES, encode
from sync.gateway.errors import DeviceLost, GatewayError, SessionFenced, VmmLost
from sync.registers.record import Access, Op, pack_accesses
from sync.vfio_user.protocol import (
    HEADER,
    Command,
    Disconnected,
    DmaMap,
    MigrationState,
    Version,
    encode_message,
)

PAGE = 4096


@pytest.fixture
def recoveries(monkeypatch) -> list[tuple[str, float]]:
    """The VMMs that the gateway has resumed."""
    calls: list[tuple[str, float]] = []

    def recover(path: str, deadline_s: float) -> str:
        calls.append((path, deadline_s))
        return "cont from paused"

    monkeypatch.setattr(sync.vmm.recover, "recover_source", recover)
    return calls


def _raw(path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def _ended(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def _ram(pages: int) -> int:
    number = os.memfd_create("ram")
    os.ftruncate(number, pages * PAGE)
    return number


# --- the device goes, the VMM goes ---


def test_a_vmm_that_is_first_waits_for_its_device(make_house, make_device) -> None:
    house = make_house()
    vmms: list[object] = []
    waiting = threading.Thread(target=lambda: vmms.append(house.vmm()))
    waiting.start()
    device = make_device()
    house.serve(device)
    waiting.join(10)
    assert vmms[0].region_read(0, 0, 4) == bytes(4)


def test_a_vmm_is_not_kept_waiting_for_ever(make_house) -> None:
    house = make_house(device_wait_s=0.05)
    with _raw(house.vmm_path) as sock:
        sock.sendall(encode_message(1, Command.VERSION, Version().pack()))
        assert _ended(sock)
    house.wait_event("vmm-refused")


def test_the_device_goes_and_comes_back(make_house, make_device) -> None:
    house, device = make_house(), make_device()
    server = house.serve(device)
    vmm = house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
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
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.mediate(tracker="none", capture=True)

    trio.run(main)


def test_the_vmm_goes_and_another_comes(make_house, make_device) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = _ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)
    vmm.region_write(0, 0, b"mine")

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            mediation = await gateway.mediate(tracker="message", capture=True)
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


def test_the_device_dies_in_the_middle_of_an_access(make_house, make_device, pause) -> None:
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


def test_the_vmm_dies_in_the_middle_of_an_access(make_house, make_device, pause) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    with _raw(house.vmm_path) as sock:
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


def test_i10_a_device_that_hangs_while_the_guest_is_held_is_given_up(
    make_house, make_device, pause
) -> None:
    house, device = make_house(device_deadline_s=0.2), make_device()
    house.serve(device)
    vmm = house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            device.on_read = pause
            with pytest.raises(DeviceLost):
                await gateway.mediate(
                    tracker="none",
                    capture=True,
                    snapshot=pack_accesses([Access(Op.READ, 0, 0, 4)]),
                )
            with pytest.raises(Disconnected):
                vmm.region_read(0, 0, 4)

    trio.run(main)
    device.on_read = None
    pause.release()


# --- the lease ends ---


async def _to_state(gateway: GatewayClient, state: str) -> None:
    if state in ("mediated", "stopped", "released"):
        await gateway.mediate(tracker="message", capture=True)
    if state in ("stopped", "released"):
        resume = pack_accesses([Access(Op.WRITE, 0, 8, 4, b"kick")])
        await gateway.stop(fence=True, resume=resume)
    if state == "released":
        await gateway.release("s")


@pytest.mark.parametrize("state", ["passthrough", "mediated", "stopped"])
def test_i8_a_lost_source_is_put_back_to_passthrough_and_its_vmm_resumed(
    make_house, make_device, recoveries, state: str
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = _ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 3.5)
            await _to_state(gateway, state)
        await trio.to_thread.run_sync(house.wait_event, "recovered")
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            info = gateway.info
            assert (info.state, info.owner) == ("passthrough", "owned")
            assert info.last_recovery.ok
            assert info.last_recovery.message == "cont from paused"
            await gateway.mediate(tracker="message", capture=True)

    trio.run(main)
    assert recoveries == [("/run/vmm.qmp", 3.5)]
    house.wait_event("restored", 2 if state != "passthrough" else 1)
    assert device.mapped[0x10000][1], "directly"
    assert vmm.region_read(0, 8, 4) == (b"kick" if state == "stopped" else bytes(4))
    os.close(ram)


def test_i8_a_controller_that_falls_silent_over_a_stopped_guest_is_cut_off(
    make_house, make_device, recoveries
) -> None:
    house, device = make_house(lease_silence_s=0.1), make_device()
    house.serve(device)
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 3.5)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.stop(fence=False)
            await trio.to_thread.run_sync(house.wait_event, "recovered")
            with pytest.raises(GatewayError):
                await gateway.status()

    trio.run(main)
    assert recoveries


def test_i8_a_recovery_that_fails_is_told(make_house, make_device, monkeypatch) -> None:
    def recover(path: str, deadline_s: float) -> str:
        raise OSError("no such VMM")

    monkeypatch.setattr(sync.vmm.recover, "recover_source", recover)
    house = make_house()
    house.serve(make_device())
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
        await trio.to_thread.run_sync(house.wait_event, "recovered")
        async with await GatewayClient.connect(house.control_path) as gateway:
            assert not gateway.info.last_recovery.ok
            assert "no such VMM" in gateway.info.last_recovery.message

    trio.run(main)


def test_i7_a_released_source_stays_released_and_is_never_resumed(
    make_house, make_device, recoveries
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = _ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await _to_state(gateway, "released")
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")
        vmm.region_write(0, 8, b"bell")
        async with await GatewayClient.connect(
            house.control_path, role="source", session="s"
        ) as gateway:
            assert (gateway.info.state, gateway.info.owner) == ("released", "released")
            assert gateway.info.dropped_writes == 1
            assert device.mapped == {}
            await gateway.reclaim("s")
            await gateway.passthrough()
        info = await _status(house)
        assert (info.state, info.owner) == ("passthrough", "owned")

    trio.run(main)
    assert recoveries == []
    assert bytes(device.registers.bar[8:12]) == b"kick"
    os.close(ram)


def test_i7_a_vmm_that_was_released_is_not_resumed_even_if_it_has_come_back(
    make_house, make_device, recoveries
) -> None:
    """The device is lost after the release, so the VMM is disconnected and connects anew: by the
    record it owns its guest, but the guest may run on the target by now."""
    house, device = make_house(), make_device()
    server = house.serve(device)
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.stop(fence=True)
            await gateway.release("s")
            await trio.to_thread.run_sync(house.end_device, server)
            await trio.to_thread.run_sync(house.wait_event, "device-lost")
            house.serve(make_device())
            await trio.to_thread.run_sync(house.vmm)
            assert (await gateway.status()).owner == "owned"
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")
        async with await GatewayClient.connect(house.control_path, role="source"):
            pass

    trio.run(main)
    assert recoveries == []


def test_i8_a_vmm_whose_device_died_with_the_controller_is_resumed_all_the_same(
    make_house, make_device, recoveries
) -> None:
    house, device = make_house(), make_device()
    server = house.serve(device)
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.stop(fence=True)
            await trio.to_thread.run_sync(house.end_device, server)
            await trio.to_thread.run_sync(house.wait_event, "device-lost")
        await trio.to_thread.run_sync(house.wait_event, "recovered")

    trio.run(main)
    assert recoveries == [("/run/vmm.qmp", 1)]


async def _status(house):
    async with await GatewayClient.connect(house.control_path) as gateway:
        return await gateway.status()


def test_i7_a_disarmed_recovery_leaves_the_vmm_alone(make_house, make_device, recoveries) -> None:
    house = make_house()
    house.serve(make_device())
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.passthrough()
            await gateway.disarm_recovery()
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")

    trio.run(main)
    assert recoveries == []


def test_i7_a_lost_target_is_fenced(make_house, make_device) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = _ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="target") as gateway:
            await gateway.standby("s")
        await trio.to_thread.run_sync(house.wait_event, "abandoned")
        info = await _status(house)
        assert (info.state, info.owner, info.session) == ("passthrough", "fenced", "s")
        async with await GatewayClient.connect(house.control_path, role="target") as gateway:
            with pytest.raises(SessionFenced):
                await gateway.standby("s")
            await gateway.standby("t")

    trio.run(main)
    house.wait_event("abandoned", 2)
    assert device.mapped[0x10000][1]
    os.close(ram)


def test_i7_a_target_that_holds_the_commit_keeps_it_until_it_is_started(
    make_house, make_device, recoveries
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    house.vmm()

    async def main() -> None:
        path = house.control_path
        async with await GatewayClient.connect(path, role="target", session="s") as gateway:
            await gateway.standby("s")
            await gateway.own("s", pack_accesses([Access(Op.WRITE, 0, 8, 4, b"held")]))
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")
        info = await _status(house)
        assert (info.state, info.owner, info.session) == ("standby", "owned", "s")
        assert device.registers.bar[8:12] == bytes(4)
        async with await GatewayClient.connect(path, role="target", session="s") as gateway:
            await gateway.own("s")
            await gateway.start()
        assert bytes(device.registers.bar[8:12]) == b"held"

    trio.run(main)
    assert recoveries == []


# --- the gateway itself goes ---


def test_a_gateway_that_was_started_anew_finds_the_device_as_it_was(
    make_house, make_device
) -> None:
    """Nothing is stored that the VMM does not send again; a device that a migration had stopped is
    set running when the VMM has shared its memory and touches a register."""
    house, device = make_house(), make_device(v2=True)
    house.serve(device)
    vmm = house.vmm()
    vmm.region_write(0, 0, b"keep")
    ram = _ram(2)

    async def migrate() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
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
    assert device.features.state is MigrationState.RUNNING
    info = trio.run(_status, house)
    assert (info.owner, info.session) == ("owned", "")
    os.close(ram)


# --- hostile ends ---


def test_i9_a_hostile_controller_is_cut_off_and_nobody_else_notices(
    make_house, make_device, descriptors, rng: random.Random
) -> None:
    house = make_house()
    house.serve(make_device())
    vmm = house.vmm()
    vmm.region_read(0, 0, 4)
    before = descriptors()
    attacks = [
        struct.pack("<II", 1 << 31, 0),
        struct.pack("<II", 2, MAX_BLOB_BYTES + 1) + b"{}",
        struct.pack("<II", 4, 0) + b"[1]\n",
        struct.pack("<II", 4, 0) + b"\xff\xfe{}",
        struct.pack("<II", 60000, 0) + b"[" * 60000,
        rng.randbytes(64),
    ]
    for attack in attacks:
        with _raw(house.control_path) as sock:
            sock.sendall(attack + bytes(16))
            assert _ended(sock)
    with _raw(house.control_path) as sock:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 1))
        sock.sendmsg([encode({"op": "status"})], [rights])
        assert _ended(sock)
    assert vmm.region_read(0, 0, 4) == bytes(4)
    assert descriptors() == before


def test_i9_nonsense_requests_are_answered_with_an_error(make_house, make_device) -> None:
    house = make_house()
    house.serve(make_device())
    house.vmm()
    values = [None, -1, 1 << 70, 1.5, "x" * 5000, [], {}, True, "a\0b"]

    async def main() -> None:
        async with await GatewayClient.connect(house.control_path, role="source") as gateway:
            names = ["max_records", "tracker", "page_size", "state", "max_bytes", "session"]
            names += ["start", "generation", "fence", "qmp_path", "deadline_s", "role"]
            ops = ["memory", "mediate", "journal", "arm_recovery", "mig_read", "hello", "release"]
            for op in [*ops, "stop", "mig_state", "nonsense", 7, None]:
                for value in values:
                    fields = dict.fromkeys(names, value)
                    try:
                        await gateway._request(op, b"junk", **fields)
                    except GatewayError as error:
                        assert error.code not in ("failed", "gateway-lost")
            assert (await gateway.status()).state == "passthrough"

    trio.run(main)


def test_i10_a_controller_that_does_not_read_holds_nobody_up(make_house, make_device) -> None:
    house, device = make_house(journal_records=256), make_device()
    house.serve(device)
    vmm = house.vmm()
    with _raw(house.control_path) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = encode({"op": "hello", "role": "source"})
        mediate = {"op": "mediate", "tracker": "none", "page_size": 4096, "capture": True}
        sock.sendall(request + encode(mediate) + encode({"op": "status"}) * 500)
        house.wait_event("mediated")
        for value in range(1000):
            vmm.region_write(0, 0, value.to_bytes(4, "little"), posted=True)
        assert vmm.region_read(0, 0, 4) == (999).to_bytes(4, "little")
        info = trio.run(_status, house)
        assert info.journal_overflow
        assert info.journal_records == 256
    house.wait_event("restored")
    assert vmm.region_read(0, 0, 4) == (999).to_bytes(4, "little")


def test_i9_a_hostile_vmm_is_cut_off_and_the_next_is_served(
    make_house, make_device, rng: random.Random
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    house.wait_event("device-connected")
    hello = encode_message(1, Command.VERSION, Version().pack())
    attacks = [
        b"\xff" * 64,
        HEADER.pack(1, Command.VERSION, 8, 0, 0),
        HEADER.pack(1, Command.VERSION, 1 << 30, 0, 0),
        encode_message(1, Command.REGION_READ, bytes(16)),
        encode_message(1, Command.VERSION, b"\0\0\1\0not json\0"),
        encode_message(1, Command.VERSION, b"\7\0\0\0"),
        hello + encode_message(2, Command.DMA_MAP, b"short"),
        hello + hello,
        hello + encode_message(2, Command.DMA_READ, reply=True),
        hello + HEADER.pack(2, Command.REGION_READ, 1 << 30, 0, 0),
        hello + rng.randbytes(256) + b"\xff" * 64,
    ]
    for attack in attacks:
        with _raw(house.vmm_path) as sock:
            sock.sendall(attack)
            assert _ended(sock)
    vmm = house.vmm()
    assert vmm.region_read(0, 0, 4) == bytes(4)
    with _raw(house.vmm_path) as sock:
        assert _ended(sock), "a second VMM is turned away"
    assert vmm.region_read(0, 0, 4) == bytes(4)


def test_i9_a_hostile_device_is_cut_off_and_tried_again(make_house, make_device) -> None:
    house = make_house()
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(10)
    listener.bind(str(house.device_path))
    listener.listen()
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(10)
        sock.recv(1 << 16)
        sock.sendall(encode_message(4711, Command.VERSION, b"", reply=True))
        assert _ended(sock)
    house.wait_event("device-unusable")
    listener.close()
    house.device_path.unlink()
    house.serve(make_device())
    assert house.vmm().region_read(0, 0, 4) == bytes(4)


def test_no_descriptor_is_left_behind(make_house, make_device, descriptors, wait_until) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    house.wait_event("device-connected")
    before = descriptors()
    ram = _ram(4)
    for number in range(3):
        vmm = house.vmm()
        vmm.dma_map(DmaMap(3, 0, 0x10000, 4 * PAGE), ram)

        async def main() -> None:
            async with await GatewayClient.connect(house.control_path, role="source") as gateway:
                mediation = await gateway.mediate(tracker="message", capture=True)
                os.close(mediation.dirty_fd)
                device.dma.write(0x10000, b"x")
                for region in await gateway.memory():
                    os.close(region.fd)

        trio.run(main)
        house.wait_event("restored", number + 1)
        vmm.close()
        house.wait_event("vmm-lost", number + 1)
        house.wait_event("device-connected", number + 2)
    os.close(ram)
    wait_until(lambda: descriptors() == before)
