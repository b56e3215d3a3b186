"""Which processors the lanes' threads run on.

The kernel wakes a thread near the one that wakes it. Two lanes that begin a short round at the same
time then often stand on one processor, the second until the first is done, while another processor
sleeps: no scheduler looks again before a last round is over. So lanes that rest are kept apart, and
wake up so. In a long round the kernel knows better, and may move them.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_sched_getcpu = getattr(ctypes.PyDLL(None), "sched_getcpu", None)
SHORT_MESSAGES: Final = 4
"""Up to so many messages without a rest are short: a last round, and its comparison."""


def current_processor() -> int:
    """The one that the caller runs on, at the moment; -1: the C library does not tell."""
    return -1 if _sched_getcpu is None else int(_sched_getcpu())


class Processors:
    """Those of one lane's thread, which is to call `rest` and `work`."""

    def __init__(self, lane: int, lanes: int) -> None:
        """Of the processors that the caller may run on, every `lanes`th is this lane's."""
        self._allowed = os.sched_getaffinity(0)
        groups = min(lanes, len(self._allowed))
        self._own = set(sorted(self._allowed)[lane % groups :: groups])
        self._messages = 0
        self._apart = False

    def rest(self) -> None:
        """There is nothing to do at the moment."""
        self._messages = 0
        self._keep(apart=True)

    def work(self) -> None:
        """A message is sent or applied."""
        self._messages += 1
        if self._messages > SHORT_MESSAGES:
            self._keep(apart=False)

    def rests_on(self, processor: int) -> bool:
        """Whether its thread, which rests, is to wake on this one. From any thread."""
        return self._apart and processor in self._own

    def _keep(self, *, apart: bool) -> None:
        if apart is self._apart:
            return
        self._apart = apart
        try:
            os.sched_setaffinity(0, self._own if apart else self._allowed)
        except OSError:
            return  # forbidden, or taken away: it runs where it may
