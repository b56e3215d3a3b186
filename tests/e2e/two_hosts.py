"""What the end-to-end tests share: a small testbed, and how a failed migration is settled."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.errors import Exit
from ferry.html_report import page
from lab.demo import device_flags
from lab.testbed import Host, Process, Setup, Testbed

MIGRATION_S = 60.0
OPERATIONS = 200
PEER_TIMEOUT_S = 3
RESUME_WINDOW_S = 1
"""A peer that was killed is waited for so long, as a lost link is."""
WAIT_S = 15
GUEST = (
    *("--low-size", "16M", "--high-size", "32M", "--read-area", "16M", "--blocks", "512"),
    *("--queue-depth", "8", "--cpu-pages", "50", "--iops", "400"),
)
REGISTERS = ("v2", "replay")
DIRTY = ("logging", "message", "scan")


@dataclass(frozen=True)
class Method:
    """How register state and dirty pages move."""

    registers: str = "replay"
    dirty: str = "logging"

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--registers", self.registers, "--dirty", self.dirty)

    def __str__(self) -> str:
        return f"{self.registers}-{self.dirty}"


METHODS = [Method(registers, dirty) for registers in REGISTERS for dirty in DIRTY]


def small_setup(method: Method, *guest: str, device: tuple[str, ...] | None = None) -> Setup:
    """A guest of 48 MiB with a device that offers what `method` needs."""
    offered = tuple(device_flags(method.registers, method.dirty)) if device is None else device
    return Setup(device=offered, guest=(*GUEST, *guest), image_bytes=16 << 20)


def start_both(bed: Testbed) -> tuple[Host, Host]:
    """Host a with a guest under load, host b waiting for it."""
    a, b = bed.hosts["a"], bed.hosts["b"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: bed.start_host(host, incoming=host is b), (a, b)))
    bed.wait_operations(a, OPERATIONS)
    return a, b


def start_migration(
    bed: Testbed,
    source: Host,
    target: Host,
    method: Method,
    *send: str,
    receive: tuple[str, ...] = (),
) -> tuple[Process, Process]:
    """`send` and `receive`, started."""
    timeout = ("--peer-timeout", str(PEER_TIMEOUT_S), "--resume-window", str(RESUME_WINDOW_S))
    # A guest that hardly gets a processor has its time; one interrupt ends the look.
    watch = ("--watch-device", "10")
    receiver = bed.receive(target, *timeout, "--wait", str(WAIT_S), *watch, *receive)
    return bed.send(source, target, *method.flags, *timeout, *send), receiver


def assert_sound(bed: Testbed, owner: Host) -> dict[str, Any]:
    """The guest's I/O goes on, none of it ever failed, memory and disk check out."""
    bed.wait_operations(owner, OPERATIONS)
    report = bed.verify(owner)
    assert report["verification"]["state"] == "passed", report
    for counter in ("checksum_errors", "buffer_errors", "io_errors"):
        assert report[counter] == 0, report
    return report


def migrate(bed: Testbed, source: Host, target: Host, method: Method, *send: str) -> dict[str, Any]:
    """A migration that has to succeed; the sender's report."""
    sender, receiver = start_migration(bed, source, target, method, *send)
    assert sender.wait(MIGRATION_S) == Exit.OK, (sender.tail(), receiver.tail())
    assert receiver.wait(MIGRATION_S) == Exit.OK, (sender.tail(), receiver.tail())
    report, told = sender.wait_event("report"), sender.wait_event("success")
    assert "the VMM here" in told["text"]
    assert told["downtime_over_limit"] == (report["downtime_total_ms"] > told["downtime_limit_ms"])
    drawn = page([event for event in sender.events if event.get("role") == "send"])
    assert f"Migration {report['session']}" in drawn and "limit 300 ms" in drawn
    arrived = receiver.wait_event("success")
    assert arrived["session"] == report["session"]
    assert told["devices"] == arrived["devices"] == "works"
    assert arrived["pages"] >= report["rounds"][-1]["sent_pages"]
    return sender.wait_event("report")


def resolve(bed: Testbed, host: Host, *flags: object) -> Process:
    """`vfio-ferry resolve` on `host`, ended."""
    process = bed.start(
        f"resolve {host.name}",
        *("resolve", *host.control_flags, "--qmp", host.qmp_socket, "--json", *flags),
    )
    process.wait(MIGRATION_S)
    return process


def run_resolve(bed: Testbed, host: Host, *flags: object) -> dict[str, Any]:
    """What `vfio-ferry resolve` on `host` comes to: `outcome`, `session`, and the `verdict`."""
    process = resolve(bed, host, *flags)
    assert process.wait(MIGRATION_S) == Exit.OK, process.tail()
    return process.events[-1]


def resolve_both(bed: Testbed, source: Host, target: Host) -> Host:
    """The documented procedure, from the target to the source. Who has the guest then."""
    settled = run_resolve(bed, target, "--role", "target")
    told = ("--session", settled["session"], "--verdict", settled["verdict"])
    outcome = run_resolve(bed, source, "--role", "source", *told)["outcome"]
    if settled["outcome"] == "committed":
        assert outcome == "released"
        return target
    assert (settled["outcome"], outcome) == ("fenced", "owned")
    return source


def new_bed(folder: Path, setup: Setup) -> Testbed:
    """In a folder of its own: a second bed in one test would meet the sockets of the first."""
    return Testbed(folder / "bed", setup)
