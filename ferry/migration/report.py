"""What a migration cost and what was proven, for people and as one JSON object."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ferry.findings import methods_text
from ferry.migration.downtime import VMM_PHASES
from ferry.progress import bytes_text
from transport.sender import RoundStatistics

MANY_REPAIRS = 100
"""So many pages that differ at the end are no accident."""


def finite(value: float | None) -> float | None:
    """`value`, or None where it is infinite: JSON has no infinity."""
    return None if value is None or math.isinf(value) else value


def merged_rounds(rounds: Iterable[RoundStatistics]) -> RoundStatistics:
    """Rounds as one: their sums, with the number of the last."""
    first, *others = map(asdict, rounds)
    for other in others:
        first = {name: value + first[name] for name, value in other.items()} | {
            "round_no": other["round_no"]
        }
    return RoundStatistics(**first)


def round_values(
    round_: RoundStatistics,
    remaining_pages: int | None,
    interval_s: float,
    predicted_downtime_ms: float | None,
    vmm_remaining_bytes: int | None,
) -> dict[str, Any]:
    """A round as an event and as a row of the report. What was not known behind it is None:
    `remaining_pages`, dirtied in the `interval_s` since the round before ended, and the rest."""
    return {
        "round": round_.round_no,
        "dirty_pages": round_.pages,
        "sent_pages": round_.sent_pages,
        "zero": round_.zero,
        "same": round_.same,
        "delta": round_.delta,
        "copy": round_.copy,
        "lz4": round_.lz4,
        "raw": round_.raw,
        "wire_bytes": round_.wire_bytes,
        "duration_ms": round_.duration_ns / 1e6,
        "throughput_bytes_per_s": round_.wire_bytes / max(round_.duration_ns, 1) * 1e9,
        "remaining_pages": remaining_pages,
        "dirty_pages_per_s": None if remaining_pages is None else remaining_pages / interval_s,
        "predicted_downtime_ms": finite(predicted_downtime_ms),
        "vmm_remaining_bytes": vmm_remaining_bytes,
    }


def event_key(name: str) -> str:
    """`VMM stop` as events have it: `vmm_stop`. What is one already stays as it is."""
    return name.lower().replace(" ", "_")


_VMM_KEYS = frozenset(map(event_key, VMM_PHASES))


@dataclass
class Report:
    """Filled while a migration runs; `values()` is what `--json` prints at its end."""

    session: str
    methods: list[dict[str, str]] = field(default_factory=list)
    downtime_limit_ms: float = math.inf
    rounds: list[dict[str, Any]] = field(default_factory=list)
    downtime_ms: dict[str, float] = field(default_factory=dict)
    """By phase, in their order: `ferry.migration.downtime`."""
    downtime_total_ms: float = 0.0
    downtime_own_ms: float = 0.0
    downtime_vmm_ms: float = 0.0
    beside_vmm_ms: dict[str, float] = field(default_factory=dict)
    """Our own work while the VMM worked, too: in neither of the two."""
    registers: list[dict[str, Any]] = field(default_factory=list)
    verification: dict[str, Any] = field(default_factory=dict)
    wire_bytes: dict[str, int] = field(default_factory=dict)
    link: dict[str, int] = field(default_factory=dict)
    """How often it was `resumed`, the `messages` of its lanes, and how many of them were under way
    when it was lost, so that what was in them was sent again (`repeated_messages`)."""
    vmm_stream: dict[str, Any] = field(default_factory=dict)
    """How the VMM's own stream was carried: `ferry.migration.vmm_stream`."""
    duration_s: float = 0.0

    def values(self) -> dict[str, Any]:
        """The report as an event has it, with keys as they are everywhere: `VMM stop` is `vmm_stop`
        there."""
        named = {
            name: {event_key(key): value for key, value in getattr(self, name).items()}
            for name in ("downtime_ms", "beside_vmm_ms", "wire_bytes")
        }
        return dict(vars(self)) | named | {"downtime_over_limit": self.downtime_over_limit}

    @property
    def downtime_over_limit(self) -> bool:
        """Whether the guest stood still for longer than the user allows."""
        return self.downtime_total_ms > self.downtime_limit_ms

    @property
    def repairs_unexpected(self) -> bool:
        """Whether many pages differed at the end although the lanes have carried all of them: a
        VMM that carries pages itself brings old copies, which are repaired."""
        repaired: int = self.verification.get("repaired_pages", 0)
        return self.vmm_stream.get("form") == "open" and repaired >= MANY_REPAIRS

    def text(self) -> str:
        """The report as lines for a terminal."""
        lines = [f"migrated in {self.duration_s:.2f} s, session {self.session}"]
        for number, method in enumerate(self.methods):
            lines.append(f"device {number}: {methods_text(**method)}")
        lines.append(
            "round   dirty    sent    zero    same   delta    copy     lz4     raw "
            "       wire      rate"
        )
        for r in self.rounds:
            lines.append(
                f"{r['round']:>5} {r['dirty_pages']:>7} {r['sent_pages']:>7} {r['zero']:>7} "
                f"{r['same']:>7} {r['delta']:>7} {r['copy']:>7} {r['lz4']:>7} {r['raw']:>7} "
                f"{bytes_text(r['wire_bytes']):>11} "
                f"{bytes_text(r['throughput_bytes_per_s']):>8}/s"
            )
        if self.link.get("resumed"):
            lines.append(
                f"link made anew {self.link['resumed']} times; of {self.link['messages']} messages "
                f"what was in {self.link['repeated_messages']} was sent again"
            )
        lines += self._downtime_lines()
        for number, counts in enumerate(self.registers):
            told = "  ".join(
                f"{name.replace('_', ' ')} {value}"
                for name, value in counts.items()
                if isinstance(value, int)
            )
            lines.append(f"device {number} registers: {told}")
            for register, count in counts["divergences"].items():
                lines.append(f"  {register}: {count} reads returned another value than captured")
        if self.vmm_stream:
            lines.append(self._stream_line())
        wire = "  ".join(f"{name} {bytes_text(count)}" for name, count in self.wire_bytes.items())
        lines.append(f"on the wire: {wire}")
        v = self.verification
        lines.append(
            f"verified by digest: {v['checked_pages']} pages ({v['scope']}), "
            f"{v['repaired_pages']} repaired after the VMM had loaded its copy, 0 differ"
        )
        for region in v.get("regions", ()):
            lines.append(
                f"  region {region['iova']:#x} +{bytes_text(region['length'])}: equal, "
                f"xxh3 {region['digest']}"
            )
        return "\n".join(lines)

    def _stream_line(self) -> str:
        stream, total = self.vmm_stream, sum(self.wire_bytes.values())
        if stream["form"] != "open":
            return f"VMM's stream: {stream['form']} ({stream['why_closed']})"
        share = 100 * self.wire_bytes.get("pages", 0) / max(1, total)
        return (
            f"VMM's stream: open, {stream['pages']} pages announced, tail "
            f"{bytes_text(stream['tail_bytes'])}; {share:.1f} % of the bytes took the lanes"
        )

    def _downtime_lines(self) -> list[str]:
        def phases(of_vmm: bool) -> str:
            return _times(
                {n: m for n, m in self.downtime_ms.items() if (event_key(n) in _VMM_KEYS) == of_vmm}
            )

        return [
            f"downtime {self.downtime_total_ms:.1f} ms: the VMM's part "
            f"{self.downtime_vmm_ms:.1f} ms, vfio-ferry's {self.downtime_own_ms:.1f} ms",
            f"  VMM:        {phases(True)}",
            f"  vfio-ferry: {phases(False)}",
            f"  while the VMM worked, and not counted: {_times(self.beside_vmm_ms)}",
        ]


def _times(ms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.1f}" for name, value in ms.items())
