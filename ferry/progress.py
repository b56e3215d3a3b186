"""Events of a running command: JSON lines for programs, one readable line each for people.

An event is a name and flat values with the unit in the key. What it looks like on a terminal is
decided here and nowhere else. A `round` is for programs: people read `progress`, once a second, and
find all rounds in the report.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ferry.findings import Finding
from sync.gateway.log import SCHEMA


def bytes_text(value: float) -> str:
    """An amount of bytes in the largest unit that fits, such as `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _phase(v: dict[str, Any]) -> str:
    return f"{v['role']}: {v['phase']}" + (f" ({v['detail']})" if v.get("detail") else "")


def _progress(v: dict[str, Any]) -> str:
    if v["predicted_downtime_ms"] is None:
        downtime = "downtime not known yet"
    else:
        downtime = f"downtime would be {v['predicted_downtime_ms']:.0f} ms"
    return (
        f"round {v['round']} (VMM {v['vmm_round']})  "
        f"left {bytes_text(v['remaining_bytes'])} "
        f"(device {bytes_text(v['own_remaining_bytes'])}, "
        f"VMM {bytes_text(v['vmm_remaining_bytes'])})  "
        f"dirtying {bytes_text(v['dirty_bytes_per_s'])}/s "
        f"(device {bytes_text(v['own_dirty_bytes_per_s'])}/s, "
        f"VMM {bytes_text(v['vmm_dirty_bytes_per_s'])}/s)  "
        f"moving {bytes_text(v['throughput_bytes_per_s'])}/s  {downtime}"
    )


def _finding(v: dict[str, Any]) -> str:
    line = f"{v['level']:<8} {v['check']}: {v['text']}"
    return f"{line}\n{'':<8} -> {v['advice']}" if v["advice"] else line


def _generic(v: dict[str, Any]) -> str:
    return "  ".join(f"{key}={value}" for key, value in v.items())


_RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "phase": _phase,
    "progress": _progress,
    "round": lambda _: "",
    "listening": lambda v: f"{v['role']}: listening at {v['url']}",
    "message": lambda v: str(v["text"]),
    "codec": lambda v: str(v["text"]),
    "link": lambda v: str(v["text"]),
    "configuration": lambda v: str(v["text"]),
    "report": lambda v: str(v["text"]),
    "finding": _finding,
    "diagnosis": lambda v: str(v["text"]),
    "checked": lambda v: f"{v['role']}: a check by the sender: {v['outcome']}",
    "error": lambda v: f"error: {v['message']}",
}


def silence(stream: TextIO) -> None:
    """Has what is written to `stream` from now on, and what its buffer still has, go nowhere: else
    Python would try again when it ends, and end with an exit code of its own."""
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def complain(text: str) -> None:
    """Prints a line on standard error; if nobody takes that either, nothing happens."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


class Reporter:
    """Writes events to `stream`; `role` is part of every JSON line."""

    def __init__(self, role: str, *, as_json: bool, stream: TextIO | None = None) -> None:
        self._role = role
        self._json = as_json
        self._stream = stream or sys.stdout

    def _head(self, name: str) -> dict[str, Any]:
        return {"event": name, "schema": SCHEMA, "time": time.time(), "role": self._role}

    def finding(self, finding: Finding) -> None:
        self.event("finding", **asdict(finding))

    def event(self, name: str, /, **values: Any) -> None:
        """Writes one event. That nobody takes it (a reader that went away, a full disk) is no
        reason to stop a migration: it is said on standard error, once, and nothing is written any
        more."""
        if self._json:
            values.pop("text", None) if name == "report" else None
            line = json.dumps({**self._head(name), **values})
        else:
            line = _RENDER.get(name, _generic)({"role": self._role, **values})
            if not line:
                return
        try:
            # In one piece: the demo's processes are read by a thread each.
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except OSError as error:
            silence(self._stream)
            complain(f"vfio-ferry {self._role}: goes on without output: {error.strerror}")
