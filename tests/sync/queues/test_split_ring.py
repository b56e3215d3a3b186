"""What is under way in a split virtqueue is known exactly, or known not to be known."""

import random
import struct

import pytest

from sync.queues.split_ring import SplitRing

AVAILABLE, USED = 0x1000, 0x8000


class Memory:
    def __init__(self) -> None:
        self.content = bytearray(1 << 16)

    def read(self, address: int, count: int) -> bytes:
        return bytes(self.content[address : address + count])

    def write(self, address: int, data: bytes) -> None:
        self.content[address : address + len(data)] = data


class Queue:
    """A driver, and a device that completes in any order and begins at the used index."""

    def __init__(self, size: int, start: int = 0) -> None:
        self.memory = Memory()
        self.size = size
        self.free = list(range(size))
        self.owed: list[int] = []
        """By the device, as the driver knows."""
        self.offered = self.used = self.taken = start & 0xFFFF
        self.taken_heads: list[int] = []
        self.answered: list[int] = []
        for ring in (AVAILABLE, USED):
            self.memory.write(ring + 2, struct.pack("<H", self.offered))

    def offer(self, chance: random.Random) -> None:
        if not self.free:
            return
        head = self.free.pop(chance.randrange(len(self.free)))
        self.owed.append(head)
        slot = AVAILABLE + 4 + 2 * (self.offered % self.size)
        self.memory.write(slot, struct.pack("<H", head))
        self.offered = (self.offered + 1) & 0xFFFF
        self.memory.write(AVAILABLE + 2, struct.pack("<H", self.offered))

    def complete(self, chance: random.Random) -> None:
        while self.taken != self.offered:
            (head,) = struct.unpack(
                "<H", self.memory.read(AVAILABLE + 4 + 2 * (self.taken % self.size), 2)
            )
            self.taken_heads.append(head)
            self.taken = (self.taken + 1) & 0xFFFF
        if not self.taken_heads:
            return
        head = self.taken_heads.pop(chance.randrange(len(self.taken_heads)))
        slot = USED + 4 + 8 * (self.used % self.size)
        self.memory.write(slot, struct.pack("<II", head, 0))
        self.used = (self.used + 1) & 0xFFFF
        self.memory.write(USED + 2, struct.pack("<H", self.used))
        assert head in self.owed, "the device has answered what nobody asked for"
        self.owed.remove(head)
        self.free.append(head)

    def die(self) -> None:
        """Another device begins where the used index stands."""
        self.taken_heads = []
        self.taken = self.used


@pytest.mark.parametrize("seed", range(20))
def test_what_is_offered_again_is_what_was_under_way(seed: int) -> None:
    chance = random.Random(seed)
    queue = Queue(16, start=chance.choice([0, 0xFFF0]))
    for _ in range(chance.randrange(10)):
        queue.offer(chance)
    ring = SplitRing(queue.memory, AVAILABLE, USED, 16)
    n_known = 0
    for _ in range(3000):
        chance.choice([queue.offer, queue.complete, queue.complete])(chance)
        if chance.random() < 0.2:
            ring.look()
            if ring.under_way is not None:
                assert ring.under_way == queue.owed
                n_known += 1
        if chance.random() < 0.01:
            for _ in range(chance.randrange(5)):
                queue.offer(chance)
            if ring.offer_again():
                queue.die()
    assert n_known > 100
    while queue.owed:
        queue.complete(chance)
    assert len(queue.free) == 16


def test_a_request_older_than_the_ring_is_not_forgotten() -> None:
    """It is in neither ring any more."""
    chance = random.Random(1)
    queue = Queue(8)
    ring = SplitRing(queue.memory, AVAILABLE, USED, 8)
    ring.look()
    queue.offer(chance)
    slow = queue.owed[0]
    ring.look()
    queue.complete(chance)
    queue.used, queue.owed = 0, [slow]
    queue.memory.write(USED + 2, struct.pack("<H", 0))
    queue.free.remove(slow)
    for _ in range(40):
        queue.offer(chance)
        queue.taken_heads.clear()
        queue.complete(chance)
        ring.look()
    assert ring.under_way == [slow]


def test_who_looks_too_late_knows_that_he_does_not_know() -> None:
    chance = random.Random(2)
    queue = Queue(8)
    ring = SplitRing(queue.memory, AVAILABLE, USED, 8)
    ring.look()
    queue.offer(chance)
    for _ in range(20):
        queue.offer(chance)
        queue.complete(chance)
    queue.offer(chance)
    assert queue.owed
    ring.look()
    assert ring.under_way is None and ring.busy
    assert not ring.offer_again()
    while queue.owed:
        queue.complete(chance)
        ring.look()
    assert ring.under_way == [] and not ring.busy
