"""`vfio-ferry cancel`: have a running `send` give up, as Ctrl-C does."""

from dataclasses import dataclass

from ferry.config import option
from ferry.errors import Exit
from ferry.migration.control import ask
from ferry.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class Options:
    control_socket: str | None = option(
        "control socket of the `send` that is meant; by default of the only one that runs", None
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    """Asks the `send`; returns the exit code."""
    ask(options.control_socket, {"do": "cancel"})
    text = "asked to give up: before the commit the guest stays here, afterwards it goes on"
    Reporter("cancel", as_json=options.json).event("message", text=text)
    return Exit.OK
