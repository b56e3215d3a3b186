"""Running a test's coroutine, for the tests of a link."""

from collections.abc import Awaitable, Callable

import trio


def run_trio(function: Callable[[], Awaitable[object]], deadline_s: float = 20.0) -> None:
    """Run with a deadline: a test that hangs fails."""

    async def bounded() -> None:
        with trio.fail_after(deadline_s):
            await function()

    trio.run(bounded)
