"""`python -m lab.qemu prepare` makes the environment; `boot` runs one guest with its load.

`prepare` prints QEMU=, KERNEL= and INITRAMFS= for a shell to read, its progress goes to stderr;
`boot` prints what the guest reported. Nothing is migrated here.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import trio

from ferry.errors import FerryError
from lab.qemu.environment import Environment, prepare
from lab.qemu.initramfs import cached_initramfs
from lab.qemu.machine import Guest, MachineSpec, VfioUserDevice, running

FIRST_SLOT = 4
BOOT_DEADLINE_S = 120.0
END_DEADLINE_S = 120.0


def main() -> int:
    options = _parser().parse_args()
    try:
        environment = prepare(_tell_progress, cache=options.cache, mirror=options.mirror)
        initramfs = cached_initramfs(environment, options.cache)
        if options.command == "prepare":
            _say(f"QEMU={shlex.quote(str(environment.qemu.program))}")
            _say(f"KERNEL={shlex.quote(str(environment.kernel))}")
            _say(f"INITRAMFS={shlex.quote(str(initramfs))}")
            return 0
        return trio.run(_boot, environment, initramfs, options)
    except FerryError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)


async def _boot(environment: Environment, initramfs: Path, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="ferry-qemu-") as folder:
        spec = MachineSpec(
            folder=Path(folder),
            kernel=environment.kernel,
            initramfs=initramfs,
            command_line=options.append,
            devices=tuple(
                VfioUserDevice(path.absolute(), FIRST_SLOT + index, options.root_port)
                for index, path in enumerate(options.device)
            ),
        )
        guest = Guest()
        async with running(environment.qemu, spec) as machine:
            with trio.fail_after(BOOT_DEADLINE_S):
                await guest.wait(machine, lambda report: "ready" in report.stages)
            _say(f"the guest is up, its load runs for {options.seconds:g} s")
            with trio.move_on_after(options.seconds):
                await guest.wait(machine, lambda report: report.ended)
            if not guest.report.ended:
                await machine.send_line("stop")
            with trio.fail_after(END_DEADLINE_S):
                await guest.wait(machine, lambda report: report.ended)
    _say(str(guest.report))
    for complaint in guest.report.complaints():
        _say(f"complaint: {complaint}")
    return 1 if guest.report.complaints() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab.qemu", description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder of the environment")
    parser.add_argument("--mirror", help="URI of a Debian archive")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="make QEMU, kernel and initramfs")
    boot = commands.add_parser("boot", help="run a guest")
    boot.add_argument("--device", type=Path, action="append", default=[], metavar="SOCKET")
    boot.add_argument("--root-port", action="store_true", help="devices behind root ports")
    boot.add_argument("--append", default="ferry.workload=disk", help="kernel command line")
    boot.add_argument("--seconds", type=float, default=10.0, help="how long the load runs")
    return parser


def _tell_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
