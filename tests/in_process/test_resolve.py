"""`resolve` where more than one process has died, and where it is told what cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from ferry.errors import Exit
from sync.handover.states import HandoverState as State
from tests.in_process.deaths import assert_owner, move
from tests.in_process.two_hosts import METHODS, Command, TwoHosts, two_hosts

OnPhase = Callable[[str, Command, Command], None]


def die_at(hosts: TwoHosts, state: State, *victims: str) -> OnPhase:
    """A hook for `TwoHosts.migrate`: `send` dies in `state`, and `victims` with it."""

    def on_phase(phase: str, sender: Command, receiver: Command) -> None:
        if phase == state.value:
            for victim in victims:
                what, name = victim.split()
                (hosts.a if name == "a" else hosts.b).kill(what)
            sender.kill()

    return on_phase


@pytest.mark.parametrize("state", [State.PRECOPY, State.FINALIZING, State.RELEASING])
def test_i8_a_guest_that_nobody_was_left_to_resume_is_set_running(
    short_path: Path, state: State
) -> None:
    """`send` and the source's gateway die: the record alone says whose the guest is."""

    async def main() -> None:
        async with two_hosts(short_path, METHODS[0]) as hosts:
            await hosts.migrate(hosts.a, die_at(hosts, state, "gateway a"))
            await hosts.revive(hosts.a)
            settled = await hosts.resolve(hosts.a, "source")
            assert (settled["code"], settled["outcome"]) == (Exit.OK, "owned"), settled
            await assert_owner(hosts, hosts.a)
            session = settled["session"]
            await move(hosts, hosts.a)
            settled = await hosts.resolve(hosts.a, "source", session=session)
            assert (settled["code"], settled["outcome"]) == (Exit.OK, "kept"), settled
            assert not hosts.a.vmm.runs

    trio.run(main)


def test_i7_a_guest_that_was_vouched_for_is_not_said_to_be_somewhere_else(short_path: Path) -> None:
    """The host that was thought to be gone is back and has the guest, too: nothing is started."""

    async def main() -> None:
        async with two_hosts(short_path, METHODS[0]) as hosts:

            def on_phase(phase: str, sender: Command, receiver: Command) -> None:
                if phase == State.STARTING_GUEST.value:
                    sender.kill()

            await hosts.migrate(hosts.a, on_phase)
            hosts.b.kill("guest")
            taken = await hosts.resolve(hosts.a, "source", vouch_the_other_host_is_gone=True)
            assert (taken["code"], taken["outcome"]) == (Exit.OK, "owned")
            hosts.a.vmm.run_state = "paused"
            told = await hosts.resolve(hosts.b, "target")
            assert told["outcome"] == "committed"
            settled = await hosts.resolve(hosts.a, "source", told["verdict"])
            assert settled["code"] == Exit.REFUSED
            assert not hosts.a.vmm.runs

    trio.run(main)


@pytest.mark.parametrize("was", ["running", "paused"])
def test_i12_a_guest_that_its_operator_has_paused_is_not_started_at_the_target(
    short_path: Path, was: str
) -> None:
    """`receive` dies between the commit and the guest's start."""

    async def main() -> None:
        async with two_hosts(short_path, METHODS[0]) as hosts:

            def on_phase(phase: str, sender: Command, receiver: Command) -> None:
                if phase == State.PRECOPY.value:
                    hosts.a.vmm.run_state = was
                if phase == State.STARTING_GUEST.value:
                    receiver.kill()

            await hosts.migrate(hosts.a, on_phase)
            settled = await hosts.resolve(hosts.b, "target")
            assert (settled["code"], settled["outcome"]) == (Exit.OK, "committed"), settled
            assert hosts.b.vmm.run_state == was

    trio.run(main)


@pytest.mark.parametrize("was", ["running", "paused"])
def test_i12_nor_is_it_at_a_source_where_nobody_was_left_to_know(
    short_path: Path, was: str
) -> None:
    async def main() -> None:
        async with two_hosts(short_path, METHODS[0]) as hosts:
            dies = die_at(hosts, State.COMMITTING, "gateway a")

            def on_phase(phase: str, sender: Command, receiver: Command) -> None:
                if phase == State.PRECOPY.value:
                    hosts.a.vmm.run_state = was
                dies(phase, sender, receiver)

            await hosts.migrate(hosts.a, on_phase)
            await hosts.revive(hosts.a)
            told = await hosts.resolve(hosts.b, "target")
            assert told["outcome"] == "fenced"
            settled = await hosts.resolve(hosts.a, "source", told["verdict"])
            assert (settled["code"], settled["outcome"]) == (Exit.OK, "owned"), settled
            assert hosts.a.vmm.runs is (was == "running")

    trio.run(main)
