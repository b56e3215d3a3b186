"""Bringing a VMM back whose controller died or hangs, in a thread beside the gateway's loop.

Owned here: the attempts, and the process that may have to be ended for them. Not owned: when a VMM
is to be brought back (`core`), and how (`sync.vmm.recover`).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from sync.gateway.control.info import Recovery
from sync.gateway.control.take_back import take_back
from sync.gateway.engine.core import Armed
from sync.peer_process import PeerProcess
from sync.vmm import recover

RECOVERY_S = 600.0
"""How long a VMM is tried to be brought back, attempt after attempt."""
RECOVERY_PAUSE_S = 1.0


class VmmRecovery:
    """At most one at a time. `migrations` counts those that have begun; `notify`, which any thread
    may call, has `outcomes` be asked for."""

    def __init__(
        self,
        clock: Callable[[], float],
        migrations: Callable[[], int],
        notify: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._migrations = migrations
        self._notify = notify
        self._closed = False
        self._hung: PeerProcess | None = None
        """A controller that was cut off for its silence, until the VMM is brought back."""
        self._outcomes: deque[Recovery] = deque()
        self._thread: threading.Thread | None = None
        self._later: Callable[[], None] | None = None
        """Starts a recovery for which there was no thread, at `_later_at`."""
        self._later_at = 0.0

    @property
    def under_way(self) -> bool:
        return self._later is not None or (self._thread is not None and self._thread.is_alive())

    def outcomes(self) -> Iterator[Recovery]:
        """What came of attempts since this was last asked for."""
        while self._outcomes:
            yield self._outcomes.popleft()

    def blame(self, process: PeerProcess | None) -> None:
        """The next recovery may end `process`, which keeps the VMM and does nothing with it."""
        self._forget_hung()
        self._hung = process

    def look(self, now: float) -> None:
        if self._later is not None and now >= self._later_at:
            self._later()

    def close(self) -> None:
        """Nothing more is begun; what is under way ends by itself."""
        self._closed = True
        self._forget_hung()

    def start(self, armed: Armed, session: str, proof: str) -> None:
        """Brings the VMM back that `armed` names; `proof` opens its other gateways."""
        if not armed.may_end_holder:
            self._forget_hung()
        hung, self._hung = self._hung, None
        begun = self._migrations()
        until = self._clock() + RECOVERY_S

        def wanted() -> bool:
            """Whether the guest is still as that migration has left it."""
            same = recover.socket_made(armed.qmp_path) in (None, armed.qmp_made)
            untouched = self._migrations() == begun
            return untouched and (same or armed.qmp_made is None) and not self._closed

        def attempt() -> None:
            self._later = None
            try:
                self._thread = threading.Thread(
                    target=self._run,
                    args=(armed, session, proof, hung, wanted),
                    name="recovery",
                    daemon=True,
                )
                self._thread.start()
            except RuntimeError as error:
                self._tell(Recovery("lease-lost", False, str(error)))
                if wanted() and self._clock() < until:
                    self._later = attempt
                    self._later_at = self._clock() + RECOVERY_PAUSE_S

        attempt()

    def _run(
        self,
        armed: Armed,
        session: str,
        proof: str,
        hung: PeerProcess | None,
        wanted: Callable[[], bool],
    ) -> None:
        """Tries again until it succeeds or is not wanted; for `RECOVERY_S` at most."""
        end_holder = hung.kill if hung is not None else None
        shut = ""
        for path in armed.companions:
            try:
                take_back(path, session, proof, armed.deadline_s, end_holder)
            except Exception as error:
                # It lets no access through: the guest goes on without that device.
                shut += f"; its device behind {path} is not back: {error}"
        until = self._clock() + RECOVERY_S
        told = ""
        while True:
            try:
                done = recover.recover_source(
                    armed.qmp_path,
                    armed.deadline_s,
                    armed.put_back,
                    ran=armed.ran,
                    end_holder=end_holder,
                    wanted=wanted,
                )
                outcome = Recovery("lease-lost", True, done + shut)
            except Exception as error:
                outcome = Recovery("lease-lost", False, f"{type(error).__name__}: {error}")
            if outcome.message != told:
                told = outcome.message
                self._tell(outcome)
            if outcome.ok or self._clock() > until:
                break
            time.sleep(RECOVERY_PAUSE_S)
            if not wanted():
                break
        if hung is not None:
            hung.close()

    def _tell(self, outcome: Recovery) -> None:
        self._outcomes.append(outcome)
        self._notify()

    def _forget_hung(self) -> None:
        if self._hung is not None:
            self._hung.close()
            self._hung = None
