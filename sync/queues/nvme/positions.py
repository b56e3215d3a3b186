"""How many commands bring the rings of one completion queue to where they have to stand.

Pure arithmetic. A submission ring of S entries moves by one with each command, modulo S; the
completion ring of C entries moves with each command of any of its submission rings, modulo 2 C.
A submission ring may be made anew, which brings it to 0 and moves no completion ring.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

MAX_COMMANDS = 1 << 18
"""More are not walked: it would take minutes."""


@dataclass(frozen=True, slots=True)
class Ring:
    """A submission ring: its size, where it stands, and where it has to stand."""

    size: int
    now: int
    wanted: int

    @property
    def distance(self) -> int:
        return (self.wanted - self.now) % self.size


@dataclass(frozen=True, slots=True)
class Way:
    """Commands for each ring, by ID. Before that `before` commands on the ring `renewed`, which is
    then made anew."""

    commands: Mapping[int, int]
    renewed: int | None = None
    before: int = 0

    @property
    def completions(self) -> int:
        return self.before + sum(self.commands.values())


def shortest(rings: Mapping[int, Ring], size: int, distance: int, least: int) -> Way | None:
    """The way with the fewest commands on which the completion ring of `size` entries moves by
    `distance` modulo 2 x `size`, and by `least` at least. None: there is none, as without rings."""
    base = {ring_id: ring.distance for ring_id, ring in rings.items()}
    if not base:
        return Way({}) if distance == 0 and least <= 0 else None
    ways = []
    total = sum(base.values())
    for ring_id, ring in rings.items():
        laps = _laps(ring.size, 2 * size, distance - total, least - total)
        if laps is not None:
            ways.append(Way({**base, ring_id: base[ring_id] + laps * ring.size}))
        renewed = {**base, ring_id: ring.wanted}
        total_renewed = sum(renewed.values())
        before = _laps(1, 2 * size, distance - total_renewed, least - total_renewed)
        if before is not None:
            ways.append(Way(renewed, ring_id, before))
    return min(ways, key=lambda way: (way.completions, way.renewed is not None))


def admin(ring: Ring, size: int, distance: int, least: int) -> int | None:
    """Commands for the admin queue, which cannot be made anew. None: no number of them does it."""
    laps = _laps(ring.size, 2 * size, distance - ring.distance, least - ring.distance)
    return None if laps is None else ring.distance + laps * ring.size


def _laps(step: int, modulus: int, distance: int, least: int) -> int | None:
    """The smallest n with n x step = distance (mod modulus) and n x step >= least."""
    common = gcd(step, modulus)
    if distance % common:
        return None
    period = modulus // common
    first = (distance // common * pow(step // common, -1, period)) % period if period > 1 else 0
    short = least - first * step
    if short > 0:
        first += -(-short // (period * step)) * period
    return first
