"""`vfio-ferry report`: the events of a migration as one page of HTML."""

from dataclasses import dataclass
from pathlib import Path

from ferry.config import option
from ferry.errors import ConfigError, Exit
from ferry.html_report import page, read_events


@dataclass(frozen=True, kw_only=True)
class Options:
    file: str = option("events that `send --json` has printed", positional=True)
    output: str | None = option("the page to write; by default FILE with .html at its end", None)


def run(options: Options) -> int:
    """Writes the page; returns the exit code."""
    out = Path(options.output) if options.output else Path(options.file).with_suffix(".html")
    events = read_events(options.file)
    try:
        text = page(events)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{options.file} has events of another form than `send --json` of this release: "
            f"{type(error).__name__} {error}"
        ) from error
    out.write_text(text, encoding="utf-8")
    print(out)
    return Exit.OK
