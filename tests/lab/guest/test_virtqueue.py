"""The driver's queue: what a device finds in memory, and what a device may not write there."""

import struct
from collections.abc import Iterator

import pytest

from lab.guest.errors import GuestPanic
from lab.guest.ram import Ram
from lab.guest.virtqueue import Segment, SplitQueue, queue_bytes

QUEUE = 1 << 20
SIZE = 8
TABLE = QUEUE + (64 << 10)
SEGMENTS = [Segment(0x1000, 16, False), Segment(0x2000, 4096, True), Segment(0x3000, 1, True)]


@pytest.fixture
def ram() -> Iterator[Ram]:
    memory = Ram(4 << 20, 4096)
    yield memory
    memory.close()


@pytest.fixture
def queue(ram: Ram) -> SplitQueue:
    made = SplitQueue(ram, QUEUE, SIZE)
    made.clear()
    return made


def descriptor(ram: Ram, table: int, index: int) -> tuple[int, ...]:
    return struct.unpack("<QIHH", ram.view(table + 16 * index, 16))


def use(ram: Ram, queue: SplitQueue, index: int, heads: list[int]) -> None:
    for position, head in enumerate(heads, index - len(heads)):
        at = queue.addresses.device + 4 + 8 * (position % SIZE)
        ram.write(at, struct.pack("<II", head, 1))
    ram.write(queue.addresses.device + 2, struct.pack("<H", index & 0xFFFF))


def test_the_rings_are_aligned_and_do_not_overlap(queue: SplitQueue) -> None:
    addresses = queue.addresses
    assert addresses.descriptors % 16 == addresses.driver % 2 == addresses.device % 4 == 0
    assert addresses.driver >= addresses.descriptors + 16 * SIZE
    assert addresses.device >= addresses.driver + 6 + 2 * SIZE
    assert addresses.device + 6 + 8 * SIZE <= QUEUE + queue_bytes(SIZE)


def test_a_chain(ram: Ram, queue: SplitQueue) -> None:
    queue.add(1, SEGMENTS, None)
    assert ram.load(queue.addresses.driver + 2, struct.Struct("<H")) == (0,)
    queue.publish()
    assert ram.load(queue.addresses.driver + 2, struct.Struct("<HH")) == (1, 3)
    table = queue.addresses.descriptors
    assert descriptor(ram, table, 3) == (0x1000, 16, 1, 4)
    assert descriptor(ram, table, 4) == (0x2000, 4096, 3, 5)
    assert descriptor(ram, table, 5) == (0x3000, 1, 2, 0)


def test_an_indirect_table(ram: Ram, queue: SplitQueue) -> None:
    queue.add(0, SEGMENTS, TABLE)
    assert descriptor(ram, queue.addresses.descriptors, 0) == (TABLE, 48, 4, 0)
    assert descriptor(ram, TABLE, 0) == (0x1000, 16, 1, 1)
    assert descriptor(ram, TABLE, 2) == (0x3000, 1, 2, 0)


def test_used_buffers_are_taken_once_and_the_index_wraps(ram: Ram, queue: SplitQueue) -> None:
    queue.used_index = 0xFFFF
    use(ram, queue, 0x1_0001, [3, 0])
    assert queue.take_used() == [(1, 1), (0, 1)]
    assert queue.take_used() == []
    assert queue.used_index == 1


@pytest.mark.parametrize(("index", "heads"), [(SIZE + 1, []), (0x8000, []), (1, [4])])
def test_i9_a_ring_that_no_device_may_write_is_refused(
    ram: Ram, queue: SplitQueue, index: int, heads: list[int]
) -> None:
    use(ram, queue, index, heads)
    with pytest.raises(GuestPanic):
        queue.take_used()


def test_clear_forgets_everything(ram: Ram, queue: SplitQueue) -> None:
    queue.add(0, SEGMENTS, None)
    queue.publish()
    use(ram, queue, 1, [0])
    queue.take_used()
    queue.clear()
    assert queue.available_index == queue.used_index == 0
    assert bytes(ram.view(QUEUE, queue_bytes(SIZE))) == bytes(queue_bytes(SIZE))
