"""When to stop copying and switch over: the policy of the pre-copy rounds.

Owns the decision, and the prediction of the downtime that it rests on. It is fed with what each
round did; it copies nothing, knows no clock and no link.

The guest stands still while the dirty bitmap is read for the last time, the last dirty pages cross
the link, the VMM's own remainder does the same, all pages that were ever touched are compared, and
everything happens whose cost does not depend on the amount (`Limits.fixed_cost_ms`):

    predicted downtime = reading the dirty bitmap
                         + dirty pages / sent pages per second
                         + VMM's remaining bytes / wire bytes per second
                         + comparing the touched pages
                         + the devices' own state, by link or devices, whichever is slower
                         + fixed cost

This is the rule of pre-copy migration (C. Clark et al., Live Migration of Virtual Machines,
NSDI 2005, sections 3.1 and 5.3), with their third stop condition, "not getting better", as the
stall.
"""

import math
from collections import deque
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Literal

from sync.memory import PAGE_BYTES

_RATE_ROUNDS = 3
"""Rates are means over this many rounds: enough to even out a slow one, few enough to follow a
link that changes."""
_IMPROVEMENT = 0.95
"""Less left than this part of the least so far is progress; anything else is noise."""


THROTTLED_ROUNDS = 8
"""So many rounds more a stall takes once the guest is throttled: it is slowed down step by step."""


FIXED_COST_MS = 50.0


class Verdict(Enum):
    """What to do after a round."""

    CONTINUE = "continue"
    SWITCH = "switch"
    GIVE_UP = "give-up"
    THROTTLE = "throttle"
    """Have the guest write less. Comes once."""


class Reason(Enum):
    """Why a verdict is what it is."""

    COPYING = "copying"
    """What is left does not fit yet, and it is getting less."""
    DOWNTIME = "downtime"
    """What is left fits into the downtime limit."""
    THRESHOLD = "threshold"
    """No more pages are left than the threshold."""
    STALL = "stall"
    """What is left does not get less any more."""
    ROUNDS = "rounds"
    """The last round that was allowed is over."""
    TIMEOUT = "timeout"
    """The time that was allowed is over."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user allows. Raises `ValueError` for a value that has no sense."""

    downtime_ms: float = 300.0
    threshold_pages: int | None = None
    """Switch at this many dirty pages or fewer, whatever downtime is predicted."""
    max_rounds: int = 30
    timeout_s: float | None = None
    """Bound on the sum of the rounds' intervals."""
    on_stall: Literal["switch", "abort", "throttle"] = "switch"
    """What to do when the limits cannot be met: switch at the best moment, give up, or throttle the
    guest at the first stall, and switch if that does not help."""
    fixed_cost_ms: float = FIXED_COST_MS
    """Estimate of the part of the downtime that does not depend on what is left."""
    stall_rounds: int = 3
    """So many rounds without a new minimum of what is left are a stall."""

    def __post_init__(self) -> None:
        for name in ("downtime_ms", "max_rounds", "timeout_s", "stall_rounds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} has to be a positive number, not {value}")
        for name in ("threshold_pages", "fixed_cost_ms"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} has to be zero or more, not {value}")
        if self.on_stall not in ("switch", "abort", "throttle"):
            raise ValueError(
                f"on_stall has to be 'switch', 'abort' or 'throttle', not {self.on_stall!r}"
            )


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did."""

    sent_pages: int
    """Pages that were dirty when the round began, and that the target has now."""
    wire_bytes: int
    duration_ns: int
    """From reading the dirty bitmap to the target's last acknowledgement."""
    interval_ns: int
    """From reading the dirty bitmap to reading it again."""
    dirty_pages: int
    """Pages dirtied in the interval: what is left to send."""
    vmm_remaining_bytes: int = 0
    """What the VMM says that it still has to send by itself."""
    collect_ns: int = 0
    """What reading the dirty bitmap took: nothing much, unless all of memory is read for it."""
    proof_ns: int = 0
    """What it would take to compare the pages that were touched up to now."""
    state_bytes: int = 0
    """What the devices hold of their own and give only once they are at rest."""
    state_ns: int = 0
    """What moving that takes on a link that does not count."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"a round cannot have negative {field.name}")


@dataclass(frozen=True, slots=True)
class Rates:
    """Means over the last rounds, for the prediction and for whoever watches."""

    wire_bytes_per_s: float = 0.0
    sent_pages_per_s: float = 0.0
    dirty_pages_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do after a round, and why."""

    verdict: Verdict
    reason: Reason
    predicted_downtime_ms: float
    """For switching now; infinite while no page has been sent by which to measure."""
    message: str
    """One line for whoever watches."""


class Convergence:
    """The policy for one migration. `observe` each round, in order, and do what it says."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._recent: deque[Round] = deque(maxlen=_RATE_ROUNDS)
        self._elapsed_ns = 0
        self._peak_bytes_per_s = 0.0
        self._least_bytes = math.inf
        self._progress_bytes = math.inf
        self._rounds_without_progress = 0
        self._may_throttle = limits.on_stall == "throttle"
        self.rounds = 0
        self.rates = Rates()

    def heed(self, downtime_ms: float, on_stall: Literal["switch", "abort", "throttle"]) -> None:
        """The user has changed their mind about these limits."""
        self._limits = replace(self._limits, downtime_ms=downtime_ms, on_stall=on_stall)

    def observe(self, latest: Round) -> Decision:
        """Judge the situation behind `latest`."""
        self.rounds += 1
        self._elapsed_ns += latest.interval_ns
        self._recent.append(latest)
        self.rates = self._measure()
        self._peak_bytes_per_s = max(self._peak_bytes_per_s, self.rates.wire_bytes_per_s)
        verdict, reason = self._judge(latest)
        predicted_ms = self._predict(latest)
        message = (
            f"{latest.dirty_pages} pages left, downtime of {predicted_ms:.0f} ms predicted: "
            f"{verdict.value} ({reason.value})"
        )
        return Decision(verdict, reason, predicted_ms, message)

    def _measure(self) -> Rates:
        sending_s = sum(each.duration_ns for each in self._recent) / 1e9
        passed_s = sum(each.interval_ns for each in self._recent) / 1e9
        if not sending_s or not passed_s:
            return Rates()
        return Rates(
            wire_bytes_per_s=sum(each.wire_bytes for each in self._recent) / sending_s,
            sent_pages_per_s=sum(each.sent_pages for each in self._recent) / sending_s,
            dirty_pages_per_s=sum(each.dirty_pages for each in self._recent) / passed_s,
        )

    def _predict(self, latest: Round) -> float:
        # The VMM's bytes are divided by the best rate seen: a round of zero pages says how fast
        # pages go, but not what the link can carry.
        seconds = _duration(latest.dirty_pages, self.rates.sent_pages_per_s) + _duration(
            latest.vmm_remaining_bytes, self._peak_bytes_per_s
        )
        reading_ns = latest.collect_ns + latest.proof_ns
        return seconds * 1e3 + reading_ns / 1e6 + self.state_ms + self._limits.fixed_cost_ms

    @property
    def state_ms(self) -> float:
        """What of the predicted downtime the devices' own state takes."""
        latest = self._recent[-1]
        rate = self._peak_bytes_per_s
        # Nothing may have crossed yet: then what the device takes is all that is known.
        link_s = latest.state_bytes / rate if rate else 0.0
        return max(latest.state_ns / 1e6, link_s * 1e3)

    def _judge(self, latest: Round) -> tuple[Verdict, Reason]:
        limits = self._limits
        left_bytes = latest.dirty_pages * PAGE_BYTES + latest.vmm_remaining_bytes
        best_moment = left_bytes <= self._least_bytes
        self._least_bytes = min(self._least_bytes, left_bytes)
        if left_bytes < self._progress_bytes * _IMPROVEMENT:
            self._progress_bytes = left_bytes
            self._rounds_without_progress = 0
        else:
            self._rounds_without_progress += 1

        if self._predict(latest) <= limits.downtime_ms:
            return Verdict.SWITCH, Reason.DOWNTIME
        if limits.threshold_pages is not None and latest.dirty_pages <= limits.threshold_pages:
            return Verdict.SWITCH, Reason.THRESHOLD
        give_up = limits.on_stall == "abort"
        if limits.timeout_s is not None and self._elapsed_ns >= limits.timeout_s * 1e9:
            return Verdict.GIVE_UP if give_up else Verdict.SWITCH, Reason.TIMEOUT
        if self.rounds >= limits.max_rounds:
            return Verdict.GIVE_UP if give_up else Verdict.SWITCH, Reason.ROUNDS
        if self._rounds_without_progress >= limits.stall_rounds:
            if give_up:
                return Verdict.GIVE_UP, Reason.STALL
            if self._may_throttle:
                self._may_throttle = False
                self._rounds_without_progress = -THROTTLED_ROUNDS
                return Verdict.THROTTLE, Reason.STALL
            return Verdict.SWITCH if best_moment else Verdict.CONTINUE, Reason.STALL
        return Verdict.CONTINUE, Reason.COPYING


def _duration(amount: float, per_second: float) -> float:
    if not amount:
        return 0.0
    return amount / per_second if per_second else math.inf
