"""`vfio-ferry report`: the events of a migration as one page of HTML."""

from dataclasses import dataclass
from pathlib import Path

from ferry.config import option
from ferry.errors import Exit
from ferry.html_report import page, read_events


@dataclass(frozen=True, kw_only=True)
class Options:
    file: str = option("events that `send --json` has printed", positional=True)
    output: str | None = option("the page to write; by default FILE with .html at its end", None)


def run(options: Options) -> int:
    """Writes the page; returns the exit code."""
    out = Path(options.output) if options.output else Path(options.file).with_suffix(".html")
    out.write_text(page(read_events(options.file)), encoding="utf-8")
    print(out)
    return Exit.OK
