"""`vfio-ferry demo`: the main job on this machine, with every process real.

A small guest does checksummed I/O on real content, is migrated while it runs, goes on at the
target, and reads back everything that it ever wrote. `lab.qemu.demo` does the same with QEMU.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.config import natural, option, positive, size
from ferry.errors import Exit, LocalError
from ferry.migration.report import Report
from ferry.progress import Reporter, bytes_text
from lab.testbed import Process, Setup, Start, Testbed, start_command

MIGRATION_S = 240.0
WORK_S = 150.0
MIB = 1 << 20
FAULTS = (
    *("checksum_errors", "buffer_errors", "io_errors", "access_errors"),
    *("device_resets", "device_reconnects"),
)
"""Counters of the guest that are zero if the migration went unnoticed."""
FUNCTION: tuple[str, ...] = option(
    "in place of device processes: the function of this machine that serves the disk at host a, "
    "then that of host b; what is on the disk is overwritten",
    (),
    repeat=True,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    memory: int = option("the guest's RAM", 128 * MIB, parse=size)
    disk: int = option("size of its disk", 64 * MIB, parse=size)
    device: str = option(
        "what its disk is: virtio, or nvme, which moves by its queues, as functions do, whatever "
        "the two below say",
        "virtio",
        choices=("virtio", "nvme"),
    )
    function: tuple[str, ...] = FUNCTION
    registers: str = option("how register state moves", "replay", choices=("v2", "replay"))
    dirty: str = option(
        "how dirty pages are found", "logging", choices=("logging", "message", "scan")
    )
    irq: str = option("how the device interrupts", "msix", choices=("msix", "intx"))
    queue_depth: int = option("requests that the guest keeps in flight", 16, parse=positive)
    iops: int = option(
        "requests of the guest a second; 0: as many as its device takes", 0, parse=natural
    )
    operations: int = option(
        "requests of the guest before the migration and after", 3000, parse=positive
    )
    downtime_limit: int = option("how long the guest may stand still, in ms", 300, parse=positive)
    folder: str | None = option(
        "keep sockets, logs and the disk here (default: a temporary one)", None
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options, start: Start = start_command) -> int:
    reporter = Reporter("demo", as_json=options.json)
    check_functions(options.function)
    with working_folder(options.folder) as folder:
        nvme = options.device == "nvme"
        disk = "nvme" if nvme else "virtio-blk"
        high = options.memory - 32 * MIB
        setup = Setup(
            device=()
            if nvme or options.function
            else tuple(device_flags(options.registers, options.dirty)),
            gateway=("--bind",) if options.function else ("--queues",) if nvme else (),
            guest=(
                *("--high-size", str(high), "--read-area", str(high * 2 // 3), "--disk", disk),
                *("--queue-depth", str(options.queue_depth), "--irq", options.irq),
                *("--iops", str(options.iops)),
            ),
            disk=disk,
            image_bytes=options.disk,
            start=start,
        )
        with Testbed(folder, setup) as bed:
            for host, function in zip(bed.hosts.values(), options.function, strict=False):
                host.function = function
            return _demonstrate(bed, options, reporter)


def check_functions(functions: tuple[str, ...]) -> None:
    """Raises `LocalError` unless each host has one, or none has."""
    if len(functions) not in (0, 2):
        raise LocalError("name two functions, one for each host")


def device_flags(registers: str, dirty: str) -> list[str]:
    """What a device has to offer so that these two methods can be used."""
    return ["--v2"] * (registers == "v2") + ["--logging", "4096"] * (dirty == "logging")


@contextlib.contextmanager
def working_folder(wanted: str | None) -> Iterator[Path]:
    """The folder `wanted`, which has to be new or empty; without one, a temporary folder."""
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="vfio-ferry-demo-") as folder:
            yield Path(folder)
        return
    path = Path(wanted)
    if path.exists() and any(path.iterdir()):
        raise LocalError(f"{path} is not empty: name a new folder")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    yield path


def relay(reporter: Reporter) -> Callable[[dict[str, Any]], None]:
    """What repeats the events of `send` and `receive`, but for their report."""

    def tell(event: dict[str, Any]) -> None:
        values = {key: value for key, value in event.items() if key not in ("event", "time")}
        if event["event"] not in ("report", "text"):
            reporter.event(event["event"], **values)

    return tell


def report_of(send: Process) -> Report:
    """The report at the end of a migration that succeeded."""
    values = send.wait_event("report")
    return Report(**{key: values[key] for key in vars(Report(session=""))})


def verdict_on(faults: dict[str, Any]) -> tuple[bool, str]:
    """Whether there are none, and that in words. `faults`: what must be zero, false or empty."""
    found = {name: value for name, value in faults.items() if value}
    return not found, f"SOMETHING WAS LOST: {found}" if found else "nothing was lost"


def _demonstrate(bed: Testbed, options: Options, reporter: Reporter) -> Exit:
    tell = relay(reporter)

    def say(text: str) -> None:
        reporter.event("message", text=text)

    say("starting two hosts: device, gateway and guest on each")
    a, b = bed.hosts["a"], bed.hosts["b"]
    with ThreadPoolExecutor() as pool:
        for started in (
            pool.submit(bed.start_host, a, incoming=False),
            pool.submit(bed.start_host, b, incoming=True),
        ):
            started.result()
        receives = pool.submit(bed.receive, b, on_event=tell)
        before = bed.wait_operations(a, options.operations, WORK_S)
        receive = receives.result()
    say(f"the guest runs on host a: {_io_text(before)}")
    flags = ["--verify", "all"]
    if options.device != "nvme" and not options.function:
        flags += ["--registers", options.registers, "--dirty", options.dirty]
    flags += ["--downtime-limit", str(options.downtime_limit)]
    send = bed.send(a, b, *flags, on_event=tell)
    codes = send.wait(MIGRATION_S), receive.wait(MIGRATION_S)
    if any(codes):
        say("the migration failed; --folder keeps the logs of every process")
        for process in (send, receive):
            say(f"{process.name}: {process.tail()}")
        return Exit(codes[0] or codes[1])
    bed.wait_operations(b, options.operations, WORK_S)
    say("the guest has gone on at host b; it now reads back all that it ever wrote")
    after = bed.verify(b, WORK_S)
    return _conclude(send, after, reporter)


def _conclude(send: Process, guest: dict[str, Any], reporter: Reporter) -> Exit:
    report = report_of(send)
    unread = guest["verification"]["state"] != "passed"
    sound, verdict = verdict_on({name: guest[name] for name in FAULTS} | {"verification": unread})
    text = (
        f"{report.text()}\n"
        f"guest: {_io_text(guest)}, longest I/O {guest['longest_latency_s'] * 1e3:.0f} ms, "
        f"all blocks read back: {guest['verification']['state']}\n"
        f"{verdict}"
    )
    reporter.event("report", text=text, guest=guest, sound=sound, **report.values())
    return Exit.OK if sound else Exit.VERIFICATION


def _io_text(report: dict[str, Any]) -> str:
    return (
        f"{report['operations']} requests, {bytes_text(report['read_bytes'])} read, "
        f"{bytes_text(report['written_bytes'])} written, "
        f"{report['checksum_errors']} checksum errors, {report['io_errors']} I/O errors"
    )
