"""What `receive --keep` waits for between two guests."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from ferry.commands.receive import GOES_ON, advice_of, wait_for_another
from ferry.errors import Exit
from ferry.migration.target import Target
from sync.handover.states import HandoverState
from sync.vmm.recover import socket_made


def test_the_next_vmm_is_another_file_at_the_same_path(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    path.touch()
    before = socket_made(str(path))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(100):
                nursery.start_soon(wait_for_another, str(path), before)
                await trio.sleep(5)
                assert nursery.child_tasks
                path.unlink()
                await trio.sleep(5)
                assert nursery.child_tasks
                path.touch()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("code", [Exit.OK, Exit.PEER_LOST, Exit.REFUSED, Exit.SLOW])
def test_it_goes_on_after_what_is_settled(code: Exit) -> None:
    assert code in GOES_ON


@pytest.mark.parametrize("code", [Exit.IN_DOUBT, Exit.BROKEN, Exit.OWNER_FAILED, Exit.INTERRUPTED])
def test_it_ends_where_somebody_has_to_look(code: Exit) -> None:
    assert code not in GOES_ON


@pytest.mark.parametrize(
    ("touched", "proof", "says"),
    [
        (False, "", "can be started again"),
        (True, "", "Restart the target's VMM"),
        (True, "fenced:s:t", "--verdict fenced:s:t`. Restart the target's VMM"),
    ],
)
def test_a_restart_is_asked_for_only_where_something_was_touched(
    touched: bool, proof: str, says: str
) -> None:
    target = cast(Target, SimpleNamespace(touched=touched, proof=proof))
    advice = advice_of(target)[HandoverState.ABORTED]
    assert says in advice
    assert ("Restart" in advice) == touched
