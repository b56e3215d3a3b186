"""Two processes die at once, in every state; then the documented procedure, on both hosts.

Whoever runs the guest runs it alone. It is lost only with the VMM that had it.
"""

from itertools import combinations
from pathlib import Path

import pytest
import trio

from ferry.errors import Exit
from sync.handover.states import HandoverState as State
from tests.in_process.deaths import (
    OF_A_CHECK,
    OF_A_FAILED_COMMIT,
    OF_AN_INTERRUPTION,
    SETTLED_S,
    STATES,
    VICTIMS,
    killer_of,
)
from tests.in_process.two_hosts import METHODS, Command, Method, TwoHosts, two_hosts

PAIRS = [*combinations(VICTIMS, 2)]
AT_ONCE = 8


async def die(hosts: TwoHosts, state: State, pair: tuple[str, str]) -> Command:
    """A migration from host a to b in which both of `pair` die in `state`; its `send`."""
    killed = False

    def on_phase(phase: str, sender: Command, receiver: Command) -> None:
        nonlocal killed
        if state in OF_AN_INTERRUPTION and phase == State.FINALIZING.value:
            sender.stop.ask("enough of it")
        if phase == state.value and not killed:
            killed = True
            for victim in pair:
                killer_of(victim, hosts, sender, receiver)()

    sender, _ = await hosts.migrate(hosts.a, on_phase)
    assert killed
    await hosts.revive(hosts.b)
    await hosts.revive(hosts.a)
    return sender


async def settle(hosts: TwoHosts, sender: Command) -> None:
    """What an operator does who finds that the guest stands still, or that `send` is in doubt."""
    in_doubt = State.COMMITTING.value in sender.phases and sender.code is not Exit.OK
    with trio.move_on_after(0 if in_doubt else SETTLED_S / 10):
        while not (hosts.a.vmm.runs or hosts.b.vmm.runs):  # noqa: ASYNC110
            await trio.sleep(0.01)  # its gateway is bringing it back
    if in_doubt or not (hosts.a.vmm.runs or hosts.b.vmm.runs):
        told = await hosts.resolve(hosts.b, "target")
        await hosts.resolve(hosts.a, "source", told.get("verdict") or None)


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "state",
    [state for state in STATES if state not in OF_A_CHECK | OF_A_FAILED_COMMIT],
    ids=lambda state: state.value,
)
def test_i7_i8_two_die(short_path: Path, state: State) -> None:
    async def kill(pair: tuple[str, str], method: Method, turn: trio.CapacityLimiter) -> None:
        folder = short_path / str(PAIRS.index(pair))
        folder.mkdir()
        try:
            async with turn, two_hosts(folder, method) as hosts:
                sender = await die(hosts, state, pair)
                await settle(hosts, sender)
                assert not hosts.ran_twice
                runs = [host.vmm.runs for host in (hosts.a, hosts.b)]
                assert sum(runs) < 2
                if "guest a" not in pair and "guest b" not in pair:
                    assert any(runs)
                elif "guest a" not in pair and State.COMMITTING.value not in sender.phases:
                    assert hosts.a.vmm.runs
        except BaseException as error:
            error.add_note(f"{pair} killed in {state.value}, {method}")
            raise

    async def main() -> None:
        turn = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for number, pair in enumerate(PAIRS):
                method = METHODS[(STATES.index(state) + number) % len(METHODS)]
                nursery.start_soon(kill, pair, method, turn)

    trio.run(main)
