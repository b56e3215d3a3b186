"""Waiting for the next event: awake for a moment if it is likely to come soon, else asleep.

A core that sleeps takes longer to wake up than a register access takes otherwise, and an access
through the gateway has two wake-ups more than one without. So an epoll is polled for a window
before it is slept on, by rules that bound what this costs:

- only if the last wait of the same kind was shorter than the window: an idle guest costs nothing;
- a window that was polled in vain is followed by a rest many times as long;
- whoever else could run on this core does so between two polls.

The kernel's halt polling of virtual CPUs (halt_poll_ns) and of sockets (busy_poll) are like it.
"""

import os
import time
from collections.abc import Callable

WINDOW_S = 100e-6
REST_WINDOWS = 19
"""What is polled in vain stays below a twentieth of a core."""


class BusyPoll:
    """`poll` returns the events that come within the seconds given; `window_s` 0: only sleeps."""

    def __init__(
        self,
        poll: Callable[[float], list[tuple[int, int]]],
        window_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        let_run: Callable[[], None] = os.sched_yield,
    ) -> None:
        self._poll = poll
        self._window_s = window_s
        self._clock = clock
        self._let_run = let_run
        self._was_short = [False, False]
        self._rest_until = 0.0

    def wait(self, timeout_s: float, kind: bool) -> list[tuple[int, int]]:
        """The events that come within `timeout_s`. Waits of one `kind` last alike, it is said."""
        poll, clock, window_s = self._poll, self._clock, self._window_s
        began = now = clock()
        if self._was_short[kind] and now >= self._rest_until:
            while now - began < window_s:
                events = poll(0)
                if events:
                    return events
                self._let_run()
                now = clock()
            # Who lost the core to somebody else for longer than the window rests for longer.
            self._rest_until = now + REST_WINDOWS * (now - began)
        events = poll(timeout_s)
        self._was_short[kind] = clock() - began < window_s
        return events


def usable_window_s(wanted_s: float) -> float:
    """0 where one processor is all there is: nobody could do what is waited for meanwhile."""
    return wanted_s if len(os.sched_getaffinity(0)) > 1 else 0.0
