"""`vfio-ferry status`: what a running `send` is at."""

from dataclasses import dataclass
from typing import Any

from ferry.config import option
from ferry.errors import Exit
from ferry.migration.control import ask, settings_text
from ferry.progress import Reporter, parts_of


@dataclass(frozen=True, kw_only=True)
class Options:
    control_socket: str | None = option(
        "control socket of the `send` that is meant; by default of the only one that runs", None
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    """Asks the `send`; returns the exit code."""
    found = ask(options.control_socket, {"do": "status"})
    reporter = Reporter("status", as_json=options.json)
    reporter.event("status", text=_text(found), **found)
    return Exit.OK


def _text(v: dict[str, Any]) -> str:
    lines = [f"{v['phase']}: {v['detail']}" if v.get("detail") else str(v["phase"])]
    if v.get("progress"):
        lines += parts_of("", v["progress"])[1:]
    lines.append(settings_text(v["settings"]))
    return "\n".join(lines)
