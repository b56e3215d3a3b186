"""Nurseries whose tasks fail together for one reason: what they raise is that one error."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import trio


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """Around a nursery whose tasks fail together for one reason: raises the first error alone, also
    when the nursery is being cancelled, so that who waits for an error sees one."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors, _ = group.split(Exception)
        if errors is None:
            raise
        raise first_error(errors) from group


@contextlib.asynccontextmanager
async def alongside(task: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """`task` runs until the block ends, or is given up with it. Raises the first error of both."""
    with ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            yield
            nursery.cancel_scope.cancel()


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: parts of one phase fail together for one reason."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
