"""`vfio-ferry set`: change the limits of a running `send`."""

from dataclasses import dataclass

from ferry.config import option
from ferry.errors import ConfigError, Exit
from ferry.migration.control import ask, settings_text
from ferry.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class Options:
    control_socket: str | None = option(
        "control socket of the `send` that is meant; by default of the only one that runs", None
    )
    bandwidth: str | None = option(
        "limit for everything that crosses, as send takes it, or none", None
    )
    downtime_limit: str | None = option("how long the guest may stand still, in ms", None)
    on_stall: str | None = option(
        "when the dirty set no longer shrinks", None, choices=("switch", "abort")
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    """Asks the `send`; returns the exit code."""
    wanted = {
        name: value
        for name in ("bandwidth", "downtime_limit", "on_stall")
        if (value := getattr(options, name)) is not None
    }
    if not wanted:
        raise ConfigError("nothing to set: give --bandwidth, --downtime-limit or --on-stall")
    found = ask(options.control_socket, {"do": "set", "settings": wanted})
    text = f"from now on: {settings_text(found)}"
    Reporter("set", as_json=options.json).event("message", text=text)
    return Exit.OK
