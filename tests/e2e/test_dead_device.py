"""A guest that has moved to a device that does not work for it: both sides say so."""

from dataclasses import replace
from pathlib import Path

import pytest

from ferry.errors import Exit
from lab.testbed import Host, Testbed
from tests.e2e.two_hosts import (
    MIGRATION_S,
    Method,
    new_bed,
    run_resolve,
    small_setup,
    start_migration,
)

METHOD = Method("replay", "logging")


def start_with_mute_target(bed: Testbed, mute: str) -> tuple[Host, Host]:
    a, b = bed.hosts["a"], bed.hosts["b"]
    bed.start_host(a, incoming=False)
    bed.setup = replace(bed.setup, device=(*bed.setup.device, "--mute", mute))
    bed.start_host(b, incoming=True)
    bed.wait_operations(a, 200)
    return a, b


@pytest.mark.parametrize("mute", ["interrupts", pytest.param("requests", marks=pytest.mark.full)])
def test_a_device_that_is_dead_at_the_target_is_told_by_both_sides(
    tmp_path: Path, mute: str
) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_with_mute_target(bed, mute)
        sender, receiver = start_migration(bed, a, b, METHOD, receive=("--watch-device", "1"))
        for process, where in ((sender, "there"), (receiver, "here")):
            assert process.wait(MIGRATION_S) == Exit.DEVICE_SILENT, process.tail()
            told = process.wait_event("success")
            assert told["devices"] == "silent" and told["exit_code"] == Exit.DEVICE_SILENT
            assert f"BUT A DEVICE DOES NOT WORK {where}: device 0 has not int" in told["text"]
        # It has moved all the same, and nobody may think otherwise.
        assert bed.status(b) == "running" and bed.status(a) != "running"
        settled = run_resolve(bed, b, "--session", receiver.wait_event("success")["session"])
        assert settled["outcome"] == "committed"
