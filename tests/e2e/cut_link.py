"""A link that tests cut, with a loop of its own: the end-to-end tests drive processes, not trio."""

import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from tests.transport.cutting_proxy import CuttingProxy

T = TypeVar("T")


class Link:
    """A proxy in front of whoever listens at `port`, served by a thread."""

    def __init__(self, port: int) -> None:
        self.proxy = CuttingProxy(port)
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.proxy.serve)
                self._started.set()

    def do(self, what: Callable[[], T]) -> T:
        """Has the proxy's loop call `what`."""
        return trio.from_thread.run_sync(what, trio_token=self._token)

    def shut(self) -> None:
        """From here on nobody gets through."""

        def shut() -> None:
            self.proxy.shut = True
            self.proxy.cut()

        self.do(shut)

    def open(self) -> None:
        """Whoever connects from here on gets through."""

        def open_() -> None:
            self.proxy.shut = False

        self.do(open_)

    def close(self) -> None:
        self.do(self._scope.cancel)
        self._thread.join()
