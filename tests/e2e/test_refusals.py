"""Bad input and bad luck with real processes: told apart by exit code, and the guest unharmed."""

import signal
from pathlib import Path

import pytest

from ferry.cli import main
from ferry.errors import Exit
from lab.testbed import Host, Process, Testbed
from tests.e2e.two_hosts import (
    GUEST,
    MIGRATION_S,
    OPERATIONS,
    Method,
    assert_sound,
    migrate,
    new_bed,
    small_setup,
    start_both,
    start_migration,
)

METHOD = Method("replay", "logging")
LATE = 3 << 20
MOVED_BYTES = 16 << 20
"""What the VMM has still to send is about what the buffers towards the target's VMM hold."""


def start_source(bed: Testbed) -> Host:
    a = bed.hosts["a"]
    bed.start_host(a, incoming=False)
    bed.wait_operations(a, OPERATIONS)
    return a


def ended(process: Process) -> tuple[int, str]:
    code = process.wait(MIGRATION_S)
    return code, str(process.wait_event("error")["message"])


def test_no_receiver(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a = start_source(bed)
        sender = bed.send(a, bed.hosts["b"], "--connect-timeout", "1")
        code, _ = ended(sender)
        assert code == Exit.UNREACHABLE
        assert_sound(bed, a)


@pytest.mark.full
def test_a_sender_with_another_secret_is_turned_away_and_the_right_one_admitted(
    tmp_path: Path,
) -> None:
    right, wrong = str(tmp_path / "right"), str(tmp_path / "wrong")
    for path in (right, wrong):
        assert main(["secret", "--output", path]) == Exit.OK
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b, "--secret", right)
        for secret in (("--secret", wrong), ()):
            code, message = ended(bed.send(a, b, *secret, "--connect-timeout", "4"))
            assert code == Exit.UNREACHABLE
            assert "have not got the same secret" in message
        sender = bed.send(a, b, *METHOD.flags, "--secret", right)
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)


@pytest.mark.full
def test_another_memory_layout_is_found_before_anything_is_touched(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = bed.hosts["a"], bed.hosts["b"]
        bed.start_host(a, incoming=False)
        bed.start_device(b)
        bed.start_gateway(b)
        b.guest = bed.start(
            "guest b",
            *("guest", "--device", b.gateway_socket, "--qmp", b.qmp_socket, *GUEST),
            *("--high-size", "48M", "--incoming"),
        )
        bed.wait_status(b, "inmigrate")
        sender, receiver = start_migration(bed, a, b, METHOD)
        code, message = ended(sender)
        assert code == Exit.REFUSED
        assert "start the VMM with the same memory" in message
        told = receiver.wait_event("refused")
        assert "start the VMM with the same memory" in told["reason"]
        assert receiver.running
        phases = [event["phase"] for event in sender.events if event["event"] == "phase"]
        assert phases == ["preparing", "aborting", "aborted"]
        assert_sound(bed, a)
        receiver.signal(signal.SIGTERM)
        assert receiver.wait(MIGRATION_S) == Exit.INTERRUPTED
        assert bed.status(b) == "inmigrate"


@pytest.mark.parametrize("side", [pytest.param("source", marks=pytest.mark.full), "target"])
def test_the_vmm_of_another_vm_is_found_before_anything_is_touched(
    tmp_path: Path, side: str
) -> None:
    """Of the same shape, in the same state: only what ties it to its gateway tells."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        folder = bed.folder / "c"
        folder.mkdir(mode=0o700)
        other = bed.hosts["c"] = Host("c", folder)
        bed.image = bed.folder / "other.img"
        bed.image.write_bytes(bytes(bed.setup.image_bytes))
        bed.start_host(other, incoming=side == "target")
        qmp = ("--qmp", str(other.qmp_socket))
        sender, receiver = start_migration(
            bed,
            a,
            b,
            METHOD,
            *(qmp if side == "source" else ()),
            receive=qmp if side == "target" else (),
        )
        code, message = ended(sender)
        assert code == Exit.REFUSED
        assert "name the gateways and the QMP socket of one VM" in message
        receiver.signal(signal.SIGTERM)
        receiver.wait(MIGRATION_S)
        assert_sound(bed, a)
        assert bed.status(b) == "inmigrate"
        assert bed.status(other) == ("inmigrate" if side == "target" else "running")


@pytest.mark.full
def test_devices_that_differ(tmp_path: Path) -> None:
    """The source's device has its own migration state, the target's does not."""
    with new_bed(tmp_path, small_setup(METHOD, device=())) as bed:
        a, b = bed.hosts["a"], bed.hosts["b"]
        a.device = bed.start(
            "device a", "device", "--socket", a.device_socket, "--image", bed.image, "--v2"
        )
        a.device.wait_socket(a.device_socket)
        bed.start_gateway(a)
        bed.start_guest(a, incoming=False)
        bed.start_host(b, incoming=True)
        sender, receiver = start_migration(bed, a, b, Method("v2", "message"))
        code, message = ended(sender)
        assert code == Exit.REFUSED
        assert "device 0: " in message
        assert "does not" in message
        # The next one may be right.
        receiver.wait_event("refused", exit_name="refused")
        sender = bed.send(a, b, "--registers", "replay", "--dirty", "message")
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK, receiver.tail()
        assert_sound(bed, b)


@pytest.mark.full
def test_a_device_that_cannot_do_what_was_asked_for(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD, device=())) as bed:
        a = start_source(bed)
        code, message = ended(bed.send(a, bed.hosts["b"], "--registers", "v2"))
        assert code == Exit.DEVICE
        assert "does not offer VFIO migration v2" in message
        code, message = ended(bed.send(a, bed.hosts["b"], "--dirty", "logging"))
        assert code == Exit.DEVICE
        assert "does not offer DMA logging" in message
        assert_sound(bed, a)


@pytest.mark.full
def test_a_gateway_that_is_busy(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        patient = ("--peer-timeout", "60")
        sender, receiver = start_migration(
            bed, a, b, METHOD, *patient, "--break-at", "precopy", receive=patient
        )
        sender.wait_stopped()
        second = bed.send(a, b, "--connect-timeout", "1")
        code, message = ended(second)
        assert code == Exit.DEVICE
        assert "has the lease of this gateway" in message
        sender.resume()
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK
        assert_sound(bed, b)


@pytest.mark.parametrize(
    ("who", "number"),
    [
        ("send", signal.SIGINT),
        ("receive", signal.SIGTERM),
        *(
            pytest.param(who, number, marks=pytest.mark.full)
            for who, number in (
                ("send", signal.SIGTERM),
                ("send", signal.SIGHUP),
                ("receive", signal.SIGINT),
                ("receive", signal.SIGHUP),
            )
        ),
    ],
)
def test_i8_interrupted(tmp_path: Path, who: str, number: signal.Signals) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(bed, a, b, METHOD, "--break-at", "stopping")
        sender.wait_stopped()
        process, other = (sender, receiver) if who == "send" else (receiver, sender)
        process.signal(number)
        sender.resume()
        assert ended(process)[0] == Exit.INTERRUPTED
        assert ended(other)[0] == Exit.PEER_ABORTED
        assert_sound(bed, a)
        assert bed.status(b) != "running"


def test_a_vmm_that_ends_as_its_device_is_lost_is_not_blamed(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(bed, a, b, METHOD, "--break-at", "finalizing")
        sender.wait_stopped()
        for victim in (b.device, b.guest):
            assert victim is not None
            victim.kill()
        code, message = ended(receiver)
        assert code == Exit.DEVICE
        assert "the device is gone" in message
        sender.resume()
        code, message = ended(sender)
        assert code == Exit.PEER_ABORTED
        assert "the device is gone" in message
        assert_sound(bed, a)


@pytest.mark.full
def test_a_guest_that_does_not_converge(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(
            *(bed, a, b, METHOD, "--downtime-limit", "1"),
            *("--max-rounds", "3", "--on-stall", "abort"),
        )
        assert ended(sender)[0] == Exit.NOT_CONVERGED
        assert ended(receiver)[0] == Exit.PEER_ABORTED
        assert_sound(bed, a)


@pytest.mark.full
def test_i7_a_guest_that_was_let_go_is_not_sent_again(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        migrate(bed, a, b, METHOD)
        code, message = ended(bed.send(a, b))
        assert code == Exit.REFUSED
        assert "moved away in session" in message
        assert "Nothing was touched." in message
        assert_sound(bed, b)


def test_i10_a_dead_link_costs_the_guest_nothing(tmp_path: Path) -> None:
    """The receiver is frozen, so that nothing of the link moves; the guest's I/O does."""
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b)
        sender = bed.send(
            a,
            b,
            *(*METHOD.flags, "--peer-timeout", "30", "--downtime-limit", "1"),
            *("--max-rounds", "100000", "--on-stall", "abort", "--resume-window", "1"),
        )
        sender.wait_event("round")
        receiver.signal(signal.SIGSTOP)
        bed.wait_disk(a, MOVED_BYTES)
        receiver.kill()
        assert ended(sender)[0] == Exit.PEER_LOST
        assert_sound(bed, a)


def test_i6_a_target_vmm_that_falls_behind(tmp_path: Path) -> None:
    """The target's VMM stands still near the end of its first pass, so that what it loads in the
    end is older than the pages that have come beside it; few of them are written again."""
    with new_bed(tmp_path, small_setup(METHOD, "--iops", "400")) as bed:
        a, b = start_both(bed)
        sender, receiver = start_migration(
            bed, a, b, METHOD, "--verify", "all", "--bandwidth", "24M"
        )
        sender.wait_event("round", where=lambda event: event["vmm_remaining_bytes"] < LATE)
        assert b.guest is not None
        b.guest.signal(signal.SIGSTOP)
        sender.wait_event("phase", phase="pausing")
        b.guest.signal(signal.SIGCONT)
        assert sender.wait(MIGRATION_S) == Exit.OK, sender.tail()
        assert receiver.wait(MIGRATION_S) == Exit.OK
        verification = sender.wait_event("report")["verification"]
        assert verification["scope"].startswith("all")
        assert_sound(bed, b)
