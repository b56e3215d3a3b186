"""The controller goes away: who owns the guest then, and who resumes it."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import sync.gateway.engine.vmm_recovery
import sync.vmm.recover
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.records import Terms
from sync.gateway.errors import GatewayError, NotProven, SessionFenced
from sync.registers.record import Access, Op, pack_accesses
from sync.vfio_user.errors import VfioUserError
from sync.vfio_user.protocol import (
    DmaMap,
)
from tests.sync.gateway.conftest import WAIT_S, House, ServedDevice
from tests.sync.gateway.raw_peers import PAGE, new_ram, status_of


@pytest.fixture(autouse=True)
def a_vmm_that_is_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these tests has one."""
    monkeypatch.setattr(sync.vmm.recover, "obstacle", lambda path: "")


@pytest.fixture
def recoveries(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The VMMs that the gateway has resumed."""
    calls: list[tuple[str, float]] = []

    def recover(path: str, deadline_s: float, *_: object, **__: object) -> str:
        calls.append((path, deadline_s))
        return "cont from paused"

    monkeypatch.setattr(sync.vmm.recover, "recover_source", recover)
    return calls


async def to_state(gateway: GatewayClient, state: str) -> None:
    if state in ("mediated", "stopped", "released"):
        terms = Terms(True, "yes", "no")
        await gateway.mediate(tracker="message", capture=True, terms=terms)
    if state in ("stopped", "released"):
        resume = pack_accesses([Access(Op.WRITE, 0, 8, 4, b"kick")])
        await gateway.stop(fence=True, resume=resume)
    if state == "released":
        await gateway.release("s")


@pytest.mark.parametrize("state", ["passthrough", "mediated", "stopped"])
def test_i8_a_lost_source_is_put_back_to_passthrough_and_its_vmm_resumed(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
    state: str,
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = new_ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 3.5)
            await to_state(gateway, state)
        await trio.to_thread.run_sync(house.wait_event, "recovered")
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
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


def test_i8_a_recovery_for_which_there_is_no_thread_is_tried_again(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = make_house()
    house.serve(make_device())
    vmm = house.vmm()
    ram = new_ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)
    os.close(ram)
    start, refused = threading.Thread.start, list[str]()

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "recovery" and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 3.5)
            await to_state(gateway, "stopped")
        await trio.to_thread.run_sync(house.wait_event, "recovered", 2)
        info = await status_of(house)
        assert (info.state, info.owner) == ("passthrough", "owned")
        assert info.last_recovery is not None and info.last_recovery.ok

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    trio.run(main)
    assert refused and recoveries == [("/run/vmm.qmp", 3.5)]
    assert [fields["ok"] for fields in house.seen("recovered")] == [False, True]
    assert vmm.region_read(0, 0, 4) == bytes(4)


def test_i8_a_controller_that_falls_silent_over_a_stopped_guest_is_cut_off(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
) -> None:
    house, device = make_house(lease_silence_s=0.1), make_device()
    house.serve(device)
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 3.5)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.stop(fence=False)
            await trio.to_thread.run_sync(house.wait_event, "recovered")
            with pytest.raises(GatewayError):
                await gateway.status()

    trio.run(main)
    assert recoveries


def test_i8_a_recovery_that_fails_is_told(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def recover(path: str, deadline_s: float, *_: object, **__: object) -> str:
        raise OSError("no such VMM")

    monkeypatch.setattr(sync.vmm.recover, "recover_source", recover)
    house = make_house()
    house.serve(make_device())
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
        await trio.to_thread.run_sync(house.wait_event, "recovered")
        async with await GatewayClient.connect(house.control_path) as gateway:
            assert not gateway.info.last_recovery.ok
            assert "no such VMM" in gateway.info.last_recovery.message

    trio.run(main)


def test_i7_a_released_source_stays_released_and_is_never_resumed(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = new_ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)

    async def main() -> None:
        path = house.control_path
        async with await GatewayClient.connect(
            path, role=ClientRole.SOURCE, session="s"
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await to_state(gateway, "released")
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")
        with pytest.raises(VfioUserError) as refused:
            vmm.region_write(0, 8, b"bell")
        assert refused.value.errno == errno.EACCES, "nothing is acknowledged that is not done"
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE, session="s"
        ) as gateway:
            assert (gateway.info.state, gateway.info.owner) == ("released", "released")
            assert gateway.info.dropped_writes == 1
            assert device.mapped == {}
            for proof in ("", "fenced:s:", "fenced:s:another", "committed:s:no", "fenced:t:yes"):
                with pytest.raises(NotProven):
                    await gateway.reclaim("s", proof)
            await gateway.reclaim("s", "fenced:s:yes")
            await gateway.passthrough()
        info = await status_of(house)
        assert (info.state, info.owner) == ("passthrough", "owned")

    trio.run(main)
    assert recoveries == []
    assert bytes(device.registers.bar[8:12]) == b"kick"
    os.close(ram)


def test_i7_a_vmm_that_was_released_is_not_resumed_even_if_it_has_come_back(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
) -> None:
    """The device is lost after the release, so the VMM is disconnected and connects anew: that does
    not make it the owner, for the guest may run on the target by now."""
    house, device = make_house(), make_device()
    server = house.serve(device)
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.stop(fence=True)
            await gateway.release("s")
            await trio.to_thread.run_sync(house.end_device, server)
            await trio.to_thread.run_sync(house.wait_event, "device-lost")
            house.serve(make_device())
            await trio.to_thread.run_sync(house.vmm)
            assert (await gateway.status()).owner == "released"
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")
        async with await GatewayClient.connect(house.control_path, role=ClientRole.SOURCE):
            pass

    trio.run(main)
    assert recoveries == []


def test_i8_a_vmm_whose_device_died_with_the_controller_is_resumed_all_the_same(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
) -> None:
    house, device = make_house(), make_device()
    server = house.serve(device)
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.stop(fence=True)
            await trio.to_thread.run_sync(house.end_device, server)
            await trio.to_thread.run_sync(house.wait_event, "device-lost")
        await trio.to_thread.run_sync(house.wait_event, "recovered")

    trio.run(main)
    assert recoveries == [("/run/vmm.qmp", 1)]


def test_i7_a_disarmed_recovery_leaves_the_vmm_alone(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
) -> None:
    house = make_house()
    house.serve(make_device())
    house.vmm()

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            await gateway.arm_recovery("/run/vmm.qmp", 1)
            await gateway.mediate(tracker="none", capture=True)
            await gateway.passthrough()
            await gateway.disarm_recovery()
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")

    trio.run(main)
    assert recoveries == []


def test_i7_a_lost_target_is_fenced(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    vmm = house.vmm()
    ram = new_ram(2)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 2 * PAGE), ram)

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.TARGET
        ) as gateway:
            await gateway.standby("s")
        await trio.to_thread.run_sync(house.wait_event, "abandoned")
        info = await status_of(house)
        assert (info.state, info.owner, info.session) == ("passthrough", "fenced", "s")
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.TARGET
        ) as gateway:
            with pytest.raises(SessionFenced):
                await gateway.standby("s")
            await gateway.standby("t")

    trio.run(main)
    house.wait_event("abandoned", 2)
    assert device.mapped == {}
    with pytest.raises(VfioUserError):
        vmm.region_write(0, 8, b"bell")
    os.close(ram)


def test_i7_a_target_that_holds_the_commit_keeps_it_until_it_is_started(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    recoveries: list[tuple[str, float]],
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    house.vmm()

    async def main() -> None:
        path = house.control_path
        async with await GatewayClient.connect(
            path, role=ClientRole.TARGET, session="s"
        ) as gateway:
            await gateway.standby("s")
            await gateway.own("s", pack_accesses([Access(Op.WRITE, 0, 8, 4, b"held")]))
        await trio.to_thread.run_sync(house.wait_event, "lease-lost")
        info = await status_of(house)
        assert (info.state, info.owner, info.session) == ("standby", "owned", "s")
        assert device.registers.bar[8:12] == bytes(4)
        async with await GatewayClient.connect(
            path, role=ClientRole.TARGET, session="s"
        ) as gateway:
            await gateway.own("s")
            await gateway.start()
        assert bytes(device.registers.bar[8:12]) == b"held"

    trio.run(main)
    assert recoveries == []


class UnreachableVmm:
    """One that cannot be resumed until it is `reachable`; `resumed` counts how often it was."""

    def __init__(self) -> None:
        self.reachable = False
        self.asked = threading.Event()
        self.resumed = 0

    def recover(self, path: str, *_: object, **__: object) -> str:
        self.asked.set()
        if not self.reachable:
            raise OSError("it does not answer")
        self.resumed += 1
        return "cont from postmigrate"


@pytest.mark.parametrize("what", ["a try that came to nothing", "a migration", "another VMM"])
def test_i7_i8_a_guest_is_resumed_unless_somebody_has_moved_it_since(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    what: str,
) -> None:
    """The gateway does not reach the VMM for a while, in which its operator does something."""
    qmp = tmp_path / "qmp"
    qmp.touch()
    vmm = UnreachableVmm()
    monkeypatch.setattr(sync.vmm.recover, "recover_source", vmm.recover)
    monkeypatch.setattr(sync.gateway.engine.vmm_recovery, "RECOVERY_PAUSE_S", 0.01)
    house = make_house()
    house.serve(make_device())
    house.vmm()

    async def main() -> None:
        path, source = house.control_path, ClientRole.SOURCE
        async with await GatewayClient.connect(path, role=source) as gateway:
            await gateway.arm_recovery(str(qmp), 1)
            await gateway.mediate(tracker="none", capture=True)
        await trio.to_thread.run_sync(house.wait_event, "recovering")
        async with await GatewayClient.connect(path, role=source, session="t") as gateway:
            if what == "a migration":
                await gateway.mediate(tracker="none", capture=True)
                await gateway.passthrough()
            elif what == "another VMM":
                qmp.unlink()
                qmp.touch()
            vmm.asked.clear()
            if what == "a try that came to nothing":
                await trio.to_thread.run_sync(vmm.asked.wait, WAIT_S)
            vmm.reachable = True
        for thread in threading.enumerate():
            if thread.name == "recovery":
                await trio.to_thread.run_sync(thread.join, WAIT_S)
                assert not thread.is_alive()

    trio.run(main)
    assert vmm.resumed == (what == "a try that came to nothing")
