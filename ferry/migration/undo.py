"""The way back to a guest that runs on the source, with its devices in passthrough, from wherever
a migration has come to: the steps that undo what has been begun, and their order."""

from collections.abc import Awaitable, Callable
from enum import Enum

from sync.gateway.errors import (
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    GatewayError,
    GatewayLost,
)

WITHOUT_THE_DEVICE = (GatewayLost, DeviceLost, DeviceTimeout, DeviceRefused)
"""With these the guest goes on all the same: it is better off than standing still."""


class UndoStage(Enum):
    """What a step is about; stages are undone in the order in which they stand here."""

    TASKS = "what this process does by itself: it must not meet what follows"
    DEVICES = "passthrough"
    GUEST = "its VMM lets it run"
    RECOVERY = "the gateways' own: until the guest runs they have to resume it if this process dies"


class Undo:
    """The steps that undo one migration. Each is added before that which it undoes is begun, and
    finds out by itself how much there is to undo."""

    def __init__(self) -> None:
        self._steps: dict[UndoStage, list[Callable[[], Awaitable[None]]]] = {
            stage: [] for stage in UndoStage
        }

    def add(self, stage: UndoStage, step: Callable[[], Awaitable[None]]) -> None:
        """Notes that `step` is one of those to take in `stage`."""
        self._steps[stage].append(step)

    async def run(self) -> None:
        """Takes every step. A device that is gone or does not obey does not keep the guest from
        going on: what it raised (`WITHOUT_THE_DEVICE`) is raised in the end, any other error at
        once."""
        lost: GatewayError | None = None
        for stage in UndoStage:
            for step in self._steps[stage]:
                try:
                    await step()
                except WITHOUT_THE_DEVICE as error:
                    lost = error
        if lost is not None:
            raise lost
