"""`vfio-ferry doctor`: what of a migration this machine can do, one line for each thing looked at.

Owns what is looked at and the verdict; the looking is `ferry.doctor`'s. It changes nothing, and a
guest or a migration that runs is not disturbed by it.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from ferry.config import endpoint, option, socket_path
from ferry.doctor.functions import function_findings
from ferry.doctor.gateway import Wish, gateway_findings
from ferry.doctor.host import host_findings
from ferry.doctor.qemu import qemu_findings
from ferry.doctor.vmm import vmm_findings
from ferry.errors import Exit
from ferry.findings import Finding, Level
from ferry.progress import Reporter
from sync.registers.find import load_profiles


@dataclass(frozen=True, kw_only=True)
class Options:
    gateway: tuple[str, ...] = option(
        "control socket of a device's gateway, to be examined", (), parse=socket_path, repeat=True
    )
    qmp: str | None = option("QMP socket of a running VMM, to be examined", None, parse=socket_path)
    qemu: str | None = option("a QEMU program (default: the one in $PATH)", None)
    listen: tuple[str, ...] = option(
        "an endpoint that `receive` shall bind", (), parse=endpoint, repeat=True
    )
    registers: Literal["auto", "v2", "replay"] = option(
        "predict for this option of `send`", "auto", choices=("auto", "v2", "replay")
    )
    dirty: Literal["auto", "logging", "queues", "message", "scan"] = option(
        "predict for this option of `send`",
        "auto",
        choices=("auto", "logging", "queues", "message", "scan"),
    )
    profile: tuple[str, ...] = option(
        "a device profile, or a folder of them, beside the built-in ones", (), repeat=True
    )
    json: bool = option("print findings as JSON lines", False)


def run(options: Options) -> int:
    """Prints the findings; the exit code says whether there is a problem among them."""
    return trio.run(_main, options)


async def _main(options: Options) -> Exit:
    reporter = Reporter("doctor", as_json=options.json)
    problems = 0
    async for finding in _findings(options):
        reporter.finding(finding)
        problems += finding.level is Level.PROBLEM
    if problems:
        text = f"{problems} problem{'s' * (problems > 1)} in the way of a migration"
    else:
        text = "nothing found that stands in the way of a migration"
    reporter.event("diagnosis", problems=problems, text=text)
    return Exit.NOT_READY if problems else Exit.OK


async def _findings(options: Options) -> AsyncIterator[Finding]:
    async for finding in host_findings(options.listen):
        yield finding
    profiles = load_profiles([Path(item) for item in options.profile])
    for finding in function_findings(profiles):
        yield finding
    async for finding in qemu_findings(options.qemu):
        yield finding
    if options.qmp is not None:
        async for finding in vmm_findings(options.qmp, len(options.gateway)):
            yield finding
    wish = Wish(options.registers, options.dirty, profiles)
    for path in options.gateway:
        async for finding in gateway_findings(path, wish):
            yield finding
