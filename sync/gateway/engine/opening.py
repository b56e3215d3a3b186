"""Opening a device in a thread beside the gateway's loop, which serves the guest meanwhile.

Owned here: the one attempt that is under way. Not owned: how a device is opened, and when.
"""

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from sync.errors import SyncError
from sync.gateway.errors import told

CLOSE_S = 10.0
"""An attempt that takes longer is left behind by a gateway that ends."""


class Closable(Protocol):
    def close(self) -> None: ...


D = TypeVar("D", bound=Closable)


class Opening(Generic[D]):
    """`notify`, which any thread may call, has `tell` be called."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._thread: threading.Thread | None = None
        self._outcome: D | SyncError | None = None
        self._opened: Callable[[D | SyncError], None] = lambda outcome: None

    @property
    def busy(self) -> bool:
        return self._thread is not None

    def begin(self, opens: Callable[[], D], opened: Callable[[D | SyncError], None]) -> None:
        """Not while it is `busy`. `opened` gets the device, which is its own then, or why there is
        none. Raises RuntimeError if there is no thread to be had."""
        thread = threading.Thread(target=self._run, args=(opens,), name="opening", daemon=True)
        thread.start()
        self._thread, self._opened = thread, opened

    def tell(self) -> None:
        """Hands over what has come of the attempt, if it has ended."""
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self._thread = None
            self._opened(outcome)

    def close(self) -> None:
        """What is being opened is closed again."""
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        if not isinstance(self._outcome, SyncError | None):
            self._outcome.close()

    def _run(self, opens: Callable[[], D]) -> None:
        try:
            self._outcome = opens()
        except Exception as error:
            self._outcome = told(error)
        self._notify()
