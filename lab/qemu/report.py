"""What the guest reports on its second serial line, as events. Sans-IO.

The guest writes lines `FERRY name key=value ...` (`lab/qemu/guest/`):

    boot      kernel              the first process runs
    ready                         the modules are loaded
    beat      n reads writes inflight           five times a second
    load      disk workers        the load of a disk begins; or
              net                 that of a NIC
    error     what detail         a checksum, a command or a module failed
    job       what disk passes    one job of the load has ended
    disk      longest_io_us       from issue to completion as the guest's kernel saw it
              depth               the most requests in flight at once, in the load's first seconds
              interrupts          msix or intx
    net       way sha     SHA-256 of what went one way: down (to the guest) or up
    express                       registers of a PCI Express device are changed; they are
                                  checked at the end
    dmesg     io_error reset hung warning interrupt network lines    lines of the log since `ready`
    end       errors              the last line

A guest that migrates writes the beginning of a line on the source and its end on the target:
one `ReportReader` is fed from both, in that order.
"""

import re
from dataclasses import dataclass, field

from lab.qemu.errors import GuestReportError

MAX_LINE_BYTES = 4096
"""The guest's lines have below 200 bytes."""
BELOW_ZERO = 1 << 63
"""The guest's kernel prints its 64-bit differences without a sign."""
DMESG_KINDS = ("io_error", "reset", "hung", "warning", "interrupt", "network")

_WORD = re.compile(r"[a-z_]+\Z")


@dataclass(frozen=True, slots=True)
class GuestEvent:
    """One line of the report."""

    name: str
    values: dict[str, str] = field(default_factory=dict)

    def number(self, key: str) -> int:
        """The value of `key`. Raises `GuestReportError` when it is not a whole number."""
        text = self.values.get(key, "")
        if not text.isdecimal():
            raise GuestReportError(f"the guest's {self.name!r} says {key}={text!r}, not a number")
        return int(text)


class ReportReader:
    """Bytes in, events out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[GuestEvent]:
        """The events that `data` completes. Raises `GuestReportError` for a malformed one."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if any(len(line) > MAX_LINE_BYTES for line in (*lines, self._rest)):
            raise GuestReportError("the guest's report has a line without an end")
        return [event for line in lines if (event := parse_line(line)) is not None]


def parse_line(line: bytes) -> GuestEvent | None:
    """The event in `line`; None for a line that is no report (firmware writes there, too)."""
    words = line.decode("ascii", errors="replace").split()
    if not words or words[0] != "FERRY":
        return None
    if len(words) < 2 or not _WORD.match(words[1]):
        raise GuestReportError(f"the guest reports nonsense: {line[:80]!r}")
    values = {}
    for word in words[2:]:
        key, equals, value = word.partition("=")
        if not equals or not _WORD.match(key):
            raise GuestReportError(f"the guest reports nonsense: {line[:80]!r}")
        values[key] = value
    return GuestEvent(words[1], values)


@dataclass(slots=True)
class GuestReport:
    """The sum of a guest's events."""

    loads: int = 0
    """How many have begun."""
    beats: int = 0
    reads: int = 0
    writes: int = 0
    queue_depth: int | None = None
    """The most requests in flight at once in the load's first seconds; None: not known."""
    longest_io_us: int | None = None
    """None: not told yet, or the guest's kernel cannot measure it: its trace clock may go back when
    an emulated processor moves, and then a request's time is below zero."""
    interrupts: str = ""
    """`msix` or `intx`, once the load has ended."""
    errors: list[str] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what the network carried, by direction, once the load has ended."""
    dmesg: dict[str, int] = field(default_factory=dict)
    stages: set[str] = field(default_factory=set)
    """The names of all events so far."""

    def add(self, event: GuestEvent) -> None:
        """Raises `GuestReportError` for a value that makes no sense."""
        self.stages.add(event.name)
        if event.name == "beat":
            self.beats = event.number("n")
            self.reads = event.number("reads")
            self.writes = event.number("writes")
        elif event.name == "load":
            self.loads += 1
        elif event.name == "error":
            self.errors.append(f"{event.values.get('what')} {event.values.get('detail')}")
        elif event.name == "job":
            what = event.values.get("what", "")
            self.passes[what] = self.passes.get(what, 0) + event.number("passes")
        elif event.name == "disk":
            self.interrupts = event.values.get("interrupts", "")
            longest = _known(event, "longest_io_us")
            self.longest_io_us = longest if longest is None or longest < BELOW_ZERO else None
            self.queue_depth = _known(event, "depth")
        elif event.name == "net":
            self.streams[event.values.get("way", "")] = event.values.get("sha", "")
        elif event.name == "dmesg":
            self.dmesg = {kind: event.number(kind) for kind in DMESG_KINDS}

    @property
    def ended(self) -> bool:
        """The guest has said its last."""
        return "end" in self.stages

    def complaints(self) -> list[str]:
        """Everything that a guest must not see; empty when it noticed nothing."""
        return self.errors + [f"dmesg: {kind}" for kind, lines in self.dmesg.items() if lines]


def _known(event: GuestEvent, key: str) -> int | None:
    return None if event.values.get(key) == "unknown" else event.number(key)
