"""The command line: parses, calls the command's main, turns errors into exit codes.

Commands are imported when they are run: `gateway` and `device` start in a fraction of the time
that numba and the kernels of `send` and `receive` need.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ferry.collector import collector_off
from ferry.config import add_arguments, load
from ferry.errors import Exit
from ferry.exit_codes import describe, exit_code_of
from ferry.progress import complain, silence


@dataclass(frozen=True)
class Command:
    """`module` has a dataclass `Options` and a function `run(options) -> int`."""

    module: str
    help: str


MORE_COMMANDS = "vfio_ferry.commands"
"""The entry point group of commands that are not the product's: such an entry names an object with
the attributes of a `Command`."""

COMMANDS = {
    "gateway": Command("ferry.commands.gateway", "stand between a VMM and its device"),
    "send": Command("ferry.commands.send", "migrate a running guest's devices from this host"),
    "receive": Command("ferry.commands.receive", "take over a guest's devices on this host"),
    "secret": Command(
        "ferry.commands.secret", "make the secret by which two hosts know each other"
    ),
    "resolve": Command("ferry.commands.resolve", "settle who owns a guest after a failed commit"),
    "doctor": Command("ferry.commands.doctor", "say what of a migration this machine can do"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code. Never lets a traceback reach the user, unless
    `--debug` asks for it."""
    _open_what_is_closed()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        return _run_bench(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="vfio-ferry",
        description="Moves the pass-through devices of a running virtual machine to another host.",
        epilog="Exit codes: see `vfio-ferry exit-codes`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("exit-codes", help="print every exit code and what it means")
    commands.add_parser("bench", help="measure: list, run, compare, plot")
    wanted = arguments[0] if arguments else ""
    known = COMMANDS if wanted in COMMANDS else COMMANDS | _more_commands()
    for name, command in known.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        if name == wanted:
            with collector_off():
                module = importlib.import_module(command.module)
            add_arguments(sub, module.Options)
            sub.add_argument("--debug", action="store_true", help="print tracebacks")
    parsed = parser.parse_args(arguments)
    if parsed.command == "exit-codes":
        return _guarded("exit-codes", _print_exit_codes, debug=False)
    return _run(known[parsed.command], parsed)


def _more_commands() -> dict[str, Command]:
    """What other packages have, by name."""
    found = importlib.metadata.entry_points(group=MORE_COMMANDS)
    return {entry.name: entry.load() for entry in found}


def _open_what_is_closed() -> None:
    """Python has no stream where its starter has closed the descriptor, and the next file or socket
    that is opened would take its place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _print_exit_codes() -> int:
    for code in Exit:
        print(f"{code.value:>3}  {code.name.lower():<14} {code.meaning}")
    return Exit.OK


def _run_bench(arguments: list[str]) -> int:
    """The harness has sub-commands of its own."""
    module: Any = importlib.import_module("perf.command")
    rest = [word for word in arguments if word != "--debug"]
    return _guarded("bench", lambda: module.main(rest), debug="--debug" in arguments)


def _run(command: Command, parsed: argparse.Namespace) -> int:
    module: Any = importlib.import_module(command.module)
    name = parsed.command
    return _guarded(
        name, lambda: module.run(load(module.Options, name, parsed)), debug=parsed.debug
    )


def _guarded(name: str, work: Callable[[], int], *, debug: bool) -> int:
    try:
        code = int(work())
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if not _output_is_taken() and isinstance(error, BrokenPipeError):
            return Exit.LOCAL  # without a word: whoever read, as `head` does, has had enough
        code = exit_code_of(error)
        complain(f"vfio-ferry {name}: {describe(error)}")
        if code is Exit.INTERNAL:
            complain("this is a defect; --debug prints where it happened")
        return code


def _output_is_taken() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
