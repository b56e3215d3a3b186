"""The cache of bases is memory before it is needed, and no more of it than that."""

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from transport.sending.replica import AHEAD_SLOTS, STEP_SLOTS, Replica
from transport.sending.rounds import LaneSource, Source

PAGE = 4096
HUGE_PAGE = 2 << 20
SLOTS = 8192


def resident(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Of which pages of `array` there is memory: bool[pages that it touches] (mincore(2))."""
    start = array.ctypes.data // PAGE * PAGE
    pages = -(-(array.ctypes.data + array.nbytes - start) // PAGE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGE), found) == 0
    return np.frombuffer(bytes(found), np.uint8).astype(np.bool_)


@pytest.mark.parametrize("hand", [0, 3000, SLOTS - 100])
def test_the_slots_that_are_taken_next_are_memory_before_that(hand: int) -> None:
    assert mmap.PAGESIZE == PAGE
    replica = Replica(2 * SLOTS, 2 * SLOTS * PAGE, lanes=2)
    first, second = (replica.knowledge_of_lane(lane) for lane in (0, 1))
    second.hand[0] = hand
    before, before_first = resident(second.cache).sum(), resident(first.cache).sum()
    for _ in range(AHEAD_SLOTS // STEP_SLOTS):
        replica.touch_ahead(1)
    ahead = second.cache[hand * 512 : (hand + AHEAD_SLOTS) * 512]
    assert resident(ahead)[:-1].all()  # the last slot ends in the page behind it
    for _ in range(20):
        replica.touch_ahead(1)
    assert resident(second.cache).sum() - before <= AHEAD_SLOTS + 2 * HUGE_PAGE // PAGE
    # Lanes may have a part of a huge page each.
    assert resident(first.cache).sum() - before_first <= 2 * HUGE_PAGE // PAGE


def test_a_step_touches_few_slots_and_none_that_is_in_use() -> None:
    replica = Replica(SLOTS, SLOTS * PAGE)
    known = replica.knowledge_of_lane(0)
    known.cache[:] = 1
    known.owners[::3] = np.arange(SLOTS)[::3]
    replica.touch_ahead(0)
    touched = np.flatnonzero(known.cache == 0)
    assert np.array_equal(touched, [slot * 512 for slot in range(STEP_SLOTS) if slot % 3])


def test_an_idle_lane_touches_slots_of_its_own() -> None:
    memory = np.zeros(SLOTS * PAGE, np.uint8)
    source = Source(memory, seed=1, cache_bytes=memory.size, lanes=2)
    lane = LaneSource(source, 1, frame_bytes=1 << 20)
    lane.idle()
    lane.prepare()
    replica = source.encoder(0, 1 << 20).replica
    first, second = (replica.knowledge_of_lane(number).cache for number in (0, 1))
    first[:] = second[:] = 1
    lane.idle()
    assert np.count_nonzero(second == 0) == STEP_SLOTS
    assert first.all()


def test_without_a_cache_there_is_nothing_to_touch() -> None:
    Replica(SLOTS, 0).touch_ahead(0)
