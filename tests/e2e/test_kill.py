"""Every process is killed in every phase, for every method; afterwards one side owns the guest.

By default each victim dies once, in phases and with methods that go round, so that each of these is
there; `make test-full` has all. In one process and in every state,
with every victim, the same is done by `tests.in_process`.

A migration is held at a phase (`--break-at` stops the process that entered it), a process is
killed with SIGKILL, the migration goes on. Then whoever is left says how it ended, `resolve`
settles what they could not, what was killed on the owner's side is started again, and the guest's
I/O has to go on with every checksum right.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from _pytest.mark import ParameterSet

from ferry.errors import Exit
from lab.testbed import Host, Process, Testbed
from tests.e2e.two_hosts import (
    METHODS,
    MIGRATION_S,
    Method,
    assert_sound,
    new_bed,
    run_resolve,
    small_setup,
    start_both,
    start_migration,
)

PHASES = {
    "preparing": "send",
    "precopy": "send",
    "stopping": "send",
    "finalizing": "send",
    "committing": "send",
    "starting-guest": "receive",
}
"""Phase: which of the two processes enters it."""
VICTIMS = (
    *("guest a", "device a", "gateway a", "send"),
    *("receive", "gateway b", "device b", "guest b"),
)


def deaths() -> Iterator[ParameterSet]:
    for p, phase in enumerate(PHASES):
        for v, victim in enumerate(VICTIMS):
            for m, method in enumerate(METHODS):
                sampled = v % len(PHASES) == p and m == v % len(METHODS)
                marks = () if sampled else pytest.mark.full
                yield pytest.param(method, phase, victim, marks=marks)


@pytest.mark.parametrize(("method", "phase", "victim"), [*deaths()], ids=str)
def test_i7_i8_killed(tmp_path: Path, method: Method, phase: str, victim: str) -> None:
    with new_bed(tmp_path, small_setup(method)) as bed:
        a, b = start_both(bed)
        hold = ("--break-at", phase)
        sender, receiver = start_migration(
            *(bed, a, b, method),
            *(hold if PHASES[phase] == "send" else ()),
            receive=hold if PHASES[phase] == "receive" else (),
        )
        holder = sender if PHASES[phase] == "send" else receiver
        holder.wait_stopped()
        processes = {"send": sender, "receive": receiver}
        for host in (a, b):
            processes |= {
                f"{kind} {host.name}": process
                for kind in ("guest", "device", "gateway")
                if (process := getattr(host, kind)) is not None
            }
        processes[victim].kill()
        holder.resume()
        codes = {
            process.name.split()[0]: process.wait(MIGRATION_S)
            for process in (sender, receiver)
            if process is not processes[victim]
        }
        assert Exit.INTERNAL not in codes.values(), (sender.tail(), receiver.tail())
        owner = settle(bed, a, b, victim, codes, sender, receiver)
        check(bed, owner, b if owner is a else a, victim)


def test_a_killed_send_leaves_no_files_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method()
    # Not below tmp_path: the path of a socket has to be short.
    with (
        TemporaryDirectory(prefix="ferry-") as folder,
        new_bed(tmp_path, small_setup(method)) as bed,
    ):
        monkeypatch.setenv("TMPDIR", folder)
        a, b = start_both(bed)
        sender, _ = start_migration(bed, a, b, method, "--break-at", "stopping")
        sender.wait_stopped()
        sender.kill()
        assert not [*Path(folder).iterdir()]


def settle(
    bed: Testbed,
    a: Host,
    b: Host,
    victim: str,
    codes: dict[str, int],
    sender: Process,
    receiver: Process,
) -> Host:
    """Who owns the guest in the end, as an operator would find out."""
    if codes.get("send") == Exit.OK or codes.get("receive") == Exit.OK:
        return b
    released = any(event.get("phase") == "committing" for event in sender.events)
    if not released:
        return a
    revive(bed, b, victim)
    settled = run_resolve(bed, b, "--role", "target")
    if settled["outcome"] == "committed":
        return b
    if codes.get("send") not in (Exit.PEER_ABORTED, Exit.DEVICE, Exit.VMM):
        revive(bed, a, victim)
        taken = run_resolve(bed, a, "--role", "source", "--verdict", settled["verdict"])
        assert taken["outcome"] == "owned"
    return a


def revive(bed: Testbed, host: Host, victim: str) -> None:
    """Starts a killed gateway or device again, as a service manager would."""
    if victim == f"gateway {host.name}" and host.gateway and not host.gateway.running:
        bed.start_gateway(host)
    if victim == f"device {host.name}" and host.device and not host.device.running:
        bed.start_device(host)


def check(bed: Testbed, owner: Host, other: Host, victim: str) -> None:
    """One owner, whose I/O goes on; unless the guest itself was killed, then nobody runs it."""
    if other.guest is not None and other.guest.running:
        assert bed.status(other) != "running"
    if victim == f"guest {owner.name}":
        return
    revive(bed, owner, victim)
    bed.wait_status(owner, "running")
    assert_sound(bed, owner)
