"""`send --check` with real processes: it says what a migration would, and leaves all as it was."""

import signal
from pathlib import Path

import trio

from ferry.errors import Exit
from lab.testbed import Host, Process, Testbed
from sync.vmm.driver import Vmm
from tests.e2e.two_hosts import (
    GUEST,
    MIGRATION_S,
    Method,
    assert_sound,
    new_bed,
    small_setup,
    start_both,
)

METHOD = Method("replay", "logging")


def check(bed: Testbed, source: Host, target: Host, *flags: str) -> tuple[int, Process]:
    sender = bed.send(source, target, "--check", *flags)
    return sender.wait(MIGRATION_S), sender


def phases(process: Process) -> list[str]:
    return [event["phase"] for event in process.events if event["event"] == "phase"]


def test_a_check_and_then_the_migration_with_the_same_receiver(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b)
        for _ in range(2):
            code, sender = check(bed, a, b, *METHOD.flags)
            assert code == Exit.OK, sender.tail()
            assert phases(sender) == ["preparing", "checked"]
            found = {e["check"]: e["text"] for e in sender.events if e["event"] == "finding"}
            assert found[f"device at {a.control_socket}"] == (
                "registers by replay, dirty pages by logging"
            )
            assert {"memory", "VMM", "link", "forecast"} < found.keys()
            foretold = sender.wait_event("forecast")
            assert 40 << 20 <= foretold["memory_bytes"] > foretold["zero_bytes"] > 0
            assert foretold["dirty_bytes_per_s"][1] > 0, "the guest's load writes"
            assert foretold["devices"] == [
                {
                    "registers": "replay",
                    "dirty": "logging",
                    "state_bytes": 0,
                    "downtime_ms": [0, 0],
                }
            ]
            assert bed.status(a) == "running"
        bed.wait_operations(a, 200)
        migration = bed.send(a, b, *METHOD.flags)
        assert migration.wait(MIGRATION_S) == Exit.OK, (migration.tail(), receiver.tail())
        assert receiver.wait(MIGRATION_S) == Exit.OK
        outcomes = [e["outcome"] for e in receiver.events if e["event"] == "checked"]
        assert outcomes == ["it would work"] * 2
        assert_sound(bed, b)


def test_what_is_refused_is_refused_for_the_same_reason_and_the_receiver_goes_on(
    tmp_path: Path,
) -> None:
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
        receiver = bed.receive(b)
        code, sender = check(bed, a, b, *METHOD.flags)
        assert code == Exit.REFUSED
        reason = "start the VMM with the same memory"
        assert reason in sender.wait_event("error")["message"]
        assert phases(sender) == ["preparing", "aborting", "aborted"]
        assert reason in receiver.wait_event("checked")["outcome"]
        code, sender = check(bed, a, b, "--registers", "v2")
        assert code == Exit.DEVICE
        assert "does not offer VFIO migration v2" in sender.wait_event("error")["message"]
        assert receiver.running
        migration = bed.send(a, b, *METHOD.flags)
        assert migration.wait(MIGRATION_S) == Exit.REFUSED
        assert reason in receiver.wait_event("refused")["reason"]
        assert receiver.running
        assert_sound(bed, a)
        receiver.signal(signal.SIGTERM)
        assert receiver.wait(MIGRATION_S) == Exit.INTERRUPTED
        assert bed.status(b) == "inmigrate"


def test_a_check_without_a_receiver(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a = bed.hosts["a"]
        bed.start_host(a, incoming=False)
        code, _ = check(bed, a, bed.hosts["b"], "--connect-timeout", "1")
        assert code == Exit.UNREACHABLE
        assert_sound(bed, a)


def test_a_guest_that_its_operator_has_paused_stays_so(tmp_path: Path) -> None:
    """Refused in the first phase, before anything of it is ours to resume."""

    async def pause(path: Path) -> None:
        async with await Vmm.connect(str(path)) as vmm:
            await vmm.execute("stop")

    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a = bed.hosts["a"]
        bed.start_host(a, incoming=False)
        trio.run(pause, a.qmp_socket)
        for flags in ((), ("--check",)):
            sender = bed.send(a, bed.hosts["b"], *flags)
            assert sender.wait(MIGRATION_S) == Exit.VMM, sender.tail()
            assert bed.status(a) == "paused"


def test_a_receiver_is_interrupted_between_two_checks(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, b = start_both(bed)
        receiver = bed.receive(b)
        assert check(bed, a, b)[0] == Exit.OK
        receiver.wait_event("checked")
        receiver.signal(signal.SIGINT)
        assert receiver.wait(MIGRATION_S) == Exit.INTERRUPTED
        assert_sound(bed, a)
        assert bed.status(b) == "inmigrate"
