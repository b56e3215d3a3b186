"""A process dies in the middle of a migration: which, when, and how it is settled afterwards."""

from collections.abc import Callable

import trio

from ferry.errors import Exit
from sync.gateway.engine.custody import CustodyState, Owner
from sync.handover.states import TERMINAL
from sync.handover.states import HandoverState as State
from tests.in_process.device import DOORBELL, NUMBER
from tests.in_process.two_hosts import Command, Host, TwoHosts
from tests.sync.vmm.conftest import PARAMETERS

STATES = [state for state in State if state not in TERMINAL | {State.IDLE}]
OF_A_CHECK = {State.CHECKING_ONLY, State.ANSWERING}
OF_AN_INTERRUPTION = {State.ABORTING, State.FENCING}
OF_A_FAILED_COMMIT = {State.DISOWNING}
VICTIMS = (
    *("guest a", "device a", "gateway a", "send"),
    *("receive", "gateway b", "device b", "guest b"),
)
SETTLED_S = 15.0


async def fail(hosts: TwoHosts, state: State, victim: str) -> Host:
    """A migration from host a to b, in which `victim` dies when either side enters `state`.

    Returns the host that owns the guest afterwards: what was dead there has been started again,
    and the guest runs there alone, with its device in passthrough, unless it was the victim.
    """
    killed = False

    def on_phase(phase: str, sender: Command, receiver: Command) -> None:
        nonlocal killed
        if state in OF_AN_INTERRUPTION and phase == State.FINALIZING.value:
            sender.stop.ask("enough of it")
        if state in OF_A_FAILED_COMMIT and phase == State.OWNING.value:
            hosts.b.kill("gateway")
        if phase == state.value and not killed:
            killed = True
            killer_of(victim, hosts, sender, receiver)()

    sender, receiver = await hosts.migrate(hosts.a, on_phase, check=state in OF_A_CHECK)
    assert killed, (sender.phases, receiver.phases)
    assert Exit.INTERNAL not in (sender.code, receiver.code), (sender.events, receiver.events)
    owner = hosts.a if state in OF_A_CHECK else await settle(hosts, sender, receiver)
    await assert_owner(hosts, owner)
    await settings_are_back(hosts, victim)
    return owner


def killer_of(
    victim: str, hosts: TwoHosts, sender: Command, receiver: Command
) -> Callable[[], None]:
    if victim == "send":
        return sender.kill
    if victim == "receive":
        return receiver.kill
    what, name, *number = victim.split()
    host = hosts.a if name == "a" else hosts.b
    return lambda: host.kill(" ".join([what, *number]))


async def settle(hosts: TwoHosts, sender: Command, receiver: Command) -> Host:
    """Who owns the guest, as an operator would find out by the documents."""
    if Exit.OK in (sender.code, receiver.code):
        return hosts.b
    if State.COMMITTING.value not in sender.phases:
        return hosts.a
    await hosts.revive(hosts.b)
    settled = await hosts.resolve(hosts.b, "target")
    assert settled["code"] == Exit.OK
    if settled["outcome"] == "committed":
        return hosts.b
    if hosts.a.vmm.alive and sender.code not in (Exit.PEER_ABORTED, Exit.DEVICE, Exit.VMM):
        await hosts.revive(hosts.a)
        taken = await hosts.resolve(hosts.a, "source", settled["verdict"])
        assert (taken["code"], taken["outcome"]) == (Exit.OK, "owned")
    return hosts.a


async def assert_owner(hosts: TwoHosts, owner: Host) -> None:
    with trio.fail_after(SETTLED_S):
        while owner.vmm.alive and not owner.vmm.runs:  # noqa: ASYNC110
            await trio.sleep(0.01)  # its gateway is bringing it back
    assert not hosts.other(owner).vmm.runs
    assert not hosts.ran_twice
    await hosts.revive(owner)
    if owner.vmm.alive:
        assert owner.record == (CustodyState.PASSTHROUGH, Owner.OWNED)
        owner.vmm.write_register(NUMBER, 0x600D)
        assert owner.device.registers.bar[NUMBER : NUMBER + 2] == b"\x0d\x60"


async def settings_are_back(hosts: TwoHosts, victim: str) -> None:
    """Every VMM has the settings of its migrations that it had before, the source's only where the
    guest is back if `send` was killed."""
    with trio.fail_after(SETTLED_S):
        for vmm, killed in (hosts.a.vmm, "send"), (hosts.b.vmm, ""):
            while vmm.alive and (vmm.runs or victim != killed):
                if vmm.parameters == PARAMETERS and not vmm.on_capabilities:
                    break
                await trio.sleep(0.01)  # its gateway, which has let the guest go on, does that next


async def move(hosts: TwoHosts, source: Host) -> Host:
    """A migration that has to succeed, to a new VMM on the other host, which is returned."""
    target = hosts.other(source)
    await hosts.renew_vmm(target)
    sender, receiver = await hosts.migrate(source)
    assert (sender.code, receiver.code) == (Exit.OK, Exit.OK), (sender.events, receiver.events)
    await assert_owner(hosts, target)
    assert target.vmm.ram[:] == source.vmm.ram[:]
    registers = target.device.registers.bar[DOORBELL : DOORBELL + 4]
    assert registers == source.device.registers.bar[DOORBELL : DOORBELL + 4]
    return target
