"""Which codec a lane uses for its next frame: the one with which a page takes the least time.

**What is known.** Of each codec: the seconds `e` that it takes to encode a page, and the bytes `w`
that the page becomes. They begin with what is typical of files and follow the frames that are made;
as long as a codec was not used, its `e` follows those that were, in proportion. Of the link: the
seconds `l` that it takes for a byte, a bandwidth limit and the receiver's work included. A frame
keeps the link busy until its answer, from when it was sent, or from the answer before if that came
later; the sum over an epoch of some answers, by their bytes, is `l`. Whatever disturbs makes
answers late, never early, so the best of the newest two epochs counts. A lane that has encoded all
the time has not seen what the link can do: it is taken for a little faster then, epoch after epoch,
until a lighter codec is used and shows.

**The rule.** Encoding and sending overlap, so a page takes `max(e, w * l)`. After each epoch the
lane changes to the codec with which that is least, if it is a twentieth less than with the one in
use. In a round that is so short that it is a frame or two nothing overlaps: it gets the codec with
the least `e + w * l`.

**Trials.** Contents change, so each other codec gets a frame now and then: a hundredth of the time.

**The start.** Until `l` is known frames hold few pages, as they are. No later frame is made to keep
the link busy for more than `_FRAME_S`: what turns out to be wrong for a slow link must not last.

**After the first round** pages are likely to be written once more, so `DELTA`, which keeps what a
later delta needs, is used in place of `NONE`.

Pure, and for one lane: it is told what was encoded and answered and when, and reads no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from transport.wire.codec import DELTA, LZ4, NONE, Codec, Method

_TYPICAL: Final = {
    NONE: (1e-6, 4104),
    DELTA: (1.6e-6, 4104),
    LZ4: (8e-6, 2350),
    Codec(Method.ZSTD, 1): (11e-6, 1700),
    Codec(Method.ZSTD, 3): (15e-6, 1600),
}
"""Seconds to encode a page, and its bytes. No other level of zstandard would gain 7 %."""
_FIRST_ROUND, _LATER_ROUNDS = ([c for c in _TYPICAL if c is not raw] for raw in (DELTA, NONE))
_BETTER: Final = 0.95  # of the time with the codec in use: noise is no reason to change
_EPOCHS: Final = 2
_EPOCH_ANSWERS: Final = 8  # twice a window's, so that how answers fall does not decide
_EPOCH_S: Final = 0.03  # or the link was busy for so long
_EPOCH_BYTES: Final = 512 << 10  # fewer, of zeros or short deltas, say nothing of the link
_ENCODING: Final = 0.95  # of the time: the lane never waits
_HOPE: Final = 0.93
_WEIGHT: Final = 0.125  # of a codec's newest frame in its averages
_TRIAL_WEIGHT: Final = 0.5
_LATEST: Final = 4.0  # times the average: beyond that, somebody else had the core
_CONTENT_PAGES: Final = 16  # of a frame that says anything about a codec,
_CONTENT_SHARE: Final = 0.25  # and of all pages that it was made from
_TRIAL_PAGES: Final = 256
_TRIAL_SHARE: Final = 0.01
_SHORT_PAGES: Final = 1024
_FIRST_PAGES: Final = 64  # 42 ms of 100 Mbit/s that two lanes share
_FRAME_S: Final = 0.025


@dataclass(slots=True)
class _Cost:
    """What a page takes with one codec."""

    encode_s: float
    n_bytes: float
    used_at: float | None = None
    """When a frame was last encoded so."""


class Choice:
    """Chooses for one lane. Not thread-safe. Times are seconds of one steady clock."""

    def __init__(self, codec: Codec | None = None) -> None:
        """`codec`: the only one to be used; None: whichever is best."""
        self._fixed = codec
        self._costs = {each: _Cost(*cost) for each, cost in _TYPICAL.items()}
        self._codecs = _FIRST_ROUND
        self.codec = codec or NONE
        """The one in use, apart from short rounds and trials."""
        self.frame_pages = 0
        """How many pages the frame that was picked may hold; 0: as many as fit."""
        self._used = self.codec
        self._short = False
        self._first_at: float | None = None
        self._began = self._answered_at = 0.0
        self._under_way: deque[tuple[float, int]] = deque()
        """When each frame was encoded, and its bytes."""
        self._epochs_byte_s: deque[float] = deque(maxlen=_EPOCHS)
        self._byte_s = 0.0
        """What the link takes for a byte; 0: not known."""
        self._start_epoch(0.0)

    def pick(self, now: float, *, begins: int = 0, again: bool = False) -> Codec:
        """The codec for the frame that is about to be encoded. `begins`: the pages of the round
        that begins with this frame, 0 if none does; `again`: it is not the first round."""
        if self._fixed:
            return self._fixed
        self._began = now
        self._first_at = self._first_at or now
        if begins:
            self._short = begins <= _SHORT_PAGES
        self._codecs = _LATER_ROUNDS if again else _FIRST_ROUND
        if self.codec not in self._codecs:
            self.codec = self._codecs[0]
        if self._short:
            self._used = min(self._codecs, key=self._alone_s)
        else:
            self._used = self._trial(now) or self.codec
        pages = int(_FRAME_S / self._page_s(self._used)) if self._byte_s else _FIRST_PAGES
        self.frame_pages = max(pages, _CONTENT_PAGES)
        return self._used

    def encoded(self, now: float, *, looked: int, pages: int, n_bytes: int) -> None:
        """The frame is ready: of so many pages that were `looked` at, so many had content, and
        became `n_bytes`, 0 if there was nothing to send."""
        if self._fixed:
            return
        cost = self._costs[self._used]
        cost.used_at = now
        self._encode_s += now - self._began
        if n_bytes:
            self._under_way.append((now, n_bytes))
        if pages < max(_CONTENT_PAGES, _CONTENT_SHARE * looked):
            return
        before_s = cost.encode_s
        weight = _WEIGHT if self._used is self.codec else _TRIAL_WEIGHT
        page_s = min((now - self._began) / pages, _LATEST * before_s)
        cost.encode_s += weight * (page_s - before_s)
        cost.n_bytes += weight * (n_bytes / pages - cost.n_bytes)
        for other in self._costs.values():
            if other.used_at is None:
                other.encode_s *= cost.encode_s / before_s

    def acknowledged(self, now: float) -> None:
        """The receiver has applied the oldest frame that is under way."""
        if self._fixed:
            return
        sent_at, n_bytes = self._under_way.popleft()
        self._link_s += now - max(sent_at, self._answered_at)
        self._link_bytes += n_bytes
        self._answers += 1
        self._answered_at = now
        if self._link_s >= _EPOCH_S or self._answers >= _EPOCH_ANSWERS:
            if self._link_s >= _EPOCH_S or self._link_bytes >= _EPOCH_BYTES:
                self._learn(now)
            self._start_epoch(now)

    def lost(self) -> None:
        """The oldest frame that is under way was lost with its link: it tells nothing."""
        if not self._fixed:
            self._under_way.popleft()

    def _start_epoch(self, now: float) -> None:
        self._epoch_began = now
        self._encode_s = self._link_s = 0.0
        self._link_bytes = self._answers = 0

    def _learn(self, now: float) -> None:
        """From the epoch; and change to the best codec, if it is better by enough."""
        byte_s = self._link_s / self._link_bytes
        if self._byte_s and self._encode_s > _ENCODING * (now - self._epoch_began):
            byte_s = min(byte_s, _HOPE * self._byte_s)
        self._epochs_byte_s.append(byte_s)
        self._byte_s = min(self._epochs_byte_s)
        best = min(self._codecs, key=self._page_s)
        better = self._page_s(best) < _BETTER * self._page_s(self.codec)
        if better and len(self._epochs_byte_s) == _EPOCHS:
            self.codec = best

    def _trial(self, now: float) -> Codec | None:
        """Another codec than the one in use, if its turn has come."""
        for codec in self._codecs:
            since = self._costs[codec].used_at or self._first_at or now
            pause_s = _TRIAL_PAGES * self._page_s(codec) / _TRIAL_SHARE
            if codec is not self.codec and now - since > pause_s:
                return codec
        return None

    def _page_s(self, codec: Codec) -> float:
        """What a page takes where encoding and sending overlap."""
        cost = self._costs[codec]
        return max(cost.encode_s, cost.n_bytes * self._byte_s)

    def _alone_s(self, codec: Codec) -> float:
        """What it takes where they do not."""
        cost = self._costs[codec]
        return cost.encode_s + cost.n_bytes * self._byte_s
