"""The phases of a migration as the user sees them: one event each, and the one to stop in."""

import os
import signal
from dataclasses import dataclass

from ferry.progress import Reporter
from sync.handover.states import HandoverState

BREAK_AT_CHOICES = ("", *(state.value for state in HandoverState))
"""What `--break-at` takes; empty: no phase."""


@dataclass(frozen=True)
class Phases:
    """Reports each phase. `break_at` names the one in which the process stops itself, for failure
    drills; SIGCONT lets it go on."""

    reporter: Reporter
    break_at: str

    async def enter(self, state: HandoverState) -> None:
        """Reports that the handover has come to `state`; nothing has been done there yet."""
        self.reporter.event("phase", phase=state.value)
        if state.value == self.break_at:
            os.kill(os.getpid(), signal.SIGSTOP)
