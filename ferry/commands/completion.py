"""`vfio-ferry completion`: a script by which a shell completes commands and options."""

from dataclasses import dataclass

from ferry.config import option
from ferry.errors import Exit, LocalError


@dataclass(frozen=True, kw_only=True)
class Options:
    shell: str = option("the shell", positional=True, choices=("bash", "zsh", "tcsh"))


def run(options: Options) -> int:
    """Prints the script; returns the exit code."""
    from ferry.cli import whole_parser

    try:
        import shtab
    except ImportError:
        raise LocalError("shtab is missing: install it, or vfio-ferry[shell]") from None
    print(shtab.complete(whole_parser(), options.shell))
    return Exit.OK
