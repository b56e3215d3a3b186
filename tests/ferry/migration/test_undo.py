"""The way back: its order, and what does not keep the guest from going on."""

import pytest
import trio

from ferry.migration.undo import Undo, UndoStage
from sync.gateway.errors import (
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    GatewayLost,
    NotRecorded,
)
from sync.vmm.errors import VmmNotReady

TAKEN = [UndoStage.TASKS, UndoStage.DEVICES, UndoStage.DEVICES, UndoStage.GUEST, UndoStage.RECOVERY]


def undo(fails: dict[int, Exception]) -> tuple[list[UndoStage], Exception | None]:
    """What is taken of `TAKEN`, added in the wrong order, and what is raised in the end."""
    undo, log = Undo(), list[UndoStage]()

    def add(number: int, stage: UndoStage) -> None:
        async def step() -> None:
            log.append(stage)
            if number in fails:
                raise fails[number]

        undo.add(stage, step)

    for number, stage in reversed([*enumerate(TAKEN)]):
        add(number, stage)
    try:
        trio.run(undo.run)
    except Exception as error:
        return log, error
    return log, None


def test_nothing_begun_is_nothing_to_undo() -> None:
    trio.run(Undo().run)


def test_steps_are_taken_by_stage_however_they_were_added() -> None:
    assert undo({}) == (TAKEN, None)


@pytest.mark.parametrize(
    "lost",
    [GatewayLost("gone"), DeviceLost("gone"), DeviceTimeout("hangs"), DeviceRefused("refuses")],
)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_i8_a_device_that_is_gone_does_not_keep_the_guest(number: int, lost: Exception) -> None:
    assert undo({number: lost}) == (TAKEN, lost)


def test_i7_a_guest_that_is_not_taken_back_on_record_is_not_continued() -> None:
    error = NotRecorded("no room")
    assert undo({2: error}) == (TAKEN[:2], error)


def test_i8_a_guest_that_does_not_run_leaves_recovery_armed() -> None:
    error = VmmNotReady("it does not run")
    assert undo({3: error}) == (TAKEN[:4], error)
