"""Every process dies in every state of either side; afterwards one side owns the guest.

What is left says how it ended, `resolve` settles what it could not, what was killed on the owner's
side is started again; and then the guest moves on to the other host. All victims of one state are
tried at once, each with two hosts of its own and a method that goes round.
"""

from pathlib import Path

import pytest
import trio

from sync.handover.states import HandoverState as State
from tests.in_process.deaths import STATES, VICTIMS, fail, move
from tests.in_process.two_hosts import METHODS, Method, two_hosts


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.value)
def test_i7_i8_killed(short_path: Path, state: State) -> None:
    async def kill(victim: str, method: Method) -> None:
        folder = short_path / victim.replace(" ", "-")
        folder.mkdir()
        try:
            async with two_hosts(folder, method) as hosts:
                owner = await fail(hosts, state, victim)
                if owner.vmm.alive:
                    await move(hosts, owner)
        except BaseException as error:
            error.add_note(f"{victim} killed in {state.value}, {method}")
            raise

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number, victim in enumerate(VICTIMS):
                method = METHODS[(STATES.index(state) + number) % len(METHODS)]
                nursery.start_soon(kill, victim, method)

    trio.run(main)
