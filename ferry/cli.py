"""The command line: parses, calls the command's main, turns errors into exit codes.

Commands are imported when they are run: `gateway` and `device` start in a fraction of the time
that numba and the kernels of `send` and `receive` need.
"""

import dataclasses
import importlib
import importlib.metadata
import io
import os
import select
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ferry.collector import collector_off
from ferry.config import Parser, add_arguments, flag_of, load
from ferry.errors import Exit
from ferry.exit_codes import describe, exit_code_of
from ferry.progress import Reporter, complain, silence


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
    "status": Command("ferry.commands.status", "say what a running send is at"),
    "cancel": Command("ferry.commands.cancel", "have a running send give up, as Ctrl-C does"),
    "set": Command("ferry.commands.set", "change the limits of a running send"),
    "receive": Command("ferry.commands.receive", "take over a guest's devices on this host"),
    "replace": Command(
        "ferry.commands.replace", "change a running guest's device to another process of it"
    ),
    "secret": Command(
        "ferry.commands.secret", "make the secret, or the keys, by which hosts know each other"
    ),
    "resolve": Command("ferry.commands.resolve", "settle who owns a guest after a failed commit"),
    "report": Command("ferry.commands.report", "make a page of HTML from a migration's events"),
    "completion": Command("ferry.commands.completion", "print a shell's script for completions"),
    "man": Command("ferry.commands.man", "print the manual page"),
    "doctor": Command("ferry.commands.doctor", "say what of a migration this machine can do"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code. Never lets a traceback reach the user, unless
    `--debug` asks for it."""
    _open_what_is_closed()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        return _run_bench(arguments[1:])
    if arguments[:1] == ["--version"]:
        return _guarded("", _print_version, debug=False, as_json=False)
    wanted = arguments[0] if arguments else ""
    known = COMMANDS if wanted in COMMANDS else COMMANDS | _more_commands()

    def work() -> int:
        parsed = _parser(known, {wanted}).parse_args(arguments)
        if parsed.command == "exit-codes":
            return _print_exit_codes()
        module: Any = importlib.import_module(known[parsed.command].module)
        tables = {*known, *_more_names()} if parsed.config else ()
        return int(module.run(load(module.Options, parsed.command, parsed, tables)))

    name = wanted if wanted in known or wanted == "exit-codes" else ""
    return _guarded(name, work, debug="--debug" in arguments, as_json="--json" in arguments)


def whole_parser() -> Parser:
    """The parser of the whole command line, with the options of each command of the product."""
    return _parser(COMMANDS, set(COMMANDS))


def _print_version() -> int:
    from ferry.versions import format_versions, version_text

    print(version_text())
    for what, version in format_versions().items():
        print(f"  {version:>2}  {what}")
    return Exit.OK


def _parser(known: Mapping[str, Command], wanted: set[str]) -> Parser:
    """The parser of the command line, with the options of the commands that are `wanted`."""
    parser = Parser(
        prog="vfio-ferry",
        description="Moves the pass-through devices of a running virtual machine to another host.",
        epilog="Exit codes: see `vfio-ferry exit-codes`.",
    )
    parser.add_argument(
        "--version", action="store_true", help="print the version, and those of all formats"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("exit-codes", help="print every exit code and what it means")
    commands.add_parser("bench", help="measure: list, run, compare, plot")
    for name, command in known.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        if name in wanted:
            with collector_off():
                options = importlib.import_module(command.module).Options
            add_arguments(sub, options)
            sub.add_argument("--debug", action="store_true", help="print tracebacks")
            parser.flags = [flag_of(field) for field in dataclasses.fields(options)]
    return parser


def _more_names() -> list[str]:
    return [entry.name for entry in importlib.metadata.entry_points(group=MORE_COMMANDS)]


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path need not be text in any encoding.
        sys.stdout.reconfigure(errors="backslashreplace")


def _print_exit_codes() -> int:
    for code in Exit:
        print(f"{code.value:>3}  {code.name.lower():<14} {code.meaning}")
    return Exit.OK


def _run_bench(arguments: list[str]) -> int:
    """The harness has sub-commands of its own."""
    module: Any = importlib.import_module("perf.command")
    rest = [word for word in arguments if word != "--debug"]
    return _guarded("bench", lambda: module.main(rest), debug="--debug" in arguments, as_json=False)


def _guarded(name: str, work: Callable[[], int], *, debug: bool, as_json: bool) -> int:
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
        if as_json:
            Reporter(name, as_json=True).event(
                "error", message=describe(error), exit_code=int(code), exit_name=code.name.lower()
            )
        complain(f"{f'vfio-ferry {name}'.strip()}: {describe(error)}")
        if code is Exit.INTERNAL:
            complain("this is a defect; --debug prints where it happened")
        return code


def _output_is_taken() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
        return False
    # What could not be written is dropped, so that nothing is left that could fail again.
    poller = select.poll()
    try:
        poller.register(sys.stdout, 0)
    except io.UnsupportedOperation:
        return True  # a stream within this process
    return not poller.poll(0)


if __name__ == "__main__":
    sys.exit(main())
