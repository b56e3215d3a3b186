"""A guest goes on at another virtio device, whose rings were walked: against a model of a device
that is written from the specification and shares no code."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.queues.choose import find_class, load_classes
from sync.queues.errors import CannotMove, StateError
from sync.queues.interface import Rest, run
from sync.queues.virtio.device_class import Virtio
from sync.registers.profile.locate import DeviceView
from tests.sync.queues.controller import PAGE, Space
from tests.sync.queues.virtio_model import (
    BAR,
    CONFIG,
    DEVICE,
    EVENT_IDX,
    INDIRECT,
    NOTIFY,
    SECTOR,
    VERSION_1,
    Model,
)
from tests.sync.queues.world import Executor, GuestMemory

VIRTIO = Virtio()
FEATURES = [VERSION_1 | extra for extra in (0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX, 1 << 11)]


class OnModel(Executor):
    """Executes plans on one device."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.model = model

    def read(self, region: int, offset: int, length: int) -> bytes:
        return self.model.read(region, offset, length)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.model.write(region, offset, data)


@dataclass
class Given:
    """What the driver waits for: where the answer comes to, and what has to be in it."""

    descriptors: list[int]
    sector: int
    buffer: int
    expected: bytes
    status: int


@dataclass
class Ring:
    """A queue as its driver knows it."""

    index: int
    size: int
    desc: int
    avail: int
    used: int
    free: list[int]
    at: int
    seen: int
    given: dict[int, Given] = field(default_factory=dict)


class Driver:
    """A driver that kicks no more than it has to, and checks what it gets."""

    def __init__(
        self, memory: GuestMemory, write: Callable[[int, int, bytes], None], kind: int, seed: int
    ) -> None:
        self.memory, self.write, self.kind = memory, write, kind
        self.random = random.Random(seed)
        self.features = 0
        self.rings: list[Ring] = []
        self.written: dict[int, bytes] = {}
        self.busy: set[int] = set()
        self.pool = [memory.allocate(PAGE) for _ in range(64)]

    def common(self, offset: int, value: int, length: int) -> None:
        self.write(BAR, offset, value.to_bytes(length, "little"))

    def start(self, features: int, sizes: list[int], begins: list[int]) -> None:
        """`begins`: what the rings stand at, as after so many requests."""
        for status in (0, 1, 3):
            self.common(0x14, status, 1)
        self.features = features
        for part in range(2):
            self.common(0x08, part, 4)
            self.common(0x0C, features >> 32 * part & 0xFFFF_FFFF, 4)
        self.common(0x14, 0xB, 1)
        self.common(0x10, 0, 2)
        for index, (size, at) in enumerate(zip(sizes, begins, strict=True)):
            room = 16 * size + 6 + 2 * size
            base = self.memory.allocate(room + 2 + 6 + 8 * size)
            ring = Ring(index, size, base, base + 16 * size, base + -(-room // 4) * 4, [], at, at)
            ring.free = list(range(size))
            for where in (ring.avail + 2, ring.used + 2, ring.used + 4 + 8 * size):
                self.memory.write(where, at.to_bytes(2, "little"))
            self.common(0x16, index, 2)
            self.common(0x18, size, 2)
            self.common(0x1A, 1 + index, 2)
            for offset, address in ((0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used)):
                self.common(offset, address & 0xFFFF_FFFF, 4)
                self.common(offset + 4, address >> 32, 4)
            self.common(0x1C, 1, 2)
            self.rings.append(ring)
        self.common(0x14, 0xF, 1)

    def give(self, ring: Ring) -> bool:
        """One request, if there is room for it."""
        if not self.pool or len(ring.free) < (3 if self.kind == 2 else 1):
            return False
        page = self.pool.pop()
        sector = self.random.choice([at for at in range(256) if at not in self.busy])
        expected = b""
        parts: list[tuple[int, int, int]]
        status = page + 0x800
        if self.kind == 4:
            parts = [(page, self.random.randint(1, 600), 2)]
        else:
            self.busy.add(sector)
            writes = self.random.random() < 0.5
            expected = self.written.get(sector, bytes(SECTOR))
            self.memory.write(page + 0x400, struct.pack("<IIQ", int(writes), 0, sector))
            self.memory.write(status, b"\xff")
            if writes:
                expected = self.written[sector] = self.random.randbytes(SECTOR)
                self.memory.write(page, expected)
            parts = [(page + 0x400, 16, 0), (page, SECTOR, 0 if writes else 2), (status, 1, 2)]
        used = [ring.free.pop() for _ in parts]
        if self.features & INDIRECT and len(parts) > 1 and self.random.random() < 0.5:
            ring.free += used[1:]
            del used[1:]
            self._chain(page + 0xC00, [0, 1, 2], parts)
            raw = struct.pack("<QIHH", page + 0xC00, 16 * len(parts), 4, 0)
            self.memory.write(ring.desc + 16 * used[0], raw)
        else:
            self._chain(ring.desc, used, parts)
        ring.given[used[0]] = Given(used, sector, page, expected, status)
        self.memory.write(ring.avail + 4 + 2 * (ring.at % ring.size), struct.pack("<H", used[0]))
        before, ring.at = ring.at, (ring.at + 1) % 65536
        self.memory.write(ring.avail + 2, struct.pack("<H", ring.at))
        if self._wants_a_kick(ring, before):
            self.write(BAR, NOTIFY + 8 * ring.index, struct.pack("<H", ring.index))
        return True

    def _chain(self, table: int, numbers: list[int], parts: list[tuple[int, int, int]]) -> None:
        for at, (address, length, flags) in enumerate(parts):
            following = numbers[at + 1] if at + 1 < len(parts) else 0
            more = 1 if at + 1 < len(parts) else 0
            raw = struct.pack("<QIHH", address, length, flags | more, following)
            self.memory.write(table + 16 * numbers[at], raw)

    def _wants_a_kick(self, ring: Ring, before: int) -> bool:
        if self.features & EVENT_IDX:
            raw = self.memory.read(ring.used + 4 + 8 * ring.size, 2)
            event = int.from_bytes(raw, "little")
            return (ring.at - event - 1) % 65536 < (ring.at - before) % 65536
        return not self.memory.read(ring.used, 1)[0] & 1

    def take(self, ring: Ring) -> int:
        """What was used since. Returns how much."""
        count = 0
        while int.from_bytes(self.memory.read(ring.used + 2, 2), "little") != ring.seen:
            at = ring.used + 4 + 8 * (ring.seen % ring.size)
            head, _ = struct.unpack("<II", self.memory.read(at, 8))
            given = ring.given.pop(head)
            if self.kind == 2:
                assert self.memory.read(given.status, 1) == b"\0"
                assert self.memory.read(given.buffer, SECTOR) == given.expected
                self.busy.discard(given.sector)
            self.pool.append(given.buffer)
            ring.free += given.descriptors
            ring.seen = (ring.seen + 1) % 65536
            count += 1
        return count


class World:
    """A guest on a source, watched, with a target that nobody uses yet."""

    def __init__(self, seed: int, *, kind: int = 2, sizes: tuple[int, ...] = (16,), **more: bool):
        blocks: dict[int, bytes] = {}
        generator = random.Random(seed)
        self.source = Model(Space(), generator, blocks, kind=kind, sizes=sizes)
        self.target = Model(Space(), generator, blocks, kind=kind, sizes=sizes, **more)
        self.memory = GuestMemory()
        self.on_source, self.on_target = OnModel(self.source), OnModel(self.target)
        self.inventory = run(VIRTIO.inventory(), self.on_source)
        self.target_inventory = run(VIRTIO.inventory(), self.on_target)
        assert not VIRTIO.differences(self.inventory, self.target_inventory)
        self.memory.show_to(self.source)  # type: ignore[arg-type]
        self.watch = VIRTIO.watch(self.memory, self.inventory)
        self.watch.reset()
        self.here = self.source
        self.driver = Driver(self.memory, self._write, kind, seed)
        self.walk = VIRTIO.walk(self.target_inventory)

    def _write(self, region: int, offset: int, data: bytes) -> None:
        self.watch.write(region, offset, data)
        self.here.write(region, offset, data)
        if offset == 0x14 and region == BAR:
            self.watch.read(region, offset, self.here.read(region, offset, 1))

    def start(self, features: int, begins: list[int]) -> None:
        self.driver.start(features, list(self.source.sizes), begins)
        for queue, at in zip(self.source.queues, begins, strict=True):
            queue.taken = queue.used = at

    def work(self, count: int, depth: int = 3) -> None:
        for _ in range(count):
            for ring in self.driver.rings:
                for _ in range(depth):
                    self.driver.give(ring)
                self.here.run()
                self.driver.take(ring)
                assert not ring.given, "a device that was not told, or was not interrupted"

    def ahead(self) -> None:
        before = bytes(self.memory.bytes)
        self.watch.look()
        run(self.walk.ahead(self.watch.state()), self.on_target)
        assert bytes(self.memory.bytes) == before

    def switch(self) -> None:
        """The source's device comes to rest, and is taken away; memory goes to the target."""
        while True:
            self.watch.look()
            if self.watch.rest() is Rest.AT_REST:
                break
            assert self.source.step()
        state = self.watch.state()
        before = bytes(self.memory.bytes)
        run(self.walk.finish(state), self.on_target)
        assert not self.target.space.pages
        assert bytes(self.memory.bytes) == before
        self.memory.hide_from(self.source)  # type: ignore[arg-type]
        self.memory.show_to(self.target)  # type: ignore[arg-type]
        self.here = self.target
        self.watch = VIRTIO.watch(self.memory, self.target_inventory, state)
        run(self.walk.start(state), self.on_target)


@given(
    seed=st.integers(0, 1 << 32),
    kind=st.sampled_from([2, 2, 4]),
    sizes=st.lists(st.sampled_from([2, 4, 8, 16, 64, 256, 1024]), min_size=1, max_size=3),
    features=st.sampled_from(FEATURES),
    begins=st.lists(st.integers(0, 700), min_size=3, max_size=3),
    before=st.integers(0, 9),
    between=st.integers(0, 5),
    depth=st.integers(0, 16),
    steps=st.integers(0, 12),
    walks_ahead=st.booleans(),
    begins_at_used=st.booleans(),
)
@settings(max_examples=60)
def test_a_guest_goes_on_where_its_rings_were_walked_to(
    seed: int,
    kind: int,
    sizes: list[int],
    features: int,
    begins: list[int],
    before: int,
    between: int,
    depth: int,
    steps: int,
    walks_ahead: bool,
    begins_at_used: bool,
) -> None:
    world = World(seed, kind=kind, sizes=tuple(sizes), begins_at_used=begins_at_used)
    world.start(features & ~(1 << 11) if kind == 4 else features, begins[: len(sizes)])
    world.work(before)
    if walks_ahead:
        for ring in world.driver.rings:
            world.driver.give(ring)
        world.ahead()
        world.here.run()
        for ring in world.driver.rings:
            world.driver.take(ring)
        world.work(between)
    for ring in world.driver.rings:
        for _ in range(depth):
            world.driver.give(ring)
    for _ in range(steps):
        world.source.step()
    world.switch()
    fired = {0, *(1 + ring.index for ring in world.driver.rings)}
    assert set(world.on_target.signals) == fired
    for ring in world.driver.rings:
        world.driver.take(ring)
        assert not ring.given
    world.work(2 * max(sizes) // 3 + 1)
    assert not world.watch.refusals()
    assert world.target.features == world.source.features
    assert world.target.status == 0xF


@pytest.mark.parametrize("begins", [65530, 32768])
@pytest.mark.parametrize("size", [2, 16])
def test_indexes_run_over(begins: int, size: int) -> None:
    world = World(1, kind=4, sizes=(size,))
    world.start(VERSION_1, [begins])
    world.work(1, depth=1)
    world.ahead()
    world.work(3, depth=2)
    world.switch()
    world.work(2 * size)
    assert world.target.executed > 32768


def test_what_the_driver_has_set_arrives() -> None:
    world = World(3)
    world.start(VERSION_1 | 1 << 11, [5])
    world._write(BAR, DEVICE + 32, b"\0")
    world.driver.common(0x00, 1, 4)
    world.driver.common(0x08, 0, 4)
    world.switch()
    assert world.target.writeback == b"\0"
    assert world.target.selects == world.source.selects
    assert world.target.config_vector == 0
    assert [queue.vector for queue in world.target.queues] == [1]
    assert [queue.addresses for queue in world.target.queues] == [
        queue.addresses for queue in world.source.queues
    ]


def test_a_driver_that_has_not_come_far_goes_on_from_there() -> None:
    world = World(3)
    world.driver.common(0x14, 0, 1)
    world.driver.common(0x14, 1, 1)
    world.driver.common(0x14, 3, 1)
    world.driver.common(0x0C, 1 << 9, 4)
    world.switch()
    assert world.target.status == 3
    world.start(VERSION_1, [0])
    world.work(5)


def test_i8_an_attempt_after_one_that_failed() -> None:
    world = World(7)
    world.start(VERSION_1, [300])
    plan = world.walk.ahead(_looked(world))
    command = next(plan)
    while not world.target.executed:
        command = plan.send(world.on_target(command))
    plan.close()
    world.target.function_reset()
    world.target.space.pages.clear()
    world.walk = VIRTIO.walk(world.target_inventory)
    world.work(3)
    world.switch()
    world.work(20)


def _looked(world: World) -> bytes:
    world.watch.look()
    return world.watch.state()


# What is refused.


@pytest.mark.parametrize(
    ("bit", "name"),
    [
        (34, "packed rings"),
        (35, "in-order use"),
        (37, "SR-IOV"),
        (38, "notification data"),
        (40, "ring reset"),
        (41, "admin queue"),
        (17, "zoned"),
        (50, "bit 50"),
    ],
)
def test_a_feature_that_is_not_carried_is_refused_by_its_name(bit: int, name: str) -> None:
    world = World(1)
    world.source.offered |= 1 << bit
    world.start(VERSION_1 | 1 << bit, [0])
    with pytest.raises(CannotMove, match=name):
        _looked(world)
    state = world.watch._state.pack()
    with pytest.raises(CannotMove, match=name):
        run(world.walk.ahead(state), world.on_target)


def test_what_was_never_seen_is_refused_until_a_reset() -> None:
    world = World(1)
    watch = VIRTIO.watch(world.memory, world.inventory)
    with pytest.raises(CannotMove, match="at work before the gateway saw it"):
        watch.state()
    watch.write(BAR, 0x14, b"\0")
    watch.state()


@pytest.mark.parametrize(
    ("region", "offset", "data", "words"),
    [
        (BAR, 0x14, b"\x8f", "failed"),
        (BAR, 0x15, b"\0", "no driver writes"),
        (BAR, 0x22, b"\0\0", "no driver writes"),
        (BAR, 0x38, b"\0", "no driver writes"),
        (CONFIG, 0x94, b"\0", "configuration space"),
    ],
)
def test_what_is_written_otherwise_is_refused(
    region: int, offset: int, data: bytes, words: str
) -> None:
    world = World(1)
    world.start(VERSION_1, [0])
    world.watch.write(region, offset, data)
    if offset == 0x38:
        # Behind the structure: it is not the driver's.
        assert not world.watch.refusals()
        return
    assert words in world.watch.refusals()[0]


def test_a_device_that_needs_a_reset_is_refused() -> None:
    world = World(1)
    world.start(VERSION_1, [0])
    world.watch.read(BAR, 0x10, b"\0\0\1\0\x4f")
    assert "needs a reset" in world.watch.refusals()[0]


def test_a_guest_without_msix_is_refused() -> None:
    world = World(1)
    world.start(VERSION_1, [0])
    world.watch.write(BAR, 0x10, b"\xff\xff")
    world.watch.write(BAR, 0x1A, b"\xff\xff")
    assert "without MSI-X" in world.watch.refusals()[0]


def test_registers_of_before_are_refused() -> None:
    model = Model(Space(), random.Random(1), {}, device_id=0x1001)
    inventory = run(VIRTIO.inventory(), OnModel(model))
    watch = VIRTIO.watch(GuestMemory(), inventory)
    watch.reset()
    watch.write(0, 0x12, b"\1")
    assert "before virtio 1.0" in watch.refusals()[0]


def test_a_ring_outside_of_guest_memory_is_refused() -> None:
    world = World(1)
    world.start(VERSION_1, [0])
    world.watch.write(BAR, 0x28 + 4, b"\1\0\0\0")
    world.watch.look()
    assert "does not lie in guest memory" in world.watch.refusals()[0]


def test_a_device_of_another_size_is_told() -> None:
    model = Model(Space(), random.Random(1), {})
    source = run(VIRTIO.inventory(), OnModel(model))
    model.capacity += 1
    model.sizes = (32,)
    model.function_reset()
    target = run(VIRTIO.inventory(), OnModel(model))
    assert [each.name for each in VIRTIO.differences(source, target)] == ["capacity", "queue 0"]


def test_a_target_that_takes_other_features_is_refused() -> None:
    world = World(1)
    world.start(VERSION_1 | INDIRECT, [0])
    world.target.offered &= ~INDIRECT
    with pytest.raises(CannotMove, match="does not take the guest's features"):
        run(world.walk.ahead(_looked(world)), world.on_target)


@pytest.mark.parametrize(
    ("device_id", "found"),
    [(0x1042, True), (0x1001, True), (0x1044, True), (0x1041, False), (0x1000, False)],
)
def test_the_class_is_found_by_the_type(device_id: int, found: bool) -> None:
    view = DeviceView(0x1AF4, device_id, 0, 0, 0, b"", {})
    assert (find_class(view, load_classes()) is not None) is found
    assert find_class(DeviceView(0x8086, device_id, 0, 0, 0, b"", {}), load_classes()) is None


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_i9_a_state_that_makes_no_sense_is_refused(data: bytes) -> None:
    model = Model(Space(), random.Random(1), {})
    walk = VIRTIO.walk(run(VIRTIO.inventory(), OnModel(model)))
    with pytest.raises(StateError):
        run(walk.ahead(data), OnModel(model))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"size": 16', b'"size": 65536'),
        (b'"size": 16', b'"size": 15'),
        (b'"position": 9', b'"position": 65536'),
        (b'"position": 9', b'"position": true'),
        (b'"status": 15', b'"status": -1'),
        (b'"selects": [0, 1, 0]', b'"selects": [0, 1]'),
        (b'"index": 0', b'"index": 4096'),
        (b'"config": []', b'"config": [[5, "000000"]]'),
    ],
)
def test_i9_a_state_with_a_bad_part_is_refused(old: bytes, new: bytes) -> None:
    world = World(1)
    world.start(VERSION_1, [9])
    state = _looked(world)
    assert old in state
    with pytest.raises(StateError):
        run(world.walk.ahead(state.replace(old, new)), world.on_target)
