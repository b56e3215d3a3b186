"""`vfio-ferry man`: the manual page, from the same table of options as the command line."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ferry.errors import Exit
from ferry.versions import version_text


@dataclass(frozen=True, kw_only=True)
class Options:
    pass


def run(options: Options) -> int:
    """Prints the page; returns the exit code."""
    from ferry.cli import whole_parser

    print("\n".join(lines_of(whole_parser())))
    return Exit.OK


def lines_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The page in roff (man(7))."""
    yield f'.TH VFIO-FERRY 1 "" "{_plain(version_text().splitlines()[0])}"'
    yield ".ad l"
    yield ".SH NAME"
    yield r"vfio\-ferry \- " + _plain(str(parser.description)).rstrip(".")
    yield ".SH SYNOPSIS"
    yield r".B vfio\-ferry"
    yield r".I COMMAND"
    yield "[options]"
    yield ".SH COMMANDS"
    for name, sub in commands_of(parser).items():
        yield f".SS {_plain(name)}"
        yield _plain(str(sub.description or ""))
        for action in sub._actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
                continue
            yield ".TP"
            words = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            value = f" {action.metavar}" if action.option_strings and action.metavar else ""
            yield f".B {_plain(words + value)}"
            yield _plain((action.help or "").replace("%%", "%"))
    yield ".SH EXIT STATUS"
    for code in Exit:
        yield ".TP"
        yield f".B {code.value}"
        yield _plain(code.meaning)


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _plain(text: str) -> str:
    """Text that roff takes as it is."""
    text = re.sub(r"\s+", " ", text).replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text
