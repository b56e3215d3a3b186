"""I8 with real processes: fail, fail, fail, and then it has to work, with what is left of each."""

from pathlib import Path

import pytest

from ferry.errors import Exit
from lab.testbed import Host, Process, Testbed
from tests.e2e.two_hosts import (
    MIGRATION_S,
    Method,
    assert_sound,
    migrate,
    new_bed,
    resolve_both,
    small_setup,
    start_both,
    start_migration,
)


@pytest.mark.full
def test_i8_whatever_failed_before_the_next_migration_works(tmp_path: Path) -> None:
    method = Method("v2", "logging")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)

        def hold(phase: str) -> tuple[Process, Process]:
            sender, receiver = start_migration(bed, a, b, method, "--break-at", phase)
            sender.wait_stopped()
            return sender, receiver

        sender, receiver = hold("precopy")
        receiver.kill()
        sender.resume()
        assert sender.wait(MIGRATION_S) == Exit.PEER_LOST, sender.tail()
        assert bed.status(a) == "running"

        renew_guest(bed, b)
        sender, receiver = hold("finalizing")
        assert b.gateway is not None
        b.gateway.kill()
        sender.resume()
        assert sender.wait(MIGRATION_S) == Exit.PEER_ABORTED, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.DEVICE, receiver.tail()
        assert bed.status(a) == "running"

        bed.start_gateway(b)
        renew_guest(bed, b)
        sender, receiver = hold("committing")
        sender.kill()
        assert receiver.wait(MIGRATION_S) == Exit.PEER_LOST, receiver.tail()
        assert resolve_both(bed, a, b) is a

        renew_guest(bed, b)
        migrate(bed, a, b, method)
        assert_sound(bed, b)


def renew_guest(bed: Testbed, host: Host) -> None:
    """A new VMM, which waits for a guest."""
    if host.guest is not None and host.guest.running:
        host.guest.kill()
    bed.start_guest(host, incoming=True)
