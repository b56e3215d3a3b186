"""The choice of a codec where nothing overlaps: in rounds so short that they are a frame or two.

What counts there is the time from the start of encoding to the answer. It is measured for each
codec as it is used, and what disturbs makes an answer late, never early, so the better of the
newest two counts. A codec that was not used yet is taken for as good as it can be: more bytes take
no longer than fewer, but none go faster than the link, and that is no slower than any answer. So it
is tried where it may be the best, and shows; if it is not, it is tried again after one answer to
another codec, then after four times as many each time, `_LONGEST_PAUSE` at most. Deltas are tried
for two rounds in a row: the first makes the bases of the second. If they save nothing all the same,
their answer says as much about pages as they are, which take less encoding.

Pure, and for one lane; `choice` says which rounds are short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from transport.sending.page_costs import DELTA_COSTS, GAIN, PRICE, PageCosts

_MIN_PAGES: Final = 128  # of content in a frame: else what passing between threads costs counts
_DELTA_ROUNDS: Final = 2
_PAUSE_GROWTH: Final = 4
_LONGEST_PAUSE: Final = 32  # how many answers late it may be found that something got better


@dataclass(slots=True)
class _Answered:
    """Of frames of one codec that were alone under way, from encoded to answered, a page."""

    newest_s: float
    seconds: float
    """The shorter of the newest two."""
    at: int
    """The number of the newest answer."""
    pause: int = 1
    """Answers to other codecs until this one is tried again."""


class ShortRounds:
    """See the module. Not thread-safe; a link's speed is said in seconds a byte."""

    def __init__(self, costs: PageCosts, delta: int) -> None:
        """The codecs are numbered as in `costs`, the first as pages are; `delta` is the one of
        deltas, 0: there is none."""
        self._costs = costs
        self._delta = delta
        self._answered: dict[int, _Answered] = {}
        self._answers = 0
        self._delta_rounds = 0
        """In which deltas are tried, this one included."""

    def begin(self, link_s: float) -> None:
        """A short round begins."""
        if not self._delta:
            return
        if self._delta_rounds:
            self._delta_rounds -= 1
            if self._delta_rounds:
                # What the one before has cost says nothing: it had no bases.
                self._costs.forget(self._delta)
        elif self._is_due(self._delta) and self._may_go_raw(link_s):
            self._delta_rounds = _DELTA_ROUNDS

    def pick(self, link_s: float) -> int:
        """The number of the codec for the next frame."""
        if self._delta_rounds:
            return self._delta
        best, best_s = 0, self._cost_alone(0, link_s)
        for rung, seconds in enumerate(self._costs.seconds()):
            # Most are out of the question by their encoding alone, and the round waits for this.
            if rung and (1 + PRICE) * seconds < best_s:
                cost_s = self._cost_alone(rung, link_s)
                if cost_s < best_s:
                    best, best_s = rung, cost_s
        return best

    def answered(self, rung: int, pages: int, took_s: float) -> None:
        """A frame of `pages` of content that was alone under way, of a round of any length."""
        if pages < _MIN_PAGES or self._delta_rounds == _DELTA_ROUNDS:
            return
        seconds = took_s / pages
        self._answers += 1
        before = self._answered.get(rung)
        if before is None:
            self._answered[rung] = _Answered(seconds, seconds, self._answers)
            return
        before.seconds = min(seconds, before.newest_s)
        before.newest_s = seconds
        before.at = self._answers
        if self._cost_answered(rung) > min(map(self._cost_answered, self._answered)):
            before.pause = min(_LONGEST_PAUSE, before.pause * _PAUSE_GROWTH)
        else:
            before.pause = 1

    def _may_go_raw(self, link_s: float) -> bool:
        """Whether a round of deltas that have no bases would not cost much."""
        best_s = self._cost_alone(self.pick(link_s), link_s)
        return self._cost_alone(0, link_s) <= DELTA_COSTS * best_s

    def _is_due(self, rung: int) -> bool:
        """Whether the codec is to be tried, or tried again."""
        answered = self._answered.get(rung)
        return answered is None or self._answers - answered.at >= answered.pause

    def _cost_alone(self, rung: int, link_s: float) -> float:
        """Seconds for a page from the start of encoding to the answer, and the price of encoding;
        of a codec that is to be tried at the best."""
        if self._is_due(rung) and rung != self._delta:
            return self._cost_encoding(rung) + self._least_answer_s(rung, link_s)
        return self._cost_answered(rung)

    def _cost_answered(self, rung: int) -> float:
        if rung not in self._answered:
            return math.inf
        answered = self._answered[rung]
        seconds = answered.seconds
        if not rung and self._deltas_went_raw():
            deltas = self._answered[self._delta]
            if deltas.at > answered.at:
                seconds = min(deltas.newest_s, answered.newest_s)
        return self._cost_encoding(rung) + seconds

    def _deltas_went_raw(self) -> bool:
        """Whether the newest had as many bytes as pages as they are."""
        if self._delta not in self._answered or not self._costs.was_used(self._delta):
            return False
        return self._costs.estimate(self._delta)[1] >= GAIN * self._costs.estimate(0)[1]

    def _cost_encoding(self, rung: int) -> float:
        return (1 + PRICE) * self._costs.estimate(rung)[0]

    def _least_answer_s(self, rung: int, link_s: float) -> float:
        """How soon a page may be answered at the best: more bytes take no longer than fewer, fewer
        take less in proportion, and none go faster than the link."""
        n_bytes = self._costs.estimate(rung)[1]
        known = [
            (each.seconds, self._costs.estimate(other)[1])
            for other, each in self._answered.items()
            if other != rung
        ]
        fastest_s = min((seconds / there for seconds, there in known), default=link_s)
        least_s = min(
            (seconds * min(1.0, n_bytes / there) for seconds, there in known), default=0.0
        )
        return max(least_s, n_bytes * min(fastest_s, link_s))
