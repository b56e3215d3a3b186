"""`vfio-ferry demo-qemu`: a stock Linux guest in a stock QEMU moves with its device, under load.

Owns the course of the demonstration and its verdict. The guest does direct I/O by several jobs at
once and writes files with fsync, everything checked against checksums; it is migrated by real
`send` and `receive` processes, goes on in a second QEMU, ends its load and checks its file system
and its kernel's log.
"""

from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from ferry.config import option, positive, size
from ferry.errors import Exit
from ferry.migration.report import Report
from ferry.progress import Reporter
from lab.demo import (
    FUNCTION,
    check_functions,
    device_flags,
    relay,
    report_of,
    verdict_on,
    working_folder,
)
from lab.qemu.environment import prepare
from lab.qemu.errors import GuestReportError
from lab.qemu.initramfs import cached_initramfs
from lab.qemu.machine import Guest
from lab.qemu.two_hosts import Case, Rig
from lab.testbed import Setup, Testbed

MIB = 1 << 20
LOAD_S = 600.0
"""Until the guest's load runs: an emulated processor boots within 10 s on an idle machine, and one
that an emulated processor emulates in minutes."""
RUN_S = 300.0
END_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Options:
    memory: int = option("the guest's RAM", 256 * MIB, parse=size)
    disk: int = option("size of its disk", 32 * MIB, parse=size)
    device: str = option(
        "what its disk is: virtio, or nvme, which moves by its queues whatever the two below say",
        "virtio",
        choices=("virtio", "nvme"),
    )
    function: tuple[str, ...] = FUNCTION
    registers: str = option("how register state moves", "replay", choices=("v2", "replay"))
    dirty: str = option(
        "how dirty pages are found", "logging", choices=("logging", "message", "scan")
    )
    irq: str = option("how the device interrupts", "msix", choices=("msix", "intx"))
    root_port: bool = option("the device is behind a PCIe root port", False)
    verify: str = option(
        "what is compared by digest before the commit: all pages, or those touched",
        "touched",
        choices=("touched", "all"),
    )
    writes: int = option(
        "requests of the guest before the migration and after", 200, parse=positive
    )
    downtime_limit: int = option("how long the guest may stand still, in ms", 300, parse=positive)
    cache: str | None = option("folder of the QEMU that is made where there is none", None)
    mirror: str | None = option("URI of the Debian archive that it is made from", None)
    folder: str | None = option(
        "keep sockets, logs and the disk here (default: a temporary one)", None
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    reporter = Reporter("demo-qemu", as_json=options.json)

    def say(text: str) -> None:
        reporter.event("message", text=text)

    cache = Path(options.cache).absolute() if options.cache else None
    environment = prepare(say, cache=cache, mirror=options.mirror)
    initramfs = cached_initramfs(environment, cache)
    check_functions(options.function)
    if options.device == "nvme":
        case = Case("v2", "queues", options.irq, options.root_port, loads=("nvme",))
        flag = "--bind" if options.function else "--queues"
        setup = Setup(gateway=(flag,), image_bytes=options.disk)
    else:
        case = Case(options.registers, options.dirty, options.irq, options.root_port)
        flags = tuple(device_flags(case.registers, case.dirty))
        setup = Setup(device=flags, image_bytes=options.disk)
    with working_folder(options.folder) as folder, Testbed(folder.absolute(), setup) as bed:
        rig = Rig(bed, environment, initramfs, case, options.memory)
        for host, function in zip(rig.hosts.values(), options.function, strict=False):
            host.function = function
        report = trio.run(_demonstrate, rig, options, reporter)
    return conclude(report, rig.guest, case, reporter)


async def _demonstrate(rig: Rig, options: Options, reporter: Reporter) -> Report:
    guest = rig.guest

    def say(text: str) -> None:
        reporter.event("message", text=text)

    async with AsyncExitStack() as stack:
        say("starting two hosts: device, gateway and QEMU on each")
        source = await rig.start(stack, "a", incoming=False)
        target = await rig.start(stack, "b", incoming=True)
        say("the guest boots on host a")
        with _within(LOAD_S, "start its load"):
            await guest.wait(source, lambda report: "load" in report.stages)
        with _within(RUN_S, f"write {options.writes} times"):
            await rig.wait_writes(source, options.writes)
        say(f"the guest's load runs on host a: {_io_text(guest)}")
        flags = ("--verify", options.verify, "--downtime-limit", str(options.downtime_limit))
        sender = await rig.migrate(source, "ab", *flags, on_event=relay(reporter))
        with _within(RUN_S, f"write {options.writes} times at host b"):
            await rig.wait_writes(target, options.writes)
        say("the guest has gone on at host b; it now ends its load and checks its file system")
        with _within(END_S, "end its load"):
            await rig.end(target)
    return report_of(sender)


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise GuestReportError(
            f"the guest does not {what} within {seconds:g} s; --folder keeps the logs of every "
            "process"
        ) from None


def conclude(report: Report, guest: Guest, case: Case, reporter: Reporter) -> Exit:
    """Reports the migration and what the guest noticed of it, which has to be nothing."""
    told = guest.report
    faults = {"complaints": told.complaints()}
    if told.interrupts != case.interrupts:
        faults["interrupts"] = [told.interrupts]
    sound, verdict = verdict_on(faults)
    passes = ", ".join(f"{count} of {what}" for what, count in sorted(told.passes.items()))
    text = (
        f"{report.text()}\n"
        f"guest: {_io_text(guest)}, checked passes: {passes or 'none'}, "
        f"longest I/O {_milliseconds(told.longest_io_us)}\n"
        f"{verdict}"
    )
    values = asdict(told) | {"stages": sorted(told.stages)}
    reporter.event("report", text=text, guest=values, sound=sound, **report.values())
    return Exit.OK if sound else Exit.VERIFICATION


def _io_text(guest: Guest) -> str:
    told = guest.report
    depth = "" if told.queue_depth is None else f", up to {told.queue_depth} at once"
    return f"{told.reads} reads, {told.writes} writes{depth}, {len(told.errors)} errors"


def _milliseconds(microseconds: int | None) -> str:
    return "unknown" if microseconds is None else f"{microseconds / 1e3:.0f} ms"
