"""A queue by itself: its position, its saved state, and the moment between two looks."""

import os
import struct
from collections.abc import Iterator

import pytest

from lab.devices.errors import StateStreamError
from lab.devices.memory import GuestMemory, MemoryAbsent
from lab.devices.virtio.virtqueue import Chain, RingError, Virtqueue
from sync.vfio_user.protocol import DmaMap

SIZE = 8
DESC, AVAIL, USED, DATA = 0x0000, 0x1000, 0x2000, 0x3000
AVAIL_EVENT = USED + 4 + 8 * SIZE
FIXED = struct.Struct("<HHBBQQQHHH")


class NoMessages:
    """All of the memory is mapped."""

    def read(self, address: int, count: int) -> bytes:
        raise NotImplementedError

    def write(self, address: int, data: bytes) -> None:
        raise NotImplementedError


class Ring:
    """The driver's side, written straight into the memory."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 0x10000)
        self.memory = GuestMemory()
        self.memory.attach(NoMessages())
        self.memory.map(DmaMap(3, 0, 0, 0x10000), os.dup(self.fd))
        self.memory.settle()
        self.index = 0

    def put(self, offset: int, layout: str, *values: int) -> None:
        os.pwrite(self.fd, struct.pack(layout, *values), offset)

    def get(self, offset: int, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, os.pread(self.fd, struct.calcsize(layout), offset))

    def start_at(self, index: int) -> None:
        self.index = index
        self.put(USED + 2, "<H", index)
        self.put(AVAIL + 2, "<H", index)

    def offer(self, head: int) -> None:
        self.put(DESC + 16 * head, "<QIHH", DATA + 64 * head, 64, 0, 0)
        self.put(AVAIL + 4 + 2 * (self.index % SIZE), "<H", head)
        self.index = self.index + 1 & 0xFFFF
        self.put(AVAIL + 2, "<H", self.index)

    def close(self) -> None:
        self.memory.unmap_all()
        os.close(self.fd)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.close()


def taken(queue: Virtqueue, ring: Ring) -> Chain:
    """The next request, which has to be there."""
    chain = queue.take(ring.memory)
    assert chain is not None
    return chain


def new_queue(*, event: bool = False, begin: bool = True) -> Virtqueue:
    queue = Virtqueue(0, 16)
    queue.size = SIZE
    queue.enabled = True
    queue.event_index = event
    if begin:
        queue.descriptors, queue.driver_area, queue.device_area = DESC, AVAIL, USED
    return queue


@pytest.mark.parametrize("start", [0, 5, 0xFFFE])
def test_a_queue_begins_where_the_used_ring_is(ring: Ring, start: int) -> None:
    ring.start_at(start)
    queue = new_queue()
    assert queue.take(ring.memory) is None
    for head in (3, 1, 4, 0, 5, 2):
        ring.offer(head)
    heads = [taken(queue, ring).head for _ in range(6)]
    assert heads == [3, 1, 4, 0, 5, 2]
    assert queue.take(ring.memory) is None
    for number, head in enumerate(reversed(heads)):
        assert queue.complete(ring.memory, head, 7)
        slot = USED + 4 + 8 * ((start + number) % SIZE)
        assert ring.get(slot, "<II") == (head, 7)
        assert ring.get(USED + 2, "<H") == ((start + number + 1) & 0xFFFF,)


def test_nothing_is_touched_while_memory_is_absent(ring: Ring) -> None:
    ring.start_at(9)
    ring.offer(1)
    queue = new_queue()
    lost = GuestMemory()
    for _ in range(2):
        with pytest.raises(MemoryAbsent):
            queue.take(lost)
    assert taken(queue, ring).head == 1
    with pytest.raises(MemoryAbsent):
        queue.complete(lost, 1, 0)
    queue.put_back(1)
    assert queue.has_more(ring.memory)
    assert taken(queue, ring).head == 1
    assert not queue.has_more(ring.memory)
    queue.complete(ring.memory, 1, 0)
    assert ring.get(USED + 2, "<H") == (10,)


def test_a_request_that_comes_between_two_looks_is_found(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver adds one after the device looked and before it asked for a notification."""
    queue = new_queue(event=True)
    write = ring.memory.write_u16

    def write_late(address: int, value: int) -> None:
        if address == AVAIL_EVENT and ring.index == 1:
            ring.offer(2)
        write(address, value)

    monkeypatch.setattr(ring.memory, "write_u16", write_late)
    ring.offer(1)
    assert taken(queue, ring).head == 1
    assert queue.has_more(ring.memory)
    assert taken(queue, ring).head == 2
    assert not queue.has_more(ring.memory)
    assert ring.get(AVAIL_EVENT, "<H") == (2,)


def test_the_driver_chooses_which_completions_interrupt(ring: Ring) -> None:
    queue = new_queue(event=True)
    ring.put(AVAIL + 4 + 2 * SIZE, "<H", 1)
    wanted = []
    for head in range(4):
        ring.offer(head)
        queue.take(ring.memory)
        wanted.append(queue.complete(ring.memory, head, 0))
    assert wanted == [False, True, False, False]
    queue = new_queue()
    ring.put(AVAIL, "<H", 1)
    ring.offer(0)
    queue.take(ring.memory)
    assert not queue.complete(ring.memory, 0, 0)


def test_a_request_that_was_put_back_cannot_be_offered_again(ring: Ring) -> None:
    queue = new_queue()
    ring.offer(1)
    queue.take(ring.memory)
    queue.put_back(1)
    assert taken(queue, ring).head == 1
    queue.put_back(1)
    ring.offer(1)
    assert taken(queue, ring).head == 1
    with pytest.raises(RingError):
        queue.take(ring.memory)


@pytest.mark.parametrize("begun", [False, True])
def test_a_saved_queue_goes_on_where_it_was(ring: Ring, begun: bool) -> None:
    ring.start_at(6)
    queue = new_queue()
    queue.notified, queue.vector = True, 2
    for head in (1, 2, 3):
        ring.offer(head)
    if begun:
        queue.take(ring.memory)
        queue.take(ring.memory)
        queue.put_back(1)
        queue.complete(ring.memory, 2, 0)
        # Nobody reads the index in memory any more.
        ring.put(USED + 2, "<H", 1234)
    other = Virtqueue(0, 16)
    other.load(queue.save(), 3)
    assert other.save() == queue.save()
    assert (other.enabled, other.notified, other.vector, other.size) == (True, True, 2, SIZE)
    heads = [taken(other, ring).head for _ in range(2 if begun else 3)]
    assert heads == ([1, 3] if begun else [1, 2, 3])
    assert other.take(ring.memory) is None


def state(
    size: int = SIZE,
    vector: int = 0,
    flags: int = 3,
    begun: int = 1,
    next_: int = 0,
    used: int = 0,
    heads: tuple[int, ...] = (),
    count: int | None = None,
) -> bytes:
    n_heads = len(heads) if count is None else count
    fixed = FIXED.pack(size, vector, flags, begun, DESC, AVAIL, USED, next_, used, n_heads)
    return fixed + struct.pack(f"<{len(heads)}H", *heads)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        state()[:-1],
        state(size=0),
        state(size=7),
        state(size=32),
        state(vector=3),
        state(flags=4),
        state(begun=2),
        state(begun=0, heads=(1,)),
        state(heads=(1, 1)),
        state(heads=(SIZE,)),
        state(heads=(1,), count=2),
        state(heads=(1,), count=0),
    ],
)
def test_i9_an_impossible_state_is_refused(bad: bytes) -> None:
    queue = new_queue()
    before = queue.save()
    with pytest.raises(StateStreamError):
        queue.load(bad, 3)
    assert queue.save() == before


def test_a_state_that_is_possible() -> None:
    queue = new_queue()
    queue.load(state(vector=0xFFFF, heads=(0, SIZE - 1), next_=5, used=3), 3)
    assert queue.save() == state(vector=0xFFFF, heads=(0, SIZE - 1), next_=5, used=3)
