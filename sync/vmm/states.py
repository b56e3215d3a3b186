"""The states of QEMU's run loop and migration, and the one decision that is made on them.

Source: qapi/run-state.json and qapi/migration.json. Pure: `resume_step` is the rule by which
both `driver.Vmm.cancel_and_resume` and `recover.recover_source` bring a source back.
"""

from enum import Enum
from typing import Any

from sync.vmm.errors import QmpProtocolError, VmmNotReady

UNDER_WAY = frozenset({"setup", "wait-unplug", "active", "pre-switchover", "device"})
"""Statuses of a migration that `migrate_cancel` ends."""
FAILED = frozenset({"failed", "cancelling", "cancelled"})
RUNNING = frozenset({"running", "suspended"})
"""Run states in which the guest has what it wants. A suspended one has put itself to sleep."""
PASSING = frozenset({"finish-migrate", "save-vm", "restore-vm", "colo"})
STOPPED = {
    "paused": "paused by somebody",
    "io-error": "stopped by an I/O error",
    "shutdown": "powered off",
    "guest-panicked": "stopped by its panic",
    "internal-error": "stopped by an error of its VMM",
    "watchdog": "stopped by its watchdog",
    "debug": "stopped by a debugger",
    "prelaunch": "not started yet",
}
"""Run states that a migration does not bring about: what has, is whose business it is (I12)."""


class ResumeStep(Enum):
    """What to do next to bring a source back to running."""

    NOTHING = "nothing"
    WAIT = "wait"
    CANCEL = "migrate_cancel"
    CONTINUE = "cont"


def resume_step(run_state: str, migration_status: str, *, ran: bool = True) -> ResumeStep:
    """The next step from this state. Raises `VmmNotReady` if this is no source.

    `ran`: the guest ran until its migration paused it. Only then it is continued, and only from
    what the migration has left it in (I12); one that stands still for another reason stays so.
    """
    if migration_status in UNDER_WAY:
        return ResumeStep.CANCEL
    if migration_status == "cancelling":
        return ResumeStep.WAIT
    if run_state in RUNNING or run_state in STOPPED:
        return ResumeStep.NOTHING
    if run_state == "postmigrate":
        return ResumeStep.CONTINUE if ran else ResumeStep.NOTHING
    if run_state in PASSING:
        return ResumeStep.WAIT
    raise VmmNotReady(f"a guest in state {run_state!r} cannot be continued")


def in_words(run_state: str) -> str:
    """What a guest in this state is, for people."""
    if run_state in RUNNING:
        return "running" if run_state == "running" else "asleep"
    return STOPPED.get(run_state, f"in state {run_state!r}")


def run_state_of(status: Any) -> str:
    """`status` out of what `query-status` returned."""
    return _text(status, "status", "query-status")


def migration_status_of(migration: Any) -> str:
    """`status` out of what `query-migrate` returned; QEMU leaves it out before the first one."""
    if isinstance(migration, dict) and "status" not in migration:
        return "none"
    return _text(migration, "status", "query-migrate")


def _text(answer: Any, key: str, command: str) -> str:
    if not isinstance(answer, dict) or not isinstance(answer.get(key), str):
        raise QmpProtocolError(f"{command} returned no {key}")
    text: str = answer[key]
    return text
