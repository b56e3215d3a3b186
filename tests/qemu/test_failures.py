"""I8: whatever fails before the commit, the guest goes on at the source, its device in passthrough.

Each chain boots one guest and has its migration fail again and again, in another way each time:
`--break-at` holds the sender on entering a phase, something is killed or cut, the sender goes on.
Afterwards both commands have said what happened, one side owns the guest, and the guest works on.
A migration that succeeds is the last in each chain: the others have left nothing behind.
"""

import os
import re
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from ferry.errors import Exit
from ferry.migration.phases import BREAK_AT_CHOICES
from lab.qemu.environment import Environment
from lab.qemu.errors import MachineError
from lab.qemu.machine import CONTROL, Machine
from lab.qemu.two_hosts import MIGRATION_S, Case, QemuHost
from lab.testbed import Process
from sync.gateway.control.client import GatewayClient
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmGone
from sync.vmm.settings import MigrationSettings
from tests.e2e.two_hosts import PEER_TIMEOUT_S, RESUME_WINDOW_S, run_resolve
from tests.e2e.two_hosts import resolve_both as settle_both
from tests.qemu.moving import DEADLINE_S, PATIENT, WatchedRig, run
from tests.qemu.proxy import LinkProxy, Proxy

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(1500)]

WRITES = 30
"""Requests of the guest after each failure."""
POLL_S = 0.02
OPERATORS = {"downtime-limit": 777, "cpu-throttle-initial": 33}
"""What an operator has set of the source's VMM."""

in_thread = trio.to_thread.run_sync


@dataclass
class Attempt:
    """A migration from host a to host b. The proxies are before the sockets of the same names."""

    rig: WatchedRig
    a: QemuHost
    b: QemuHost
    source: Machine
    target: Machine
    settings: MigrationSettings
    """Those of the source's VMM before."""
    sender: Process
    receiver: Process
    link: LinkProxy
    source_qmp: Proxy
    target_qmp: Proxy

    async def ended(self) -> None:
        """Until both commands have ended."""
        with trio.fail_after(MIGRATION_S):
            while self.sender.running or self.receiver.running:
                self.rig.guest.look(self.source)
                await trio.sleep(POLL_S)


Step = Callable[[Attempt], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """What happens to a migration that is held on entering `phase`."""

    phase: str
    strike: Step
    send: Exit | None
    """How `send` ends; None: it was killed."""
    receive: Exit | None
    says: str = ""
    """What `send` tells, or `receive` if `send` was killed: a regular expression."""
    settle: Step | None = None
    """What an operator does or sees then."""

    def __post_init__(self) -> None:
        assert self.phase in BREAK_AT_CHOICES

    def __str__(self) -> str:
        return f"{self.strike.__name__} in {self.phase}"


async def target_qemu_killed(attempt: Attempt) -> None:
    os.kill(attempt.target.pid, signal.SIGKILL)
    # The receiver is not held: with this, it has noticed before the sender goes on.
    await in_thread(attempt.receiver.wait, MIGRATION_S)


async def target_gateway_killed(attempt: Attempt) -> None:
    assert attempt.b.gateway is not None
    attempt.b.gateway.kill()


async def target_device_killed(attempt: Attempt) -> None:
    assert attempt.b.device is not None
    attempt.b.device.kill()


async def receiver_killed(attempt: Attempt) -> None:
    attempt.receiver.kill()


async def sender_killed(attempt: Attempt) -> None:
    attempt.sender.kill()


async def cancelled_from_outside(attempt: Attempt) -> None:
    # The target's QEMU ends as soon as its stream does: that must not be what `receive` sees first.
    attempt.link.delay_records()
    async with await control_of(attempt.source) as vmm:
        await vmm.cancel_and_resume(MIGRATION_S)


async def source_qmp_cut(attempt: Attempt) -> None:
    attempt.source_qmp.cut(for_good=False)


async def source_qmp_gone(attempt: Attempt) -> None:
    attempt.source_qmp.cut(for_good=True)


async def target_qmp_gone(attempt: Attempt) -> None:
    attempt.target_qmp.cut(for_good=True)


async def link_cut(attempt: Attempt) -> None:
    attempt.link.cut(for_good=True)


async def link_interrupted(attempt: Attempt) -> None:
    attempt.link.cut(for_good=False)


async def link_silent(attempt: Attempt) -> None:
    attempt.link.fall_silent()


async def resolve_source(attempt: Attempt) -> None:
    async with await control_of(attempt.source) as vmm:
        assert await vmm.run_state() != "running"
    settled = await in_thread(run_resolve, attempt.rig.bed, attempt.a, "--role", "source")
    assert settled["outcome"] == "owned"


async def resolve_both(attempt: Attempt) -> None:
    owner = await in_thread(settle_both, attempt.rig.bed, attempt.a, attempt.b)
    assert owner is attempt.a


async def source_qemu_killed(attempt: Attempt) -> None:
    os.kill(attempt.source.pid, signal.SIGKILL)
    await attempt.source.wait_ended()


async def source_gateway_killed(attempt: Attempt) -> None:
    assert attempt.a.gateway is not None
    attempt.a.gateway.kill()


async def source_device_killed(attempt: Attempt) -> None:
    assert attempt.a.device is not None
    attempt.a.device.kill()


CHAINS = {
    "a bit of everything": (
        Case("replay", "logging", root_port=True),
        (
            Fault("precopy", sender_killed, None, Exit.PEER_LOST, "sender"),
            Fault("finalizing", target_qemu_killed, Exit.PEER_ABORTED, Exit.VMM, "target.* VMM"),
            Fault("committing", receiver_killed, Exit.IN_DOUBT, None, "resolve", resolve_both),
        ),
    ),
    "what is at the target": (
        Case("replay", "message"),
        (
            Fault("precopy", target_qemu_killed, Exit.PEER_ABORTED, Exit.VMM, "target.* VMM"),
            Fault("precopy", target_gateway_killed, Exit.PEER_ABORTED, Exit.DEVICE, "gateway"),
            Fault("finalizing", target_device_killed, Exit.PEER_ABORTED, Exit.DEVICE, "device"),
            Fault("finalizing", target_qemu_killed, Exit.PEER_ABORTED, Exit.VMM, "target.* VMM"),
            Fault("awaiting-ready", receiver_killed, Exit.PEER_LOST, None, "receiver"),
            Fault("committing", target_qemu_killed, Exit.PEER_ABORTED, Exit.VMM, "target.* VMM"),
            Fault("committing", receiver_killed, Exit.IN_DOUBT, None, "resolve", resolve_both),
        ),
    ),
    "the control of the VMM": (
        Case("v2", "logging", interrupts="intx"),
        (
            Fault("precopy", cancelled_from_outside, Exit.VMM, Exit.PEER_ABORTED, "cancelled"),
            Fault("stopping", cancelled_from_outside, Exit.VMM, Exit.PEER_ABORTED, "cancelled"),
            Fault("finalizing", cancelled_from_outside, Exit.VMM, Exit.PEER_ABORTED, "cancelled"),
            Fault("precopy", source_qmp_gone, Exit.BROKEN, Exit.PEER_ABORTED, "no QMP at"),
            Fault("stopping", source_qmp_cut, Exit.VMM, Exit.PEER_ABORTED, "VMM's connection"),
            Fault(
                *("finalizing", source_qmp_gone, Exit.BROKEN, Exit.PEER_ABORTED),
                *("no QMP at .* resolve", resolve_source),
            ),
            Fault("pausing", target_qmp_gone, Exit.PEER_ABORTED, Exit.VMM, "target.* VMM"),
        ),
    ),
    "the two commands and their link": (
        Case("replay", "logging", root_port=True),
        (
            Fault("precopy", sender_killed, None, Exit.PEER_LOST, "sender"),
            Fault("precopy", link_cut, Exit.PEER_LOST, Exit.PEER_LOST, "connection"),
            Fault("stopping", link_interrupted, Exit.PEER_LOST, Exit.PEER_LOST, "connection"),
            Fault("finalizing", sender_killed, None, Exit.PEER_LOST, "sender"),
            Fault("verifying", link_silent, Exit.PEER_LOST, Exit.PEER_LOST, "silent"),
            Fault("committing", sender_killed, None, Exit.PEER_LOST, "sender", resolve_both),
            Fault("committing", link_cut, Exit.IN_DOUBT, Exit.PEER_LOST, "resolve", resolve_both),
        ),
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("what", CHAINS)
def test_i8_the_guest_goes_on_at_the_source(
    environment: Environment, initramfs: Path, short_path: Path, what: str
) -> None:
    case, faults = CHAINS[what]

    async def body(rig: WatchedRig) -> None:
        async with AsyncExitStack() as stack:
            with trio.fail_after(6 * DEADLINE_S):
                source = await rig.boot(stack)
                async with await control_of(source) as vmm:
                    await vmm.execute("migrate-set-parameters", OPERATORS)
                for fault in faults:
                    print(fault)
                    try:
                        await fail_migration(rig, source, fault)
                        await rig.wait_writes(source, WRITES)
                    except BaseException as error:
                        error.add_note(str(fault))
                        raise
                target = await rig.start(stack, "b", incoming=True)
                before = await settings_of(source), await settings_of(target)
                await rig.migrate(source, "ab", *PATIENT)
                assert (await settings_of(source), await settings_of(target)) == before
                await rig.wait_work(target)
                await rig.end(target)

    run(environment, initramfs, short_path, case, body)


ASSERTED = re.compile(r"error_setv: Assertion .* failed")
"""QEMU 11.1 reports an error twice if its device is lost while it has a request on its way."""


async def qemu_is_left_without_its_device(attempt: Attempt) -> None:
    """The guest runs, but a vfio-user device does not come back to a QEMU that has lost it.

    QEMU may also abort, by a fault of its own, whatever we do.
    """
    rig, source = attempt.rig, attempt.source
    assert attempt.a.gateway is not None
    gateway_runs = attempt.a.gateway.running
    restart = rig.bed.start_device if gateway_runs else rig.bed.start_gateway
    await in_thread(restart, attempt.a)
    beats = rig.guest.report.beats + 5
    try:
        await rig.wait(source, lambda report: report.beats >= beats)
    except MachineError:
        assert source.returncode == -signal.SIGABRT
        assert ASSERTED.search(source.tail())
    async with await GatewayClient.connect(attempt.a.control_socket) as gateway:
        assert not (await gateway.status()).vmm_connected


@pytest.mark.full
@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            *("precopy", source_gateway_killed, Exit.BROKEN, Exit.PEER_ABORTED, "gateway"),
            qemu_is_left_without_its_device,
        ),
        Fault(
            *("precopy", source_device_killed, Exit.BROKEN, Exit.PEER_ABORTED, "device"),
            qemu_is_left_without_its_device,
        ),
        Fault("finalizing", source_qemu_killed, Exit.BROKEN, Exit.PEER_ABORTED, "VMM"),
    ],
    ids=str,
)
def test_what_the_source_does_not_survive_is_told(
    environment: Environment, initramfs: Path, short_path: Path, fault: Fault
) -> None:
    async def body(rig: WatchedRig) -> None:
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            with trio.fail_after(DEADLINE_S):
                source = await rig.boot(stack)
                attempt = await start_held(rig, source, stack, nursery, fault.phase)
                await fault.strike(attempt)
                attempt.sender.resume()
                await attempt.ended()
                assert_ended(attempt, fault)
                assert not await runs(attempt.target)
                if fault.settle is not None:
                    await fault.settle(attempt)
                nursery.cancel_scope.cancel()

    run(environment, initramfs, short_path, Case("replay", "message"), body, ends=False)


async def fail_migration(rig: WatchedRig, source: Machine, fault: Fault) -> None:
    """Has a migration meet `fault`; what was killed at the target is started anew."""
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        attempt = await start_held(rig, source, stack, nursery, fault.phase)
        await fault.strike(attempt)
        attempt.sender.resume()
        await attempt.ended()
        assert_ended(attempt, fault)
        if fault.settle is not None:
            await fault.settle(attempt)
        await source_owns(attempt)
        nursery.cancel_scope.cancel()
    for dead, restart in (
        (attempt.b.device, rig.bed.start_device),
        (attempt.b.gateway, rig.bed.start_gateway),
    ):
        if dead is not None and not dead.running:
            await in_thread(restart, attempt.b)


async def start_held(
    rig: WatchedRig, source: Machine, stack: AsyncExitStack, nursery: trio.Nursery, phase: str
) -> Attempt:
    """A migration whose sender has stopped itself on entering `phase`."""
    a, b = rig.hosts["a"], rig.hosts["b"]
    settings = await settings_of(source)
    target = await rig.start(stack, "b", incoming=True)
    proxies = (
        LinkProxy(b.folder / "link", b.folder / "link.sock"),
        Proxy(a.folder / "qmp", a.qmp_socket),
        Proxy(b.folder / "qmp", b.qmp_socket),
    )
    for proxy in proxies:
        await nursery.start(proxy.serve)
    link, source_qmp, target_qmp = proxies
    patience = ("--peer-timeout", PEER_TIMEOUT_S, "--resume-window", RESUME_WINDOW_S)
    receiver = await in_thread(rig.bed.receive, b, *patience, "--qmp", target_qmp.path)
    through = ("--to", f"ipc://{link.path}", "--qmp", source_qmp.path, "--break-at", phase)
    sender = rig.bed.send(a, b, *rig.case.flags, *patience, *through)
    await in_thread(sender.wait_stopped)
    return Attempt(rig, a, b, source, target, settings, sender, receiver, *proxies)


def assert_ended(attempt: Attempt, fault: Fault) -> None:
    """Both commands say what happened, in their exit codes and in words."""
    told = []
    for process, code in ((attempt.sender, fault.send), (attempt.receiver, fault.receive)):
        assert process.wait(MIGRATION_S) == (-signal.SIGKILL if code is None else code), (
            process.tail()
        )
        if code is not None:
            told.append(str(process.events[-1]["message"]))
    assert re.search(fault.says, told[0]), told


async def source_owns(attempt: Attempt) -> None:
    """Nobody but the source owns the guest; it runs there, its device in passthrough, and its VMM
    has the settings of its migrations that it had before."""
    assert not await runs(attempt.target)
    if attempt.b.gateway is not None and attempt.b.gateway.running:
        async with await GatewayClient.connect(attempt.b.control_socket) as gateway:
            assert (await gateway.status()).owner != "owned"
    # If `send` was killed, the gateway does it, and nobody tells when it is done.
    with trio.fail_after(MIGRATION_S):
        while True:
            async with await GatewayClient.connect(attempt.a.control_socket) as gateway:
                status = await gateway.status()
            restored = (status.state, status.owner) == ("passthrough", "owned")
            if restored and await runs(attempt.source) and await has_its_settings(attempt):
                return
            await trio.sleep(POLL_S)


async def control_of(machine: Machine) -> Vmm:
    """A second hold on the VMM, past the proxy."""
    return await Vmm.connect(str(machine.spec.folder / CONTROL))


async def settings_of(machine: Machine) -> MigrationSettings:
    async with await control_of(machine) as vmm:
        return await vmm.settings()


async def has_its_settings(attempt: Attempt) -> bool:
    return await settings_of(attempt.source) == attempt.settings


async def runs(machine: Machine) -> bool:
    """Whether the guest runs on `machine`, which may have ended."""
    if machine.returncode is not None:
        return False
    try:
        async with await control_of(machine) as vmm:
            return await vmm.run_state() == "running"
    except VmmGone:
        return False
