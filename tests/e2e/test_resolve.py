"""I7 where even the records are gone: nobody runs the guest on a guess."""

from pathlib import Path

from ferry.errors import Exit
from tests.e2e.two_hosts import (
    MIGRATION_S,
    Method,
    assert_sound,
    new_bed,
    run_resolve,
    small_setup,
    start_both,
    start_migration,
)


def test_i7_a_source_without_its_record_does_not_resume_unasked(tmp_path: Path) -> None:
    """`send` dies between letting go and the commit, and the source's gateway with it."""
    method = Method("replay", "logging")
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(bed, a, b, method, "--break-at", "committing")
        sender.wait_stopped()
        assert a.gateway is not None
        a.gateway.kill()
        sender.kill()
        receiver.wait(MIGRATION_S)
        bed.start_gateway(a)
        asked = bed.start(
            "resolve a",
            *("resolve", "--role", "source", "--gateway", a.control_socket),
            *("--qmp", a.qmp_socket, "--json"),
        )
        assert asked.wait(MIGRATION_S) == Exit.IN_DOUBT
        assert bed.status(a) != "running"
        assert run_resolve(bed, b, "target") == "fenced"
        assert run_resolve(bed, a, "source", "--peer", "fenced") == "owned"
        assert_sound(bed, a)
