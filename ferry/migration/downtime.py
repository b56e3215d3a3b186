"""How long the guest stood still, phase by phase, and whose time each phase is: the VMM's or ours.

The downtime goes from the moment at which the source's VMM stopped its vCPUs, by its own clock,
until the source hears that the target's VMM runs them. Its phases follow each other without gaps,
so each moment belongs to one phase, and each phase to one owner:

    VMM stop        VMM    vCPUs stopped -> its state is `pre-switchover`, by its own clock
    pause           ours   until we act on it
    device stop     ours   drained, at rest, its registers read, its memory taken away
    PCI save        ours   what the VMM keeps of the device and does not migrate
    VMM transfer    VMM    `migrate-continue` -> the target's VMM has loaded all of it
    final state     ours   what is left of the last registers and pages after that
    verify          ours   touched pages compared by digest, and repaired
    ready           ours   the target is asked
    PCI restore     ours   of which: on the target
    release         ours   the source's gateways let go
    commit          ours   the target is told, and tells that it runs
    own             ours   of which: the target's gateways take over
    device start    ours   of which: memory, registers and interrupts of its device
    VMM resume      VMM    of which: `cont`

While the VMM sends and loads its last part, we send registers and pages. That time is the VMM's:
the guest would wait for it without us, too. What we did in it is told separately
(`beside_vmm_ms`) and is part of neither sum; as far as it slowed the VMM down, that counts as the
VMM's. A message's way between the hosts is ours, but for the VMM's stream, which comes through
our tunnel, and the word that it is loaded.
"""

import math
import time
from collections.abc import Mapping

VMM_PHASES = frozenset({"VMM stop", "VMM transfer", "VMM resume"})


STANDSTILL_FACTOR = 10
MIN_STANDSTILL_S = 5.0
"""Below this a loaded host alone would end migrations."""


def standstill_budget_s(allowed_ms: float) -> float:
    """How long the guest may stand still at most before it goes on here, whatever the peer and the
    link do (I10): ten times the downtime that is allowed, and at least five seconds."""
    return max(MIN_STANDSTILL_S, STANDSTILL_FACTOR * allowed_ms / 1e3)


class Downtime:
    """A stopwatch. `stopped_at` and `waiting_at`: seconds since the epoch, by this host's clock,
    when the VMM's vCPUs stopped, and when it began to wait in `pre-switchover`."""

    def __init__(self, stopped_at: float, waiting_at: float) -> None:
        epoch = time.time() - time.monotonic()
        self._last = min(waiting_at - epoch, time.monotonic())
        self._started = min(stopped_at - epoch, self._last)
        self.phases_ms: dict[str, float] = {"VMM stop": (self._last - self._started) * 1e3}
        self.beside_vmm_ms: dict[str, float] = {}
        """How long our own work took that went on while the VMM was at its `VMM transfer`."""

    def lap(self, phase: str, parts_ms: Mapping[str, object] | None = None) -> None:
        """Ends `phase`: all that has passed since the phase before it ended.

        `parts_ms` are phases within it, which it then leaves out. The peer may have told them:
        what is no number, or more than there was, is cut.
        """
        now = time.monotonic()
        left_ms = (now - self._last) * 1e3
        self._last = now
        for part, told in (parts_ms or {}).items():
            part_ms = 0.0
            if isinstance(told, int | float) and math.isfinite(told):
                part_ms = min(max(told, 0.0), left_ms)
            self._add(part, part_ms)
            left_ms -= part_ms
        self._add(phase, left_ms)

    def _add(self, phase: str, ms: float) -> None:
        self.phases_ms[phase] = self.phases_ms.get(phase, 0.0) + ms

    @property
    def total_ms(self) -> float:
        """From the stop of the vCPUs to the end of the last phase."""
        return (self._last - self._started) * 1e3

    @property
    def vmm_ms(self) -> float:
        """The part of the downtime that is the VMM's."""
        return sum(ms for phase, ms in self.phases_ms.items() if phase in VMM_PHASES)

    @property
    def own_ms(self) -> float:
        """The part of the downtime that is ours."""
        return self.total_ms - self.vmm_ms
