"""I10: the guest goes on while nothing else does: neither `send` nor the link takes anything.

In the state in which its accesses are captured and its pages tracked; how long that lasts makes no
difference to the guest, only to the migration. The journal is small, so that it would be full soon,
and the guest is watched for longer than that.
"""

import dataclasses
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ferry.cli import main
from ferry.errors import Exit
from tests.e2e.two_hosts import (
    DIRTY,
    MIGRATION_S,
    PEER_TIMEOUT_S,
    Method,
    assert_sound,
    new_bed,
    small_setup,
    start_both,
    start_migration,
)
from transport.kernels.digests import scan_changed

MOVED_BYTES = 96 << 20
"""Some 4000 accesses, and every page of the read area is dirty."""
BUSY = ("--iops", "1500")
"""So much is moved before a `send` that stands still is ended for it."""
JOURNAL = ("--journal-size", "64K")
"""2000 accesses: enough for `send` to keep up with, unless it waits for something."""
LONG_SCAN_S = 11.0
"""Tens of thousands of accesses, and what a scan of some 60 GiB takes."""


@pytest.mark.parametrize(
    "dirty", [DIRTY[0], *(pytest.param(each, marks=pytest.mark.full) for each in DIRTY[1:])]
)
def test_i10_a_sender_that_takes_nothing_costs_a_new_snapshot(tmp_path: Path, dirty: str) -> None:
    method = Method("replay", dirty)
    setup = dataclasses.replace(small_setup(method, *BUSY), gateway=JOURNAL)
    with new_bed(tmp_path, setup) as bed:
        a, b = start_both(bed)
        patient = ("--peer-timeout", "120")
        sender, receiver = start_migration(
            bed, a, b, method, "--break-at", "precopy", *patient, receive=patient
        )
        sender.wait_stopped()
        bed.wait_disk(a, MOVED_BYTES)
        sender.resume()
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)


def test_i10_a_link_that_takes_nothing_costs_the_migration(tmp_path: Path) -> None:
    method = Method("replay", "logging")
    setup = dataclasses.replace(small_setup(method, *BUSY), gateway=JOURNAL)
    with new_bed(tmp_path, setup) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(
            bed, a, b, method, "--bandwidth", "64K", "--peer-timeout", "120"
        )
        sender.wait_event("phase", phase="precopy")
        receiver.signal(signal.SIGSTOP)
        bed.wait_disk(a, MOVED_BYTES)
        assert sender.running, sender.tail()
        sender.signal(signal.SIGINT)
        assert sender.wait(MIGRATION_S) == Exit.INTERRUPTED, sender.tail()
        assert_sound(bed, a)


def test_i10_a_guest_that_its_vmm_pauses_by_itself_does_not_wait_for_the_link(
    tmp_path: Path,
) -> None:
    """The device has written more than the link carries, and the CPU hardly anything."""
    method = Method("replay", "logging")
    quiet = (
        *("--switch-when-clean", "--iops", "90", "--cpu-pages", "0"),
        *("--block-size", "64K", "--read-share", "1", "--read-area", "8M"),
    )
    with new_bed(tmp_path, small_setup(method, *quiet)) as bed:
        a, b = start_both(bed)
        slow = ("--bandwidth", "4M", "--codec", "none")
        sender, receiver = start_migration(bed, a, b, method, *slow)
        assert sender.wait(MIGRATION_S) == Exit.NOT_CONVERGED, sender.tail()
        assert "paused its guest by itself" in sender.wait_event("error")["message"]
        receiver.wait(MIGRATION_S)
        assert_sound(bed, a)


@pytest.mark.full
def test_a_first_scan_may_take_longer_than_the_journal_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan(memory: NDArray[np.uint8], seen: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
        if not seen.any():
            time.sleep(LONG_SCAN_S)
        return scan_changed(memory, seen, seed)

    monkeypatch.setattr("ferry.migration.source_devices.scan_changed", scan)
    method = Method("replay", "scan")
    setup = dataclasses.replace(small_setup(method, *BUSY), gateway=JOURNAL)
    with new_bed(tmp_path, setup) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b)
        to = ("--to", f"ipc://{b.folder}/link.sock", "--qmp", str(a.qmp_socket))
        assert main(["send", *to, *map(str, a.control_flags), *method.flags]) == Exit.OK
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)


@pytest.mark.full
def test_a_sender_goes_on_after_it_was_stopped_for_longer_than_a_peer_may_be_silent(
    tmp_path: Path,
) -> None:
    method = Method()
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(
            *(bed, a, b, method, "--break-at", "precopy"), receive=("--peer-timeout", "120")
        )
        sender.wait_stopped()
        time.sleep(PEER_TIMEOUT_S + 1)
        sender.resume()
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)
