"""The phases of a migration as the user sees them: one event each, and the one to stop in."""

import os
import signal
from dataclasses import dataclass

from ferry.progress import Reporter
from sync.handover.states import HandoverState

BREAK_AT_CHOICES = ("", *(state.value for state in HandoverState))
"""What `--break-at` takes; empty: no phase."""


MEANING = {
    HandoverState.PREPARING: "both sides compare what they have; nothing is touched",
    HandoverState.MEDIATING: "the devices' registers and writes are followed from here on",
    HandoverState.PRECOPY: "memory is sent while the guest runs",
    HandoverState.PAUSING: "the VMM pauses the guest",
    HandoverState.STOPPING: "the guest stands still; its devices are brought to rest",
    HandoverState.FINALIZING: "what is left is sent",
    HandoverState.VERIFYING: "both copies are compared by digest",
    HandoverState.AWAITING_READY: "the target is asked whether it could start the guest",
    HandoverState.RELEASING: "this host lets go of the guest",
    HandoverState.COMMITTING: "the target is told to start the guest",
    HandoverState.ABORTING: "given up; the guest goes on here",
    HandoverState.LISTENING: "waiting for a sender",
    HandoverState.CHECKING: "what the sender has is compared with what is here",
    HandoverState.CHECKING_ONLY: "the sender only asks whether it would work",
    HandoverState.ANSWERING: "the link is measured",
    HandoverState.ENTERING_STANDBY: "the device and the VMM are made ready to take the guest",
    HandoverState.RECEIVING: "memory and registers arrive; the guest runs at the source",
    HandoverState.READYING: "all has arrived; registers are put in place and compared",
    HandoverState.READY: "the guest could start; waiting for the commit",
    HandoverState.OWNING: "the commit has come; the gateways write down that the guest is here",
    HandoverState.DISOWNING: "the gateways take back that the guest is here",
    HandoverState.STARTING_GUEST: "the guest is set going",
    HandoverState.FENCING: "the gateways make sure that it never starts here from this session",
    HandoverState.COMMITTED: "the target owns the guest, and it runs there",
    HandoverState.ABORTED: "the guest is at the source, as before",
    HandoverState.CHECKED: "it was only a check",
    HandoverState.BROKEN: "cleaning up has failed",
    HandoverState.IN_DOUBT: "only the other side's record says who owns the guest",
    HandoverState.OWNER_FAILED: "the target owns the guest and could not start it",
}
"""What a state means for the guest, where it is shown."""


@dataclass(frozen=True)
class Phases:
    """Reports each phase. `break_at` names the one in which the process stops itself, for failure
    drills; SIGCONT lets it go on."""

    reporter: Reporter
    break_at: str

    async def enter(self, state: HandoverState) -> None:
        """Reports that the handover has come to `state`; nothing has been done there yet."""
        self.reporter.event("phase", phase=state.value, detail=MEANING.get(state, ""))
        if state.value == self.break_at:
            os.kill(os.getpid(), signal.SIGSTOP)
