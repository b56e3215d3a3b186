"""Fail, fail, fail, and then it has to work: what failed leaves nothing behind.

The same two hosts throughout; on the target only the VMM is started anew before each attempt, and
what was killed.
"""

from pathlib import Path

import pytest
import trio

from sync.handover.states import HandoverState as State
from tests.in_process.deaths import fail, move
from tests.in_process.two_hosts import METHODS, Method, two_hosts

CHAINS = [
    [(State.ENTERING_STANDBY, "device b"), (State.PRECOPY, "send"), (State.READY, "receive")],
    [(State.MEDIATING, "guest b"), (State.STOPPING, "gateway b"), (State.COMMITTING, "receive")],
    [(State.PREPARING, "receive"), (State.FINALIZING, "send"), (State.RELEASING, "send")],
    [(State.CHECKING, "send"), (State.VERIFYING, "guest b"), (State.COMMITTING, "send")],
    [(State.FENCING, "gateway b"), (State.PAUSING, "device b"), (State.AWAITING_READY, "receive")],
    [(State.RECEIVING, "receive"), (State.READYING, "device b"), (State.ABORTING, "send")],
]


@pytest.mark.parametrize(
    ("method", "chain"), [*zip(METHODS, CHAINS, strict=True)], ids=map(str, METHODS)
)
def test_i8_whatever_failed_before_the_next_migration_works(
    short_path: Path, method: Method, chain: list[tuple[State, str]]
) -> None:
    async def main() -> None:
        async with two_hosts(short_path, method) as hosts:
            for state, victim in chain:
                try:
                    assert await fail(hosts, state, victim) is hosts.a
                    await hosts.renew_vmm(hosts.b)
                except BaseException as error:
                    error.add_note(f"{victim} killed in {state.value}")
                    raise
            assert await move(hosts, hosts.a) is hosts.b
            said = hosts.b.vmm.commands
            assert said.index("cont") < said.index("announce-self"), "not before it is here"
            assert await move(hosts, hosts.b) is hosts.a

    trio.run(main)
