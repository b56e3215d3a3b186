"""What a migration would take, from a few seconds' look at the guest's memory: for a check.

Owns the look and the course that follows from it. Pages that are chosen at random are digested, and
digested again: how many differ says what the guest and its devices write, whoever writes it, and
nothing is asked of either. The rounds are then gone through as `sync.convergence` would have them,
once for the best and once for the worst of what was seen. Nobody's promise: a guest may do
something else in a minute.
"""

import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio

from ferry.findings import Finding, note, ok
from ferry.migration.precopy import ROUND_INTERVAL_S, limits_of
from ferry.migration.send_options import Options
from ferry.progress import bytes_text, seconds_text
from sync.convergence import FIXED_COST_MS, Convergence, Reason, Round, Verdict
from sync.memory import PAGE_BYTES, GuestMemory
from sync.registers.interface import NOTHING_LEFT, StateLeft
from transport.kernels.digests import digest_pages
from transport.kernels.files import new_files

LOOKS_S = (0.5, 2.0)
"""The intervals over which it is seen what was written: in a longer one the same is written again,
and how much decides whether the rounds converge."""
SAMPLE_PAGES = 8192
COMPRESSED_PAGES = 64
"""So many are compressed to see how small they get."""
WORST_RATE = 0.6
"""Of the link's measured rate: what is left of it while both hosts work."""
TOLD_MS = 10.0
"""Of what a device adds to the downtime; less is not told to people."""
_Z = 1.96
"""Of a normal distribution, for 95 %."""


@dataclass(frozen=True, slots=True)
class Written:
    """Of so many sampled pages, `differing` were written in `interval_s`."""

    interval_s: float
    differing: int


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the guest's memory has shown."""

    n_pages: int
    sampled: int
    zero: int
    """Of the sampled pages."""
    written: tuple[Written, ...]
    """By interval, ascending; all from the same moment on."""
    compressed: float
    """What is left of a page by a quick compression, as a part of it."""
    digest_ns_per_page: float

    def dirty_pages(self, interval_s: float, *, most: bool) -> float:
        """How many pages are written in `interval_s`, at least or at most: a power of the time
        through what was seen, for pages are written again."""
        first, last = (
            self.n_pages * _bound(each.differing, self.sampled, self.n_pages, most=most)
            for each in (self.written[0], self.written[-1])
        )
        if not first or not last:
            return last * min(1.0, interval_s / self.written[-1].interval_s)
        times = math.log(self.written[-1].interval_s / self.written[0].interval_s)
        exponent = min(1.0, max(0.0, math.log(last / first) / times))
        return min(
            self.n_pages, last * math.pow(interval_s / self.written[-1].interval_s, exponent)
        )


def _bound(hits: int, sampled: int, total: int, *, most: bool) -> float:
    """The least or the most of a part of which `hits` of `sampled` were seen (E. B. Wilson, 1927);
    what was seen, where the sample is all there is."""
    part = hits / sampled
    if sampled >= total:
        return part
    spread = _Z * math.sqrt(part * (1 - part) / sampled + _Z**2 / (4 * sampled**2))
    middle = part + _Z**2 / (2 * sampled)
    bound = (middle + spread if most else middle - spread) / (1 + _Z**2 / sampled)
    return min(1.0, max(0.0, bound))


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device adds to the downtime."""

    left: StateLeft | None = NOTHING_LEFT
    """State of its own; None if it does not tell how much."""
    showing_ms: float = 0.0
    """What it takes to show the target's guest memory."""

    def ms(self, bytes_per_s: float) -> float:
        """On a link of that rate; without a state that is not known."""
        length, ns_per_byte = self.left or NOTHING_LEFT
        return self.showing_ms + max(length * ns_per_byte / 1e6, length / bytes_per_s * 1e3)


@dataclass(frozen=True, slots=True)
class Course:
    """One way in which it may go."""

    rounds: int
    duration_s: float
    """Until the guest runs on the target."""
    memory_ms: float
    """The part of the downtime that is for memory."""
    devices_ms: tuple[float, ...]
    """Those of the devices."""
    verdict: Verdict
    reason: Reason

    @property
    def downtime_ms(self) -> float:
        return FIXED_COST_MS + self.memory_ms + sum(self.devices_ms)

    @property
    def converges(self) -> bool:
        """Whether what is left becomes as small as it has to."""
        return self.reason in (Reason.DOWNTIME, Reason.THRESHOLD)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a migration would take, between two courses."""

    look: Look
    best: Course
    worst: Course
    limit_ms: float
    devices: tuple[DeviceShare, ...]

    def values(self) -> dict[str, Any]:
        """As an event has it: ranges are [least, most]."""
        best, worst, look = self.best, self.worst, self.look
        rounds = sorted((best.rounds, worst.rounds))
        return {
            "rounds": rounds,
            "duration_s": [best.duration_s, worst.duration_s],
            "downtime_ms": [best.downtime_ms, worst.downtime_ms],
            "memory_downtime_ms": [best.memory_ms, worst.memory_ms],
            "downtime_limit_ms": self.limit_ms,
            "converges": [best.converges, worst.converges],
            "dirty_bytes_per_s": [
                look.dirty_pages(1.0, most=most) * PAGE_BYTES for most in (False, True)
            ],
            "memory_bytes": look.n_pages * PAGE_BYTES,
            "zero_bytes": int(look.zero / look.sampled * look.n_pages) * PAGE_BYTES,
        }

    def device_values(self, number: int) -> dict[str, Any]:
        """What an event has of one device; null where it is not known."""
        left = self.devices[number].left
        range_ms = [course.devices_ms[number] for course in (self.best, self.worst)]
        return {
            "state_bytes": None if left is None else left.bytes,
            "downtime_ms": None if left is None else range_ms,
        }

    def _device_text(self, number: int) -> str:
        values = self.device_values(number)
        if values["downtime_ms"] is None:
            return f"; without the state of device {number}, which does not tell how much it has"
        if values["downtime_ms"][1] < TOLD_MS:
            return ""
        return f"; {_range(values['downtime_ms'], '{:.0f}')} ms of it are device {number}'s own"

    def finding(self) -> Finding:
        """In words, with what to do where it may not come to an end as it should."""
        v = self.values()
        dirty = " to ".join(bytes_text(rate) for rate in v["dirty_bytes_per_s"])
        own = "".join(map(self._device_text, range(len(self.devices))))
        zero = v["zero_bytes"] / v["memory_bytes"]
        text = (
            f"{_range(v['rounds'], '{:.0f}')} rounds in "
            f"{_range(v['duration_s'], seconds_text)}, then a downtime of "
            f"{_range(v['downtime_ms'], '{:.0f}')} ms (limit {self.limit_ms:.0f} ms){own}; the "
            f"guest writes {dirty} in a second, {zero:.0%} of its memory is zero"
        )
        if not self.worst.converges:
            given_up = self.worst.verdict is Verdict.GIVE_UP
            does = "would be given up" if given_up else "takes longer then"
            may = f"what is left may not become small enough, and the migration {does}"
        elif self.worst.downtime_ms > self.limit_ms:
            may = "the guest may stand still for longer than the limit"
        else:
            return ok("forecast", text)
        return note(
            "forecast",
            f"{text}; {may}",
            "allow a longer --downtime-limit or more --bandwidth, use --on-stall throttle, or "
            "choose a calmer hour",
        )


def _range(ends: Sequence[float], form: Any) -> str:
    """Two ends in words, or one where both read the same."""
    least, most = (form(end) if callable(form) else form.format(end) for end in ends)
    return least if least == most else f"{least} to {most}"


async def look_at(memory: GuestMemory) -> Look:
    """Looks at the guest's memory for as long as the last of `LOOKS_S`. Reads nothing that nobody
    has touched."""
    files = new_files(memory.files, memory.n_pages)
    sampled = min(SAMPLE_PAGES, memory.n_pages)
    chosen = np.random.default_rng().choice(memory.n_pages, sampled, replace=False)
    pages = np.sort(chosen).astype(np.uint32)

    def digests() -> Any:
        return digest_pages(memory.array, pages, 0, files)

    before = await trio.to_thread.run_sync(digests)
    began, took_ns, written = trio.current_time(), math.inf, []
    for interval_s in LOOKS_S:
        await trio.sleep_until(began + interval_s)
        at = time.perf_counter_ns()
        seen_s = trio.current_time() - began
        now = await trio.to_thread.run_sync(digests)
        took_ns = min(took_ns, time.perf_counter_ns() - at)
        written.append(Written(seen_s, int((now != before).sum())))
    zero = digest_pages(np.zeros(PAGE_BYTES, np.uint8), np.zeros(1, np.uint32), 0)[0]
    rest = pages[before != zero][:: max(1, sampled // COMPRESSED_PAGES)]
    return Look(
        memory.n_pages,
        sampled,
        int((before == zero).sum()),
        tuple(written),
        _compressed(memory, rest),
        took_ns / sampled,
    )


def _compressed(memory: GuestMemory, pages: Any) -> float:
    """What a quick compression leaves of these pages, at most 1; 1 where there are none."""
    sizes = [
        min(1.0, len(zlib.compress(memory.array[at : at + PAGE_BYTES].tobytes(), 1)) / PAGE_BYTES)
        for at in (int(page) * PAGE_BYTES for page in pages)
    ]
    return sum(sizes) / len(sizes) if sizes else 1.0


def forecast(
    look: Look,
    bytes_per_s: float,
    options: Options,
    *,
    scans: bool,
    devices: Sequence[DeviceShare] = (),
) -> Forecast:
    """What follows from a look and from the rate of the link; `scans`: dirty pages are found by
    reading all of memory."""
    may_compress = options.codec not in ("none", "delta")
    ratio = look.compressed if may_compress else 1.0
    at_best = tuple(each.ms(bytes_per_s) for each in devices)
    at_worst = tuple(each.ms(bytes_per_s * WORST_RATE) for each in devices)
    best = _course(look, bytes_per_s, ratio, options, at_best, most=False, scans=scans)
    worst = _course(look, bytes_per_s * WORST_RATE, 1.0, options, at_worst, most=True, scans=scans)
    return Forecast(look, best, worst, options.downtime_limit, tuple(devices))


def _course(
    look: Look,
    bytes_per_s: float,
    ratio: float,
    options: Options,
    devices_ms: tuple[float, ...],
    *,
    most: bool,
    scans: bool,
) -> Course:
    convergence = Convergence(limits_of(options, sum(devices_ms)))
    page_bytes = PAGE_BYTES * ratio
    all_ns = look.digest_ns_per_page * look.n_pages / options.lanes
    collect_s = all_ns / 1e9 if scans else 0.0
    pages, wire_bytes = look.n_pages, (1 - look.zero / look.sampled) * look.n_pages * page_bytes
    elapsed_s, touched = 0.0, 0.0
    while True:
        sending_s = wire_bytes / bytes_per_s
        interval_s = max(sending_s, ROUND_INTERVAL_S) + collect_s
        left = look.dirty_pages(interval_s, most=most)
        touched = min(look.n_pages, touched + left)
        elapsed_s += interval_s
        proof_ns = all_ns if scans or options.verify == "all" else all_ns * touched / look.n_pages
        decision = convergence.observe(
            Round(
                sent_pages=pages,
                wire_bytes=int(wire_bytes),
                duration_ns=max(1, int(sending_s * 1e9)),
                interval_ns=int(interval_s * 1e9),
                dirty_pages=math.ceil(left),
                collect_ns=int(collect_s * 1e9),
                proof_ns=int(proof_ns),
            )
        )
        if decision.verdict in (Verdict.SWITCH, Verdict.GIVE_UP):
            # The last pages go as these do, not as fast as the zeros of the first round.
            last_s = left * page_bytes / bytes_per_s
            memory_ms = last_s * 1e3 + proof_ns / 1e6 + collect_s * 1e3
            standing_s = (FIXED_COST_MS + memory_ms + sum(devices_ms)) / 1e3
            return Course(
                convergence.rounds,
                elapsed_s + standing_s,
                memory_ms,
                devices_ms,
                decision.verdict,
                decision.reason,
            )
        pages, wire_bytes = math.ceil(left), left * page_bytes
