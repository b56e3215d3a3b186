"""I7 with the real commands: whatever an operator is told to do, there is one owner."""

import json
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
    resolve,
    resolve_both,
    run_resolve,
    small_setup,
    start_both,
    start_migration,
)

METHOD = Method("replay", "logging")


def start_c(bed: Testbed) -> Host:
    """A third host that waits for the guest."""
    c = bed.hosts["c"] = Host("c", bed.folder / "c")
    c.folder.mkdir(mode=0o700)
    bed.start_host(c, incoming=True)
    return c


def kill_send_before_the_answer(bed: Testbed, a: Host, b: Host) -> Process:
    """The commit is sent, the guest runs on b, and `send` never hears of it."""
    hold = ("--break-at", "starting-guest")
    sender, receiver = start_migration(bed, a, b, METHOD, receive=hold)
    receiver.wait_stopped()
    sender.kill()
    receiver.resume()
    assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
    return sender


@pytest.mark.full
def test_i7_a_session_is_settled_by_its_own_record_whatever_came_later(tmp_path: Path) -> None:
    """A to B is in doubt at A, B to C succeeds; then the documented procedure."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        kill_send_before_the_answer(bed, a, b)
        c = start_c(bed)
        migrate(bed, b, c, METHOD)
        asked = resolve(bed, a)
        assert asked.wait(MIGRATION_S) == Exit.IN_DOUBT
        session = asked.events[-1]["session"]
        of_b = run_resolve(bed, b, "--session", session, "--role", "target")
        assert of_b["outcome"] == "committed"
        # What B says of its own session with C is nothing for A, and no guess opens it.
        of_c = run_resolve(bed, c, "--role", "target")
        for proof in (of_c["verdict"], f"fenced:{session}:{of_b['verdict'].split(':')[2]}"):
            assert resolve(bed, a, "--verdict", proof).wait(MIGRATION_S) == Exit.REFUSED
        assert run_resolve(bed, a, "--verdict", of_b["verdict"])["outcome"] == "released"
        # And nothing that can be typed there afterwards takes the guest back.
        assert resolve(bed, a, "--verdict", f"fenced:{session}:0").wait(MIGRATION_S) == Exit.OK
        assert bed.status(a) == "postmigrate"
        assert_sound(bed, c)


@pytest.mark.full
def test_i7_after_a_success_nobody_is_told_to_take_the_guest_back(tmp_path: Path) -> None:
    """`doctor` says that it moved, `cont` meets a shut gateway, and the gateway may even be started
    anew: the guest on the other host stays sound."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        session = migrate(bed, a, b, METHOD)["session"]
        for flags in (("--qmp", a.qmp_socket), ()):
            words = ("doctor", "--json", "--gateway", a.control_socket, *flags)
            doctor = bed.start("doctor a", *words)
            doctor.wait(MIGRATION_S)
            ours = [e for e in doctor.events if e.get("check", "").startswith(("gateway", "guest"))]
            assert not [event for event in ours if event["level"] == "problem"], ours
            assert any(f"moved in session {session}" in event["text"] for event in ours)
            assert "resolve" not in json.dumps(ours)
        wrong = resolve(bed, a, "--role", "target")
        assert wrong.wait(MIGRATION_S) == Exit.REFUSED
        assert a.guest is not None
        assert a.guest.running
        assert run_resolve(bed, a)["outcome"] == "released"
        assert a.gateway is not None
        a.gateway.kill()
        bed.start_gateway(a)
        assert run_resolve(bed, a)["outcome"] == "released"
        before = a.disk_bytes()
        bed.execute(a, "cont")
        assert_sound(bed, b)
        assert a.disk_bytes() == before


@pytest.mark.full
def test_the_guest_comes_back_to_a_host_that_it_has_left(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        migrate(bed, a, b, METHOD)
        assert a.guest is not None
        a.guest.kill()
        bed.start_guest(a, incoming=True)
        migrate(bed, b, a, METHOD)
        assert_sound(bed, a)
        # At home again, and free: what it was before is over.
        assert run_resolve(bed, a)["outcome"] == "committed"


def test_i7_a_source_whose_gateway_died_too_stays_shut_until_it_has_the_proof(
    tmp_path: Path,
) -> None:
    """`send` dies between letting go and the commit, and the source's gateway with it."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(bed, a, b, METHOD, "--break-at", "committing")
        sender.wait_stopped()
        assert a.gateway is not None
        a.gateway.kill()
        sender.kill()
        receiver.wait(MIGRATION_S)
        bed.start_gateway(a)
        assert resolve(bed, a).wait(MIGRATION_S) == Exit.IN_DOUBT
        assert bed.status(a) != "running"
        # A slip in either command: nothing is ended, started or put on record (I11).
        slip = resolve(bed, b, "--end-vmm", "--qmp", a.qmp_socket)
        assert slip.wait(MIGRATION_S) == Exit.REFUSED, slip.tail()
        assert a.guest is not None and a.guest.running
        verdict = run_resolve(bed, b)["verdict"]
        slip = resolve(bed, a, "--verdict", verdict, "--qmp", b.qmp_socket)
        assert slip.wait(MIGRATION_S) == Exit.REFUSED, slip.tail()
        assert "running" not in (bed.status(a), bed.status(b))
        assert resolve(bed, a).wait(MIGRATION_S) == Exit.IN_DOUBT
        assert resolve_both(bed, a, b) is a
        assert_sound(bed, a)


def test_nobody_may_run_though_memory_is_intact(tmp_path: Path) -> None:
    """The target's VMM dies after the commit is on record and before the guest may run: the source
    goes on, by what the target says without its VMM."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        hold = ("--break-at", "starting-guest")
        sender, receiver = start_migration(bed, a, b, METHOD, receive=hold)
        receiver.wait_stopped()
        assert b.guest is not None
        b.guest.kill()
        receiver.kill()
        assert sender.wait(MIGRATION_S) == Exit.IN_DOUBT
        assert resolve_both(bed, a, b) is a
        assert_sound(bed, a)


def test_a_target_that_loses_its_vmm_before_it_runs_tells_the_source_by_itself(
    tmp_path: Path,
) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        hold = ("--break-at", "starting-guest")
        sender, receiver = start_migration(bed, a, b, METHOD, receive=hold)
        receiver.wait_stopped()
        assert b.guest is not None
        b.guest.kill()
        receiver.resume()
        assert sender.wait(MIGRATION_S) == Exit.PEER_ABORTED, sender.tail()
        receiver.wait(MIGRATION_S)
        assert_sound(bed, a)


def test_i7_a_guest_that_stands_still_at_the_target_is_none_that_never_ran(tmp_path: Path) -> None:
    """Paused there, at a gateway that was started anew: it is committed, and its VMM is left
    alone."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        kill_send_before_the_answer(bed, a, b)
        bed.execute(b, "stop")
        assert b.gateway is not None
        b.gateway.kill()
        bed.start_gateway(b)
        settled = run_resolve(bed, b, "--end-vmm")
        assert settled["outcome"] == "committed"
        assert bed.status(b) == "paused"
        assert run_resolve(bed, a, "--verdict", settled["verdict"])["outcome"] == "released"
        bed.execute(b, "cont")
        assert_sound(bed, b)


def test_i7_a_vmm_that_would_not_wait_is_made_to_wait(tmp_path: Path) -> None:
    """As a QEMU without -S: it would run its guest as soon as it is loaded."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        bed.execute(b, "cont")
        sender, receiver = start_migration(bed, a, b, METHOD, "--break-at", "awaiting-ready")
        sender.wait_stopped()
        sender.kill()
        receiver.wait(MIGRATION_S)
        assert bed.status(b) == "paused"
        bed.wait_status(a, "running")
        assert_sound(bed, a)


@pytest.mark.full
def test_a_host_that_never_comes_back(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        sender, _ = start_migration(bed, a, b, METHOD, "--break-at", "committing")
        sender.wait_stopped()
        sender.kill()
        for process in (b.guest, b.gateway, b.device):
            assert process is not None
            process.kill()
        assert resolve(bed, a).wait(MIGRATION_S) == Exit.IN_DOUBT
        taken = run_resolve(bed, a, "--vouch-the-other-host-is-gone")
        assert taken["outcome"] == "owned"
        assert_sound(bed, a)
