"""Attaching memory on both sides, and what is refused: sizes, shapes, files, page indices."""

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio

from tests.transport.running import run_trio
from transport.wire.errors import LayoutMismatch

PAGE = 4096
FIRST_PAGE = np.array([0], np.uint32)


def test_memories_of_different_sizes_are_told_apart(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            pair.sender.attach_memory(np.zeros(3 * PAGE, np.uint8))
            pair.receiver.attach_memory(np.zeros(4 * PAGE, np.uint8))
            with pytest.raises(LayoutMismatch, match=r"3 pages .* 4"):
                await pair.sender.send_round(FIRST_PAGE, 1)

    run_trio(scenario)


def test_a_round_waits_until_the_receiver_has_memory(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            source, target = (np.full(5 * PAGE, fill, np.uint8) for fill in (1, 0))
            pair.sender.attach_memory(source)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.sender.send_round, np.arange(5, dtype=np.uint32), 1)
                await pair.sender.send_record(1, b"", flush=True)
                pair.receiver.attach_memory(target)
            assert np.array_equal(source, target)

    run_trio(scenario)


@pytest.mark.parametrize(
    "indices",
    [
        np.array([1, 1], np.uint32),
        np.array([2, 1], np.uint32),
        np.array([100], np.uint32),
        np.array([0, 0xFFFFFFFF], np.uint32),
        np.array([1], np.int64),
        np.array([[1]], np.uint32),
    ],
)
def test_indices_that_are_none_are_refused(indices: Any, link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(n_pages=100) as pair:
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: pair.sender.send_round(indices, 1),
                lambda: pair.sender.verify(indices),
            ]
            for call in calls:
                with pytest.raises(ValueError, match="page indices"):
                    await call()

    run_trio(scenario)


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros(0, np.uint8),
        np.zeros(4097, np.uint8),
        np.zeros(4096, np.int8),
        np.zeros((2, 4096), np.uint8),
        np.zeros(16384, np.uint8)[::2],
        np.zeros(8192, np.uint8)[1:4097],
    ],
)
def test_memory_of_another_shape_is_refused(memory: Any, link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            for link in (pair.sender, pair.receiver):
                with pytest.raises(ValueError, match="guest memory"):
                    link.attach_memory(memory)

    run_trio(scenario)


@pytest.mark.parametrize("extent", [(1, 2, 0, 0), (-1, 1, 0, 0), (0, 1, 0, -4096), (0, 1, 0, 7)])
def test_files_that_do_not_lie_in_the_memory_are_refused(extent: Any, link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            memory = np.zeros(2 * PAGE, np.uint8)
            for link in (pair.sender, pair.receiver):
                with pytest.raises(ValueError, match="of a file"):
                    link.attach_memory(memory, files=[extent])

    run_trio(scenario)


def test_memory_is_attached_once_and_writable_at_the_receiver(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            memory = np.zeros(PAGE, np.uint8)
            with pytest.raises(RuntimeError, match="no memory"):
                await pair.sender.send_round(FIRST_PAGE, 1)
            memory.setflags(write=False)
            with pytest.raises(ValueError, match="writable"):
                pair.receiver.attach_memory(memory)
            pair.sender.attach_memory(memory)
            pair.receiver.attach_memory(np.zeros(PAGE, np.uint8))
            with pytest.raises(RuntimeError):
                pair.sender.attach_memory(memory)
            with pytest.raises(RuntimeError):
                pair.receiver.attach_memory(np.zeros(PAGE, np.uint8))
            await pair.sender.send_round(FIRST_PAGE, 1)

    run_trio(scenario)
