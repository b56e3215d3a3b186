"""Which codec a lane uses for its next frame: the one with which most pages get through.

Owns the decision for one lane. Pure: it is told what was encoded and acknowledged and when, and
reads no clock. Codecs are in `codec`, encoding in `encoder`, the lane in `lanes`.

**The model.** A page of content (neither zero nor known to the receiver) costs `e` seconds to
encode and becomes `w` bytes; both are averages of frames that went that way. The link takes `l`
seconds for a byte. Encoding and sending overlap, so a page takes `max(e, w * l)`, except at the
end of a round, where it takes `e + w * l`. Whatever else holds frames up counts as the link: a
bandwidth limit, or a receiver that is slow to apply.

**What is seen of the link.** After each `EPOCH_FRAMES` frames: if the lane had to wait for it, `l`
is the time that passed by the bytes that were acknowledged. If it never had to, the link could do
more; how much more is unknown, so at first it is taken for boundless, and, once it was measured,
faster by `_HOPE` each time. A lighter codec is then tried soon, and shows.

**Codecs not seen yet**, or not lately, are tried with a single frame, the nearest first: stronger
ones when the lane waits for the link, lighter ones when it does not. What trials cost is bounded
by `_TRIAL_SHARE` of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from transport.codec import LZ4, NONE, Codec, Method

LADDER: Final = (NONE, LZ4, *(Codec(Method.ZSTD, level) for level in (1, 2, 3, 5, 7, 9)))
"""Each takes longer than the one in front of it, as a rule for fewer bytes."""

EPOCH_FRAMES: Final = 4
_MIN_PAGES: Final = 32  # of content in a frame, below which what every frame costs would count
_END_PAGES: Final = 512  # so near to the end of a round that nothing overlaps
_WEIGHT: Final = 0.25  # of the newest frame in an average
_WAITING_SHARE: Final = 0.15  # of the time
_GAIN: Final = 0.99  # what is not at least so much cheaper is no reason to change
_HOPE: Final = 0.75
_TRIAL_SHARE: Final = 0.02
_STALE_FRAMES: Final = 64


@dataclass(slots=True)
class _Seen:
    """What frames of one codec have cost, a page."""

    seconds: float
    n_bytes: float
    at: int
    """The lane's number of the newest."""


class Choice:
    """Chooses for one lane. Not thread-safe. Times are seconds of one steady clock."""

    def __init__(self, ladder: Sequence[Codec] = LADDER) -> None:
        """Start with LZ4, or with the only one there is. A ladder of one is no choice."""
        self._ladder = tuple(ladder)
        self._rung = min(1, len(self._ladder) - 1)
        self._used = self._rung
        self._trial: int | None = None
        self._trial_from = 0.0
        self._step = 0
        """Of trials: towards stronger codecs (1) or lighter ones (-1)."""
        self._seen: dict[int, _Seen] = {}
        self._link_s = 0.0  # a byte
        self._link_measured = False
        self._began = 0.0
        self._number = 0
        self._ended: float | None = None
        self._shortest_gap_s = float("inf")
        """Between two frames: what a lane has to do there without waiting for anybody."""
        self._start_epoch()

    @property
    def codec(self) -> Codec:
        """The one in use, apart from trials."""
        return self._ladder[self._rung]

    def pick(self, now: float, *, pages_left: int, frames_under_way: int) -> Codec:
        """The codec for the frame that is about to be encoded.

        `pages_left` of the round, this frame's included. Without frames under way the link was
        idle, so the time since the last frame says nothing about it.
        """
        if self._ended is not None and frames_under_way:
            gap = now - self._ended
            self._shortest_gap_s = min(self._shortest_gap_s, gap)
            self._elapsed_s += gap
            self._waited_s += gap - self._shortest_gap_s
        self._began = now
        if self._frames >= EPOCH_FRAMES:
            self._look(now)
        if pages_left <= _END_PAGES:
            self._used = self._cheapest(overlapping=False)
        else:
            self._used = self._rung if self._trial is None else self._trial
        return self._ladder[self._used]

    def encoded(self, now: float, *, pages: int, n_bytes: int) -> None:
        """The frame is ready: `pages` of content in `n_bytes`, 0 if there was nothing to send."""
        seconds = now - self._began
        self._ended = now
        self._frames += 1
        self._number += 1
        self._elapsed_s += seconds
        self._sent_bytes += n_bytes
        if pages >= _MIN_PAGES:
            self._content_pages += pages
            self._note(seconds / pages, n_bytes / pages)
            if self._used == self._trial:
                lost = seconds - pages * self._cost(self._rung)
                self._trial_from = now + max(0.0, lost) / _TRIAL_SHARE
                self._trial = None
                self._settle()
                self._plan_trial(now)

    def acknowledged(self, n_bytes: int) -> None:
        """The receiver has applied a frame."""
        self._acknowledged_bytes += n_bytes

    def _start_epoch(self) -> None:
        self._frames = 0
        self._elapsed_s = 0.0
        self._waited_s = 0.0
        self._sent_bytes = 0
        self._acknowledged_bytes = 0
        self._content_pages = 0

    def _note(self, seconds: float, n_bytes: float) -> None:
        seen = self._seen.get(self._used)
        if seen is None or self._number - seen.at > _STALE_FRAMES:
            self._seen[self._used] = _Seen(seconds, n_bytes, self._number)
            return
        seen.seconds += (seconds - seen.seconds) * _WEIGHT
        seen.n_bytes += (n_bytes - seen.n_bytes) * _WEIGHT
        seen.at = self._number

    def _look(self, now: float) -> None:
        """Learn from the epoch, unless it is too early, and begin the next."""
        waiting = self._waited_s > _WAITING_SHARE * self._elapsed_s
        if self._content_pages >= _MIN_PAGES * EPOCH_FRAMES:
            if not self._acknowledged_bytes:
                return
            per_byte = self._elapsed_s / self._acknowledged_bytes
            if waiting:
                self._link_s = per_byte
                self._link_measured = True
            elif 2 * self._acknowledged_bytes < self._sent_bytes:
                return  # the window is being filled
            elif self._link_measured:
                self._link_s = min(self._link_s, per_byte) * _HOPE
            self._settle()
            self._step = 1 if waiting else -1
            self._plan_trial(now)
        self._start_epoch()

    def _settle(self) -> None:
        best = self._cheapest(overlapping=True)
        if self._rung not in self._seen or self._cost(best) < _GAIN * self._cost(self._rung):
            self._rung = best

    def _plan_trial(self, now: float) -> None:
        """Try the nearest codec, in the direction of interest, of which too little is known."""
        if now < self._trial_from:
            return
        rung = self._rung + self._step
        while 0 <= rung < len(self._ladder):
            seen = self._seen.get(rung)
            if seen is None or self._number - seen.at > _STALE_FRAMES:
                self._trial = rung
                return
            if seen.seconds > self._cost(self._rung):
                return  # what is stronger takes even longer
            rung += self._step

    def _cheapest(self, *, overlapping: bool) -> int:
        """Of the codecs seen, or the present one if there are none."""
        costs = {rung: self._cost(rung, overlapping=overlapping) for rung in self._seen}
        return min(costs, key=costs.__getitem__, default=self._rung)

    def _cost(self, rung: int, *, overlapping: bool = True) -> float:
        """Seconds for a page."""
        seen = self._seen[rung]
        link_s = seen.n_bytes * self._link_s
        return max(seen.seconds, link_s) if overlapping else seen.seconds + link_s
