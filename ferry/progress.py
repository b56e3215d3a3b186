"""Events of a running command: JSON lines for programs, one readable line each for people.

An event is a name and flat values with the unit in the key. What it looks like to a person is
decided here: on a terminal `progress` is one line that is redrawn, elsewhere each is a line with
the time in front. A `round` is for programs: people find all rounds in the report.
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
from ferry.progress_line import ProgressLine
from sync.gateway.log import SCHEMA


def bytes_text(value: float) -> str:
    """An amount of bytes in the largest unit that fits, such as `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def seconds_text(value: float) -> str:
    """A time in whole seconds, minutes or hours, such as `5 s`, `2 min` or `1 h 05 min`."""
    if value < 120:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def time_to_go_s(
    remaining_bytes: float, bytes_per_s: float, dirty_bytes_per_s: float
) -> tuple[float | None, float | None]:
    """The least and the most seconds that what is left will take: if nothing were written any more,
    and if as much is written as now. None where it would never end."""

    def at(rate: float) -> float | None:
        return remaining_bytes / rate if rate > 0 else None

    return at(bytes_per_s), at(bytes_per_s - dirty_bytes_per_s)


def to_go_text(least_s: float | None, most_s: float | None) -> str:
    """A range of `time_to_go_s` in words."""
    if least_s is None:
        return "no end in sight"
    least = seconds_text(least_s)
    if most_s is None:
        return f"{least} or more to go"
    most = seconds_text(most_s)
    return f"{least} to go" if least == most else f"{least} to {most} to go"


def parts_of(phase: str, v: dict[str, Any]) -> list[str]:
    """What is to be said of an event `progress`, the most important things first."""
    left = f"{bytes_text(v['remaining_bytes'])} left"
    if v.get("total_bytes"):
        left += f" of {bytes_text(v['total_bytes'])}"
    limit = f" of {v['downtime_limit_ms']:.0f}" if v.get("downtime_limit_ms") else ""
    predicted = v["predicted_downtime_ms"]
    told = "not known yet" if predicted is None else f"{predicted:.0f}{limit} ms"
    dirty, own, vmm = (bytes_text(v[f"{of}dirty_bytes_per_s"]) for of in ("", "own_", "vmm_"))
    to_go = time_to_go_s(v["remaining_bytes"], v["throughput_bytes_per_s"], v["dirty_bytes_per_s"])
    lost_s = v.get("link_lost_s")
    return [
        phase,
        *([f"NO LINK for {seconds_text(lost_s)}"] if lost_s else []),
        left,
        f"{bytes_text(v['throughput_bytes_per_s'])}/s",
        to_go_text(*to_go),
        f"downtime {told}",
        f"dirtying {dirty}/s (devices {own}/s, VMM {vmm}/s)",
        f"left of devices {bytes_text(v['own_remaining_bytes'])}, of the VMM "
        f"{bytes_text(v['vmm_remaining_bytes'])}",
        f"round {v['round']} (VMM {v['vmm_round']})",
    ]


def _phase(v: dict[str, Any]) -> str:
    return f"{v['role']}: {v['phase']}" + (f" ({v['detail']})" if v.get("detail") else "")


def _progress(v: dict[str, Any]) -> str:
    return "  ".join(parts_of("progress:", v))


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
    "link": lambda v: str(v["text"]),
    "report": lambda v: str(v["text"]),
    "finding": _finding,
    "forecast": lambda _: "",
    "diagnosis": lambda v: str(v["text"]),
    "checked": lambda v: f"{v['role']}: a check by the sender: {v['outcome']}",
    "status": lambda v: str(v["text"]),
    "replaced": lambda v: str(v["text"]),
    "success": lambda v: f"{v['role']}: {v['text']}",
    "refused": lambda v: f"{v['role']}: refused a sender, and goes on listening: {v['reason']}",
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
        self._timed = role in ("send", "receive") and not self._stream.isatty()
        self._phase = role
        self._line: ProgressLine | None = None
        self.last: dict[str, dict[str, Any]] = {}
        """The newest event of each name."""
        self._observers: list[Callable[[str, dict[str, Any]], None]] = []

    def _head(self, name: str) -> dict[str, Any]:
        return {"event": name, "schema": SCHEMA, "time": time.time(), "role": self._role}

    def observe(self, take: Callable[[str, dict[str, Any]], None]) -> None:
        """Has `take` called with the name and the values of each event."""
        self._observers.append(take)

    def finding(self, finding: Finding) -> None:
        self.event("finding", **asdict(finding))

    def event(self, name: str, /, **values: Any) -> None:
        """Writes one event. That nobody takes it (a reader that went away, a full disk) is no
        reason to stop a migration: it is said on standard error, once, and nothing is written any
        more."""
        self.last[name] = values
        for take in self._observers:
            take(name, values)
        try:
            if self._json:
                values.pop("text", None) if name == "report" else None
                self._write(json.dumps({**self._head(name), **values}))
            else:
                self._tell(name, {"role": self._role, **values})
        except OSError as error:
            silence(self._stream)
            self._line = None
            complain(f"vfio-ferry {self._role}: goes on without output: {error.strerror}")

    def _tell(self, name: str, values: dict[str, Any]) -> None:
        if name == "phase":
            self._phase = str(values["phase"])
            if self._line is not None:
                self._line.clear()
        if name == "progress" and self._stream.isatty():
            self._line = self._line or ProgressLine(self._stream)
            self._line.show(parts_of(self._phase, values))
            return
        text = _RENDER.get(name, _generic)(values)
        if not text:
            return
        if self._line is not None:
            self._line.print_above(text)
        else:
            self._write(f"{time.strftime('%H:%M:%S')} {text}" if self._timed else text)

    def _write(self, line: str) -> None:
        # In one piece: the demo's processes are read by a thread each.
        self._stream.write(f"{line}\n")
        self._stream.flush()
