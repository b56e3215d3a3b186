"""A hang is a death (I8): a stopped `send` costs the migration, and the guest goes on."""

import signal
from pathlib import Path

import pytest

from tests.e2e.two_hosts import (
    MIGRATION_S,
    Method,
    assert_sound,
    new_bed,
    small_setup,
    start_both,
    start_migration,
)

METHOD = Method("replay", "message")
PHASES = ("precopy", "pausing", "stopping", "verifying", "awaiting-ready", "releasing")


@pytest.mark.parametrize(
    "phase",
    [pytest.param(each, marks=() if each == "stopping" else pytest.mark.full) for each in PHASES],
)
def test_i8_a_sender_that_is_stopped_for_good(tmp_path: Path, phase: str) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(bed, a, b, METHOD, "--break-at", phase)
        sender.wait_stopped()
        assert sender.wait(MIGRATION_S) == -signal.SIGKILL
        receiver.wait(MIGRATION_S)
        assert_sound(bed, a)
