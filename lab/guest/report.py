"""What the guest says about its workload: `x-guest-report`, and the JSON lines on stdout."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lab.guest.errors import StreamError
from lab.guest.fields import U64, Fields

MAX_NOTES = 16
_MAX_NOTE = 300


@dataclass(slots=True)
class Counters:
    """Counted since the guest was booted, wherever it has been since. VM state."""

    operations: int = 0
    """Requests finished, of every kind."""
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    checksum_errors: int = 0
    """Reads that did not return what was written last."""
    buffer_checks: int = 0
    """How often a buffer that was read before was looked at again."""
    buffer_errors: int = 0
    """How often it had changed meanwhile: a page that the device wrote is stale."""
    io_errors: int = 0
    """Requests that the device failed."""
    interrupts: int = 0
    spurious_interrupts: int = 0
    """Interrupts for which nothing was in the used ring."""
    cpu_pages: int = 0
    """Pages that the CPU wrote on its own account."""
    device_reconnects: int = 0
    device_resets: int = 0
    """How often the driver had to initialise the device again."""
    migrations: int = 0
    """How often the guest has been loaded from a migration."""
    longest_latency_s: float = 0.0
    """Of a finished request, from submission to completion, pauses and migrations included."""
    notes: list[str] = field(default_factory=list)
    """The first errors, in words."""

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text[:_MAX_NOTE])

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> "Counters":
        """Raises `StreamError`."""
        counters = cls(longest_latency_s=fields.real("longest_latency_s"))
        for member in dataclasses.fields(cls):
            if member.type is int:
                setattr(counters, member.name, fields.number(member.name, U64))
        for note in fields.items("notes", MAX_NOTES):
            if not isinstance(note, str):
                raise StreamError("a note that is no text")
            counters.note(note)
        return counters


@dataclass(slots=True)
class Verification:
    """The latest verification of everything that the guest knows. VM state."""

    number: int = 0
    """0: there was none."""
    running: bool = False
    next_block: int = 0
    blocks: int = 0
    """Blocks of the disk that were read back."""
    buffers: int = 0
    """Buffers in RAM that were checked."""
    errors: int = 0

    @property
    def state(self) -> str:
        if not self.number:
            return "none"
        if self.running:
            return "running"
        return "failed" if self.errors else "passed"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> "Verification":
        """Raises `StreamError`."""
        return cls(
            fields.number("number", U64),
            fields.flag("running"),
            fields.number("next_block", U64),
            fields.number("blocks", U64),
            fields.number("buffers", U64),
            fields.number("errors", U64),
        )
