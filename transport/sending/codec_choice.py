"""Which codec a lane uses for its next frame: the one with which most pages get through.

Owns the decision for one lane. Pure: it is told what was encoded and acknowledged and when, and
reads no clock. Codecs are in `codec`, encoding in `encoder`, the lane in `lanes`.

**The model.** A page of content (neither zero nor known to the receiver) costs `e` seconds to
encode and becomes `w` bytes; both are averages of frames that went that way. The link takes `l`
seconds for a byte. Encoding and sending overlap, so a page takes `max(e, w * l)`; to that a part of
`e` is added, for a core that encodes is taken from guests, from libzmq, or from a receiver on the
same machine. Whatever else holds frames up counts as the link: a bandwidth limit, or a receiver
that is slow to apply. Of a codec that was not used lately, `e` and `w` follow from those of one
that was, by their usual proportions (`page_costs`).

**The start.** A few pages are sent as they are, then more of them, twice, and the answer to each
frame is waited for: how much longer the larger one takes tells `l`, roughly, before much has been
put on a slow link. If the lane does not have to wait in the first epochs, an answer was late for
another reason, and nothing is known of the link.

**What is seen of the link.** After each epoch, which lasts from one answer to another: if the lane
had to wait for the link, `l` is the time that passed by the bytes that were acknowledged. If it
never had to, the link could do more; how much more is unknown, so it is taken for faster, by more
each time. A lighter codec is then used at some time, and shows.

**Single frames** are tried now and then of what the proportions cannot tell: of deltas, which are
worth it only if pages have bases, after the first round and where no stronger codec than the next
is in use; and of the next stronger codec, where the lane waits anyway.

**Doubt.** On a machine that both ends share, or that has no core to spare, a codec that takes more
time takes it from whatever the lane waits for, and the model is wrong. So every change has to prove
itself: if fewer pages get through than before, it is taken back, and that codec and those beyond it
are tried again after `_FIRST_PAUSE_S`, then after four times as long each time, until it has been
in use for `_PROVEN_S`. A codec that is left sooner, for a stronger one, was wrong as well. Levels
of one compressor differ by less than what pages hold, so they are compared by the bytes that get
through and the proportions of their lengths. And where the lane waits, the next lighter level is
tried now and then although the model says that it is worse, and kept if it is not: what is waited
for may be a receiver, which gets less of a core the more the sender takes.

**Rounds after the first** send what was written meanwhile, and that is likely to be written once
more. So their pages are kept as bases even where nothing is compressed. Short rounds have a choice
of their own (`short_rounds`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from transport.sending.page_costs import DELTA_COSTS, GAIN, LADDER, PRICE, PageCosts
from transport.sending.short_rounds import ShortRounds
from transport.wire.codec import DELTA, Codec, Method

_RAW_TRIAL_PAGES: Final = 128  # 8 ms at 1 Gbit/s that two lanes share
_PACKED_TRIAL_PAGES: Final = 32  # some 60 pages, of 20 us where no core is free

EPOCH_FRAMES: Final = 8  # twice a window's, so that how answers fall does not decide
EPOCH_S: Final = 0.02  # shorter ones say more about the scheduler than about the link
PROBES_PAGES: Final = (32, 128, 512)  # 11, 43 and 170 ms at 100 Mbit/s
_PROBE_S: Final = 0.01  # an answer that came sooner may have been held up by a scheduler
_EARLY_PROBE_S: Final = 0.04  # or, before the last probe, by another lane that has begun
_RAW_S: Final = (1e-6, 2e-6)  # to copy and digest a page: what is beyond is the scheduler's
_FAST_S: Final = 24e-6  # a page: 1.4 Gbit/s at least, so there is no need to know more
_PROBE_GAIN: Final = 1.5  # nothing overlaps in a probe, so the link is faster than it seems
_MIN_PAGES: Final = 16  # of content in a frame: half of a probe, whose room zeros take, too
_SHORT_PAGES: Final = 1024  # of a round, so few that hardly anything overlaps
_WAITING_SHARE: Final = 0.15  # of the time
_WORSE: Final = 1.2  # pages of one region compress better than those of another
_LEVEL_WORSE: Final = 1.04  # what the bytes tell, whose number on a link does not depend on that
_DOUBTS: Final = 2  # one may be due to a sender that was held up
_HOPE: Final = 0.97  # then its square, and so on
_FIRST_PAUSE_S: Final = 0.1
_PAUSE_GROWTH: Final = 4
_LONGEST_PAUSE_S: Final = 4.0
_PROVEN_S: Final = 1.0  # a codec in use for so long was no mistake


@dataclass(frozen=True, slots=True)
class _UnderWay:
    rung: int
    began: float
    encoded: float
    pages: int
    n_bytes: int
    alone: bool


@dataclass(frozen=True, slots=True)
class _Trial:
    """What was in use before the codec that has to prove itself."""

    rung: int
    pace_s: float
    """Seconds a page."""
    per_byte_s: float
    """Seconds a byte that was acknowledged."""
    doubted: bool = False
    """Whether the new one has to be better, since the model says that it is not."""


@dataclass(slots=True)
class _Pause:
    """Of changes to a codec that was wrong, and to those beyond it."""

    until: float = 0.0
    next_s: float = _FIRST_PAUSE_S

    def begin(self, now: float) -> None:
        """It was wrong."""
        self.until = now + self.next_s
        self.next_s = min(_LONGEST_PAUSE_S, self.next_s * _PAUSE_GROWTH)


class Choice:
    """Chooses for one lane. Not thread-safe. Times are seconds of one steady clock."""

    def __init__(self, ladder: Sequence[Codec] = LADDER) -> None:
        """A ladder of one is no choice; more must be of `LADDER`, and begin with `NONE`."""
        self._ladder = tuple(ladder)
        self._costs = PageCosts(self._ladder)
        self._probes = deque(PROBES_PAGES if len(self._ladder) > 1 else ())
        self._probed: _UnderWay | None = None
        self._probed_s = 0.0
        """The probe before, and how long its answer took."""
        self._delta = self._ladder.index(DELTA) if DELTA in self._ladder else 0
        self._rung = 0
        self._used = 0
        self._alone = True
        self._short_rounds = ShortRounds(self._costs, self._delta)
        self._under_way: deque[_UnderWay] = deque()
        self._link_s = 0.0  # a byte
        self._last_per_byte = 0.0
        """In the last epoch in which the lane waited."""
        self._link_measured = False
        self._doubts = 0
        """Epochs in which the lane never had to wait for a link of which only probes have told."""
        self._hope = _HOPE
        self._waiting = False
        """Whether the lane had to, in the last epoch."""
        self._began = 0.0
        self._answered_at = 0.0
        """When the newest answer came: an epoch lasts from one to another."""
        self._ended: float | None = None
        self._shortest_gap_s = math.inf
        """Between two frames: what a lane has to do there without waiting for anybody."""
        self._short = False
        """Whether the round is."""
        self._unsettled = 1
        """Answers until an epoch begins: to the frames before a change, or to a round's first."""
        self._trial: _Trial | None = None
        self._taken_back = False
        """Whether the codec in use is again what it was, which may be as wrong."""
        self._pauses = [_Pause() for _ in self._ladder]
        self._since = 0.0
        """When the codec in use was taken."""
        self._start_epoch()

    @property
    def codec(self) -> Codec:
        """The one in use, apart from short rounds."""
        return self._ladder[self._rung]

    @property
    def probe_pages(self) -> int:
        """How many pages the next frame may hold beside those of zeros, 0: as many as fit. If not
        0, it is not to be made before everything is answered."""
        return self._probes[0] if self._probes else 0

    @property
    def frame_pages(self) -> int:
        """How many pages the frame that was picked may hold beside those of zeros, 0: as many as
        fit. Few go as they are where that may turn out to be wrong, for long, and few are
        compressed where none are: either takes many times as long if it was wrong."""
        raw, raw_in_use = self._used <= self._delta, self._rung <= self._delta
        in_doubt = self._trial is not None or self._taken_back
        if not self._short and raw_in_use and not raw:
            return _PACKED_TRIAL_PAGES
        if not self._short and raw and (in_doubt or not raw_in_use):
            return _RAW_TRIAL_PAGES
        return self.probe_pages

    def pick(self, now: float, *, begins: int, frames_under_way: int, again: bool = False) -> Codec:
        """The codec for the frame that is about to be encoded.

        `begins`: the pages of the round that begins with this frame, 0 if none does; `again`: it is
        not the first round. Without frames under way the link was idle, so the time since the last
        frame says nothing about it.
        """
        if begins:
            self._begin_round(begins)
        if self._ended is not None and frames_under_way:
            gap = now - self._ended
            self._shortest_gap_s = min(self._shortest_gap_s, gap)
            self._elapsed_s += gap
            self._waited_s += gap - self._shortest_gap_s
        self._began = now
        self._alone = not frames_under_way
        if not self._probes and len(self._ladder) > 1:
            long = self._frames >= EPOCH_FRAMES and self._elapsed_s >= EPOCH_S
            if long and not self._unsettled:
                self._look(now)
            if self._short:
                self._used = self._short_rounds.pick(self._link_s)
            else:
                self._used = self._in_long_round(again)
        return self._ladder[self._used]

    def encoded(self, now: float, *, pages: int, n_bytes: int) -> None:
        """The frame is ready: `pages` of content in `n_bytes`, 0 if there was nothing to send."""
        seconds = now - self._began
        self._ended = now
        self._frames += 1
        self._costs.count_frame()
        self._elapsed_s += seconds
        self._sent_bytes += n_bytes
        if pages >= _MIN_PAGES:
            self._content_pages += pages
            self._costs.note(self._used, seconds / pages, n_bytes / pages)
        if n_bytes:
            frame = _UnderWay(self._used, self._began, now, pages, n_bytes, self._alone)
            self._under_way.append(frame)

    def acknowledged(self, now: float) -> None:
        """The receiver has applied the oldest frame that is under way."""
        frame = self._under_way.popleft()
        self._answered_at = now
        if self._unsettled:
            self._unsettled -= 1
            self._start_epoch()
        else:
            self._acknowledged_bytes += frame.n_bytes
            self._acknowledged_pages += frame.pages
        if not frame.alone or frame.pages < _MIN_PAGES or len(self._ladder) == 1:
            return
        took_s = now - frame.encoded
        if self._probes:
            self._judge_probe(took_s, frame)
        else:
            self._short_rounds.answered(frame.rung, frame.pages, took_s)

    def _begin_round(self, pages: int) -> None:
        # The link stood idle, and its window has to be filled.
        self._unsettled = max(1, len(self._under_way))
        self._short = pages <= _SHORT_PAGES
        if self._short and not self._probes:
            self._short_rounds.begin(self._link_s)

    # the start

    def _judge_probe(self, took_s: float, frame: _UnderWay) -> None:
        """By how much longer it took than the one before: so what each frame costs drops out."""
        self._probes.popleft()
        before, before_s = self._probed, self._probed_s
        self._probed, self._probed_s = frame, took_s
        if before is None or frame.pages <= before.pages:
            return
        more_pages = frame.pages - before.pages
        more_s = frame.encoded - frame.began - (before.encoded - before.began)
        n_bytes = frame.n_bytes / frame.pages
        if took_s < _FAST_S * frame.pages:
            self._probes.clear()
        raw_s = min(max(more_s / more_pages, _RAW_S[0]), _RAW_S[1])
        self._costs.replace(0, raw_s, n_bytes)
        self._link_s = max(0.0, took_s - before_s) / (more_pages * n_bytes)
        best = min(range(len(self._ladder)), key=self._cost)
        least_s = _EARLY_PROBE_S if self._probes else _PROBE_S
        if took_s >= least_s and self._cost(0) > _PROBE_GAIN * self._cost(best):
            self._probes.clear()
            self._trial = _Trial(0, self._link_s * n_bytes, self._link_s)
            self._last_per_byte = self._link_s
            self._rung = best
        else:
            self._link_s = 0.0
        self._start_epoch()

    # rounds whose frames overlap

    def _start_epoch(self) -> None:
        self._epoch_began = self._answered_at
        self._frames = 0
        self._elapsed_s = 0.0
        self._waited_s = 0.0
        self._sent_bytes = 0
        self._acknowledged_bytes = 0
        self._acknowledged_pages = 0
        self._content_pages = 0

    def _look(self, now: float) -> None:
        """Learn from the epoch, unless it is too early, and begin the next."""
        if self._content_pages >= _MIN_PAGES * EPOCH_FRAMES:
            if not self._acknowledged_bytes:
                return
            self._waiting = self._waited_s > _WAITING_SHARE * self._elapsed_s
            lasted_s = self._answered_at - self._epoch_began
            per_byte = lasted_s / self._acknowledged_bytes
            if self._waiting:
                # What disturbs makes a link slower, so the better of two epochs counts.
                self._link_s = min(per_byte, self._last_per_byte)
                self._last_per_byte = per_byte
                self._link_measured = True
                self._hope = _HOPE
            elif 2 * self._acknowledged_bytes < self._sent_bytes:
                return  # the window is being filled
            elif not self._link_measured:
                self._doubts += 1
                if self._doubts == _DOUBTS:
                    self._link_s = 0.0
            elif now >= self._lighter_until():
                self._link_s = min(self._link_s, per_byte) * self._hope
                self._hope *= self._hope
            self._settle(now, lasted_s / max(1, self._acknowledged_pages), per_byte)
        self._start_epoch()

    def _settle(self, now: float, pace_s: float, per_byte_s: float) -> None:
        """Change to the best codec, as far as is known; `pace_s` a page, or `per_byte_s`, is what
        this one takes."""
        trial, self._trial = self._trial, None
        self._taken_back = trial is not None and self._is_worse(trial, pace_s, per_byte_s)
        if trial is not None and self._taken_back:
            self._pauses[self._rung].begin(now)
            self._change(trial.rung, now)
            return
        if trial is not None and trial.doubted:
            self._pauses[trial.rung].begin(now)
        if now - self._since > _PROVEN_S:
            self._pauses[self._rung] = _Pause()
        paused = [rung for rung, pause in enumerate(self._pauses) if now < pause.until]
        first = max((rung + 1 for rung in paused if rung < self._rung), default=0)
        last = min((rung for rung in paused if rung > self._rung), default=len(self._ladder))
        if not self._waiting and self._link_s:  # nothing but hope says that it could do more
            first = max(first, self._rung - 1)
        costs = {rung: self._cost(rung) for rung in range(first, last)}
        best = min(costs, key=costs.__getitem__)
        if costs[best] < GAIN * costs[self._rung]:
            self._trial = _Trial(self._rung, pace_s, per_byte_s)
            if self._waiting and now - self._since <= _PROVEN_S:
                self._pauses[self._rung].begin(now)
            self._change(best, now)
        elif self._waiting and first < self._rung and self._is_level(self._rung - 1):
            self._trial = _Trial(self._rung, pace_s, per_byte_s, doubted=True)
            self._change(self._rung - 1, now)

    def _is_level(self, rung: int) -> bool:
        return self._ladder[rung].method is Method.ZSTD

    def _is_worse(self, trial: _Trial, pace_s: float, per_byte_s: float) -> bool:
        """Whether the codec in use is, by more than pages differ from each other."""
        if not (self._is_level(trial.rung) and self._is_level(self._rung)):
            return pace_s > _WORSE * trial.pace_s
        fewer = self._costs.typical_bytes(self._rung) / self._costs.typical_bytes(trial.rung)
        most = GAIN if trial.doubted else _LEVEL_WORSE
        return per_byte_s * fewer > most * trial.per_byte_s

    def _in_long_round(self, again: bool) -> int:
        if again and self._delta_is_due():
            return self._delta
        if self._stronger_is_due():
            return self._next_stronger()
        return max(self._rung, self._delta) if again else self._rung

    def _delta_is_due(self) -> bool:
        if self._rung > self._delta + 1 or self._costs.was_tried(self._delta):
            return False
        return self._cost(0) <= DELTA_COSTS * self._cost(self._rung)

    def _next_stronger(self) -> int:
        """The rung above the one in use; deltas are no step on the way there."""
        return max(self._rung, self._delta) + 1

    def _stronger_is_due(self) -> bool:
        """Whether a frame of the next codec, of which nothing is known, is worth its time, or costs
        none but that in which the lane waits."""
        rung = self._next_stronger()
        if not self._waiting or rung >= len(self._ladder) or self._costs.was_tried(rung):
            return False
        return self._rung <= self._delta or self._costs.estimate(rung)[0] < self._cost(self._rung)

    def _lighter_until(self) -> float:
        return max((pause.until for pause in self._pauses[: self._rung]), default=0.0)

    def _change(self, rung: int, now: float) -> None:
        self._rung = rung
        self._since = now
        self._unsettled = len(self._under_way)

    def _cost(self, rung: int) -> float:
        """Seconds for a page, and the price of encoding it."""
        seconds, n_bytes = self._costs.estimate(rung)
        return max(seconds, n_bytes * self._link_s) + PRICE * seconds
