"""The bandwidth limit: one token bucket for all that a sender puts on the wire.

`TokenBucket` is a pure function of the clock that its caller reads; `SharedBucket` adds the lock
that several lanes need. Neither waits: they say how long the caller has to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.02
"""Time's worth of bytes that may go at once after a pause: smooth, yet above a thread's wake-up."""
MIN_PIECE_BYTES = 64 << 10
"""Pieces are not made smaller than this for the sake of a low limit."""


class TokenBucket:
    """Who asks first goes first: each reservation is paid off before a later one.

    The level may become negative; whoever makes it so waits until his own debt is paid. Over any
    time t no more than `rate * (t + BURST_S)` bytes, plus the piece that is going, are let through.
    """

    def __init__(self, bytes_per_s: int, now: float) -> None:
        """Start full. ValueError: the rate is not positive."""
        if bytes_per_s <= 0:
            raise ValueError(f"a limit of {bytes_per_s} bytes/s lets nothing through")
        self._rate = float(bytes_per_s)
        self._burst = self._rate * BURST_S
        self._level = self._burst
        self._now = now

    def reserve(self, n_bytes: int, now: float) -> float:
        """Take `n_bytes`; returns the time (of the caller's clock, s) from when they may go."""
        if now > self._now:
            self._level = min(self._burst, self._level + (now - self._now) * self._rate)
            self._now = now
        self._level -= n_bytes
        return self._now + max(0.0, -self._level / self._rate)


class SharedBucket:
    """A token bucket, or none, for several threads."""

    def __init__(
        self, bytes_per_s: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """None: no limit. ValueError: the limit is not positive."""
        self._lock = threading.Lock()
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._bucket = None if bytes_per_s is None else TokenBucket(bytes_per_s, clock())

    def limit(self, bytes_per_s: int | None) -> None:
        """Another limit from now on; what has been reserved goes when it was told to. ValueError:
        the limit is not positive."""
        bucket = None if bytes_per_s is None else TokenBucket(bytes_per_s, self._clock())
        with self._lock:
            self._bytes_per_s, self._bucket = bytes_per_s, bucket

    def reserve(self, n_bytes: int) -> float:
        """Take `n_bytes`; returns the time of the clock from when they may go."""
        with self._lock:
            return 0.0 if self._bucket is None else self._bucket.reserve(n_bytes, self._clock())

    def piece_bytes(self, wanted: int) -> int:
        """How much to reserve at once, at most `wanted`, so that nobody waits long behind it."""
        limit = self._bytes_per_s
        if limit is None:
            return wanted
        return min(wanted, max(MIN_PIECE_BYTES, int(limit * BURST_S)))
