"""The threads that do a device's DMA, and the gate in front of them.

Owns who runs when: pieces of work run in several threads, never while a *hold* is on, and putting
a hold on returns only when none is running. Does not own what the work is.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Work = TypeVar("Work", bound=Hashable)


class Hold(Enum):
    """Why a device does no DMA."""

    NO_CLIENT = "no client"
    NO_BUS_MASTER = "bus mastering is off"
    STOPPED = "stopped by its migration state"
    CHANGING = "what DMA depends on is being changed"


class Workers(Generic[Work]):
    """`count` threads that call `step` with what was kicked.

    `step(work)` does one piece of it and kicks it again if there may be more; it may run in several
    threads for the same work. `failed(work)` is called when it raises.

    The holds of `initial_holds` are on at first.
    """

    def __init__(
        self,
        count: int,
        step: Callable[[Work], None],
        failed: Callable[[Work], None],
        initial_holds: set[Hold],
    ) -> None:
        self._step = step
        self._failed = failed
        lock = threading.Lock()
        self._wanted = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        # A dict is an ordered set: first kicked, first served.
        self._ready: dict[Work, None] = {}
        self._holds = set(initial_holds)
        self._running = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"dma-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def kick(self, work: Work) -> None:
        """Have `work` stepped at least once from now on, when no hold is on."""
        with self._wanted:
            self._ready[work] = None
            self._wanted.notify()

    def cancel_all(self) -> None:
        """Forget every kick."""
        with self._wanted:
            self._ready.clear()

    def hold(self, reason: Hold) -> None:
        """Start no step any more; return when none is running. Not for use in a step."""
        with self._idle:
            self._holds.add(reason)
            self._idle.wait_for(lambda: not self._running)

    def release(self, reason: Hold) -> None:
        """Take a hold away, if it is on."""
        with self._wanted:
            self._holds.discard(reason)
            self._wanted.notify_all()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing runs inside the `with` block."""
        self.hold(Hold.CHANGING)
        try:
            yield
        finally:
            self.release(Hold.CHANGING)

    def close(self) -> None:
        """End the threads, after the steps that are running."""
        with self._wanted:
            self._closed = True
            self._wanted.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._closed or (self._ready and not self._holds))
                if self._closed:
                    return
                work = next(iter(self._ready))
                del self._ready[work]
                self._running += 1
            try:
                self._step(work)
            except Exception:
                logger.exception("DMA failed")
                self._failed(work)
            finally:
                # The frame of a failed step would keep guest memory exported.
                with self._idle:
                    self._running -= 1
                    if not self._running:
                        self._idle.notify_all()
