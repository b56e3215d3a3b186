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
CONTINUABLE = frozenset({"paused", "postmigrate", "prelaunch"})
PASSING = frozenset({"finish-migrate", "save-vm", "restore-vm", "colo"})


class ResumeStep(Enum):
    """What to do next to bring a source back to running."""

    NOTHING = "nothing"
    WAIT = "wait"
    CANCEL = "migrate_cancel"
    CONTINUE = "cont"


def resume_step(run_state: str, migration_status: str) -> ResumeStep:
    """The next step from this state. Raises `VmmNotReady` if there is no way back from it."""
    if migration_status in UNDER_WAY:
        return ResumeStep.CANCEL
    if migration_status == "cancelling":
        return ResumeStep.WAIT
    if run_state in RUNNING:
        return ResumeStep.NOTHING
    if run_state in CONTINUABLE:
        return ResumeStep.CONTINUE
    if run_state in PASSING:
        return ResumeStep.WAIT
    raise VmmNotReady(f"a guest in state {run_state!r} cannot be continued")


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
