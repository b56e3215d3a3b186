"""How fast the VMM may announce pages, and how far it may be ahead of the lanes.

The VMM pauses its guest by itself as soon as it has nothing more to send. The guest then waits for
all that is announced and not on the target yet, so that this has to fit into a part of the
downtime: `max_backlog`. As long as the VMM has many pages to look at, the lanes have that time,
too: rounds are longer then, and what a round costs beside its pages weighs less. `bandwidth` has
the VMM follow the rate of the lanes, so that it is seldom left unread, which it waits for with its
lock held.

Owns the numbers. Costs are in pages that have content: a page of zeros costs next to nothing.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from sync.memory import PAGE_BYTES

INTERVAL_S = 0.2
SHARE_OF_DOWNTIME = 3
"""The backlog may take a third of the limit: the VMM's own last pages take some, too."""
FIRST_BACKLOG = 1024.0
MIN_BACKLOG = 256.0
MIN_ROUND_S = 0.02
LOOKED_AT_PER_S = 1 << 20
"""A VMM looks at no more pages in a second, be they of zeros, which cost it nothing else."""
MAX_AHEAD_S = 0.5
"""Beside the share of the downtime, however much the VMM has to look at."""
ZERO_COST = 1 / 64
CHEAP_PAGE_BYTES = 512
"""A page that is known at the target but for some words takes fewer. The next ones may not be."""
FIRST_BYTES_PER_S = 256 << 20
MIN_BYTES_PER_S = 1 << 20
MAX_BYTES_PER_S = 1 << 40
FASTER, SLOWER = 1.5, 0.8
"""What the VMM gets of the lanes' rate while the backlog is small, and while it is not."""
RECENT_ROUNDS = 16
"""The rate is the best of so many. Their mean would count what a round costs beside its pages, so
that rounds would become smaller, and their mean lower, and so on."""


class Paced(Protocol):
    """Whoever announces pages."""

    @property
    def backlog(self) -> float: ...


class Pace:
    """The pace of one migration."""

    def __init__(
        self,
        downtime_limit_ms: float,
        most_bytes_per_s: int = MAX_BYTES_PER_S,
        bandwidth: int | None = None,
    ) -> None:
        """`most_bytes_per_s` is what the VMM never gets more than, `bandwidth` what all of us may
        send, in bytes a second."""
        self.allow(downtime_limit_ms, bandwidth)
        self._most = most_bytes_per_s
        self._rates = deque[tuple[float, float]](maxlen=RECENT_ROUNDS)
        """Of recent rounds: pages and bytes a second."""
        self._sizes = deque[tuple[float, int]](maxlen=RECENT_ROUNDS)
        """Of these, their cost and bytes."""
        self._pages_per_s = 0.0
        self._remaining_pages = 0

    def allow(self, downtime_limit_ms: float, bandwidth: int | None = None) -> None:
        """The guest may stand still for so long, and so much may be sent in a second."""
        self._share_s = downtime_limit_ms / 1e3 / SHARE_OF_DOWNTIME
        self._bandwidth = bandwidth or MAX_BYTES_PER_S

    @staticmethod
    def cost_of(pages: int, zeros: int) -> float:
        return pages - zeros + zeros * ZERO_COST

    def sent(self, cost: float, wire_bytes: int, duration_s: float, round_trip_s: float) -> None:
        """A round of this cost was acknowledged after `duration_s`. One that was over as soon as an
        answer could come says nothing of the rate, nor do pages that took next to no bytes."""
        cost = min(cost, wire_bytes / CHEAP_PAGE_BYTES)
        if cost >= 1 and (duration_s >= 2 * round_trip_s or not self._rates):
            took_s = max(duration_s - round_trip_s, duration_s / 4, 1e-4)
            self._rates.append((cost / took_s, wire_bytes / took_s))
            self._sizes.append((cost, wire_bytes))
            pages_per_s, bytes_per_s = (max(each) for each in zip(*self._rates, strict=True))
            pages, n_bytes = (sum(each) for each in zip(*self._sizes, strict=True))
            # Pages of few bytes went fast, and what a limit lets through at once even faster.
            bytes_per_s = min(bytes_per_s, self._bandwidth)
            self._pages_per_s = min(pages_per_s, bytes_per_s * pages / n_bytes)

    def remain(self, pages: int) -> None:
        """The VMM says that it has so many pages to announce before it could pause its guest."""
        self._remaining_pages = pages

    def announced(self, pages: int) -> None:
        """The VMM has announced so many of those that remained."""
        self._remaining_pages = max(0, self._remaining_pages - pages)

    @property
    def _ahead_s(self) -> float:
        """The VMM cannot pause its guest any sooner."""
        return min(self._remaining_pages / LOOKED_AT_PER_S, MAX_AHEAD_S)

    @property
    def max_backlog(self) -> float:
        """So much may be announced and not acknowledged."""
        if not self._pages_per_s:
            return FIRST_BACKLOG
        return max(MIN_BACKLOG, self._pages_per_s * (self._share_s + self._ahead_s))

    @property
    def round_cost(self) -> float:
        """So much is worth a round of its own: one is under way while the next one gathers."""
        wanted_s = MIN_ROUND_S + self._ahead_s / 2
        return min(self.max_backlog / 2, max(1.0, self._pages_per_s * wanted_s))

    def bytes_per_s(self, backlog: float) -> int:
        """What the VMM may send with, given what is announced and not acknowledged."""
        if not self._pages_per_s:
            return min(FIRST_BYTES_PER_S, self._most)
        factor = FASTER if backlog < self.max_backlog / 2 else SLOWER
        rate = int(self._pages_per_s * PAGE_BYTES * factor)
        return min(max(rate, MIN_BYTES_PER_S), self._most)


async def keep_pace(pace: Pace, paced: Paced, limit: Callable[[int], Awaitable[None]]) -> None:
    """Tells the VMM its rate several times a second, by `limit`, until it is cancelled."""
    told = 0
    while True:
        wanted = pace.bytes_per_s(paced.backlog)
        if abs(wanted - told) * 10 > told:
            await limit(wanted)
            told = wanted
        await trio.sleep(INTERVAL_S)
