"""The compiled kernels, made ready beside a command's first steps."""

import trio

from ferry.progress import Reporter
from transport.kernels.declare import warm_up


class Kernels:
    """The compiled kernels, made ready while a command finds those that it needs."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._loaded = trio.Event()

    async def load(self) -> None:
        """Where they have to be compiled first, says that it takes a while."""
        await trio.to_thread.run_sync(warm_up, self._explain, abandon_on_cancel=True)
        self._loaded.set()

    async def ready(self) -> None:
        await self._loaded.wait()

    def _explain(self) -> None:
        text = "compiling the kernels, once on each machine: some seconds"
        self._reporter.event("message", text=text)
