"""A hang is a death (I8): a stopped `send` costs the migration, and the guest goes on."""

import itertools
import signal
import time
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from ferry.errors import Exit
from tests.e2e.test_kill import check, settle
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
STILL_S = 3.0
"""Shorter than a VMM waits for its device."""
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


def each_at_the_target(*phases: str, sampled: tuple[str, str] = ("", "")) -> list[ParameterSet]:
    """Each victim in each of `phases`; all but one pair are left to `make test-full`."""
    return [
        pytest.param(*pair, marks=() if pair == sampled else pytest.mark.full)
        for pair in itertools.product(phases, ("receive", "guest", "gateway", "device"))
    ]


@pytest.mark.parametrize(
    ("phase", "victim"),
    each_at_the_target(
        *("preparing", "precopy", "pausing", "stopping", "finalizing"),
        sampled=("finalizing", "device"),
    ),
)
def test_i8_somebody_at_the_target_that_is_stopped_for_good(
    tmp_path: Path, phase: str, victim: str
) -> None:
    """Before the commit the guest goes on at the source and `receive` ends; nothing runs at the
    target, also when the one that hung goes on."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        # A VMM that takes nothing more costs the migration its time, and nobody else anything.
        patience = ("--timeout", "5", "--on-stall", "abort")
        sender, receiver = start_migration(bed, a, b, METHOD, "--break-at", phase, *patience)
        sender.wait_stopped()
        stopped = receiver if victim == "receive" else getattr(b, victim)
        stopped.signal(signal.SIGSTOP)
        sender.resume()
        code = sender.wait(2 * MIGRATION_S)
        assert code not in (Exit.OK, Exit.INTERNAL), sender.tail()
        assert_sound(bed, a)
        if victim != "receive":
            receiver.wait(MIGRATION_S)
        stopped.signal(signal.SIGCONT)
        receiver.wait(MIGRATION_S)
        assert bed.status(b) != "running"
        assert_sound(bed, a)


@pytest.mark.parametrize(
    ("phase", "victim"),
    each_at_the_target(
        *("verifying", "awaiting-ready", "releasing", "committing"), *("owning", "starting-guest")
    ),
)
def test_i7_i8_somebody_at_the_target_that_is_stopped_about_the_commit(
    tmp_path: Path, phase: str, victim: str
) -> None:
    """Until both commands have ended: then the one that hung goes on, and the documented procedure
    finds one owner. A target may own the guest before it finds that its VMM hangs."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        hold = ("--break-at", phase)
        at_source = phase not in ("owning", "starting-guest")
        sender, receiver = start_migration(
            bed, a, b, METHOD, *(hold if at_source else ()), receive=() if at_source else hold
        )
        holder = sender if at_source else receiver
        holder.wait_stopped()
        stopped = receiver if victim == "receive" else getattr(b, victim)
        stopped.signal(signal.SIGSTOP)
        if holder is not stopped:
            holder.resume()
        codes = {"send": sender.wait(MIGRATION_S)}
        if victim != "receive":
            codes["receive"] = receiver.wait(MIGRATION_S)
        stopped.signal(signal.SIGCONT)
        codes["receive"] = receiver.wait(MIGRATION_S)
        assert Exit.INTERNAL not in codes.values(), (sender.tail(), receiver.tail())
        owner = settle(bed, a, b, "", codes, sender, receiver)
        check(bed, owner, b if owner is a else a, "")


@pytest.mark.full
@pytest.mark.parametrize("phase", ["precopy", "stopping", "finalizing", "committing"])
@pytest.mark.parametrize("victim", ["guest", "gateway", "device"])
def test_i7_i8_somebody_at_the_source_that_stands_still_for_some_time(
    tmp_path: Path, phase: str, victim: str
) -> None:
    """Whatever comes of the migration, one side has the guest, and it has lost nothing."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(bed, a, b, METHOD, "--break-at", phase)
        sender.wait_stopped()
        stopped = getattr(a, victim)
        stopped.signal(signal.SIGSTOP)
        sender.resume()
        time.sleep(STILL_S)  # as the fault that it is
        stopped.signal(signal.SIGCONT)
        codes = sender.wait(MIGRATION_S), receiver.wait(MIGRATION_S)
        assert Exit.INTERNAL not in codes, (sender.tail(), receiver.tail())
        owner, other = (b, a) if Exit.OK in codes else (a, b)
        bed.wait_status(owner, "running")
        assert bed.status(other) != "running"
        assert_sound(bed, owner)
