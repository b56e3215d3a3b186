"""A guest goes on at another controller, whose rings were walked: against a model of a controller
that is written from the specification and shares no code."""

import struct
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.queues.errors import CannotMove, StateError, WalkFailed
from sync.queues.interface import Rest, run
from tests.sync.queues.world import GUEST_IOVA, NVME, World

SIZES = st.sampled_from([2, 3, 4, 7, 16, 64, 100, 1024])
IN_FLIGHT = st.sampled_from([0, 1, 2, 7, 16])


def finish(world: World) -> None:
    """The guest goes on and takes every ring round twice; everything it asks for is right."""
    driver = world.driver
    for cq in driver.cqs.values():
        driver.take(cq)
    assert {asked.opcode for asked in driver.asked.values()} <= {0x0C}
    for sq in driver.sqs.values():
        if sq.id:
            world.work(sq, 2 * max(sq.entries, sq.cq.entries) + 1, depth=5)
    for _ in range(2 * max(driver.sqs[0].entries, driver.cqs[0].entries) + 1):
        world.admin(0x06, prp1=GUEST_IOVA + (511 << 12), dwords=(1,))
    assert not world.source.bad_status
    assert not world.target.bad_status
    assert not world.watch.refusals()
    assert len(world.target.events) == len(driver.asked)
    for taken in list(world.target.events):
        assert (0, taken.cid) in driver.asked
        world.target.event()
        driver.take(driver.cqs[0])
    assert not driver.asked
    assert world.unnamed_pages_are_untouched()


@given(
    seed=st.integers(0, 1 << 32),
    admin_sizes=st.tuples(st.sampled_from([5, 8, 32, 64]), st.sampled_from([4, 8, 32, 64])),
    queues=st.lists(
        st.tuples(SIZES, st.lists(SIZES, min_size=1, max_size=3)), min_size=1, max_size=2
    ),
    before=st.lists(st.integers(0, 2200), min_size=6, max_size=6),
    in_flight=IN_FLIGHT,
    between=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    last=IN_FLIGHT,
    taken=st.integers(0, 3),
    n_events=st.integers(0, 4),
    stride=st.sampled_from([0, 0, 2]),
    walks_ahead=st.booleans(),
)
@settings(max_examples=60)
def test_a_guest_goes_on_where_its_rings_were_walked_to(
    seed: int,
    admin_sizes: tuple[int, int],
    queues: list[tuple[int, list[int]]],
    before: list[int],
    in_flight: int,
    between: list[int],
    last: int,
    taken: int,
    n_events: int,
    stride: int,
    walks_ahead: bool,
) -> None:
    world = World(seed, stride=stride)
    driver = world.driver
    driver.enable(*admin_sizes)
    world.admin(0x09, dwords=(7, 15 << 16 | 15))
    for number, (cq_entries, sq_entries) in enumerate(queues):
        world.create(1 + 3 * number, cq_entries, sq_entries)
    for _ in range(n_events):
        driver.submit(driver.sqs[0], 0x0C)
        world.here.run()
    rings = [sq for sq in driver.sqs.values() if sq.id]
    for sq, count in zip(rings, before, strict=False):
        world.work(sq, count, depth=1 + in_flight)
    if walks_ahead:
        for sq in rings:
            fill(world, sq, in_flight)
        world.ahead()
        world.here.run()
        for sq in rings:
            driver.take(sq.cq)
        for sq, count in zip(rings, between, strict=False):
            world.work(sq, count, depth=3)
    for sq in rings:
        fill(world, sq, last)
    world.come_to_rest()
    for sq in rings:
        # Some completions stay where they are when the guest stops.
        driver.take(sq.cq, taken)
    world.switch()
    unconsumed = {cq.id for cq in driver.cqs.values() if has_more(world, cq.id)}
    assert set(world.on_target.signals) == unconsumed
    finish(world)


def has_more(world: World, cq_id: int) -> bool:
    cq = world.driver.cqs[cq_id]
    status = world.memory.read(cq.base + 16 * cq.head + 14, 1)[0]
    return status & 1 == cq.phase


def fill(world: World, sq: object, count: int) -> None:
    """Up to `count` commands, no more than the rings hold."""
    driver = world.driver
    ring = driver.sqs[sq.id]  # type: ignore[attr-defined]
    under_way = sum(1 for sq_id, _ in driver.asked if driver.sqs[sq_id].cq is ring.cq)
    for _ in range(min(count, ring.room(), ring.cq.entries - 1 - under_way)):
        driver.read_or_write(ring, world.random)
        if world.random.random() < 0.3:
            world.here.step()


@pytest.mark.parametrize(
    ("size", "in_flight"),
    [*product([2, 3, 17], [0, 1, 2, 7, 16]), (1024, 0), (1024, 16)],
)
def test_every_position_of_a_ring_in_both_phases(size: int, in_flight: int) -> None:
    """All of them, but of the largest ring only those around a wrap."""
    around = [at + step for at in (0, size, 2 * size) for step in (-1, 0, 1)]
    for position in range(2 * size + 2) if size < 64 else [at for at in around if at >= 0]:
        world = World(position)
        world.driver.enable(8, 8)
        world.create(1, size, [size])
        world.work(world.driver.sqs[1], position, depth=min(size, 16))
        fill(world, world.driver.sqs[1], in_flight)
        world.come_to_rest()
        world.switch()
        finish(world)


def test_every_position_of_the_admin_rings_with_events_under_way() -> None:
    for position in range(20):
        world = World(position)
        driver = world.driver
        driver.enable(6, 5)
        world.create(1, 4, [4])
        for _ in range(3):
            driver.submit(driver.sqs[0], 0x0C)
            world.here.run()
        for _ in range(position):
            world.admin(0x06, prp1=GUEST_IOVA + (511 << 12), dwords=(1,))
        world.come_to_rest()
        slots = {(driver.sqs[0].tail - 1 - at) % 6 for at in range(3)}
        before = bytes(world.memory.bytes)
        world.switch()
        base = driver.sqs[0].base - GUEST_IOVA
        changed = {
            (at - base) // 64 for at in range(len(before)) if before[at] != world.memory.bytes[at]
        }
        assert changed <= slots
        finish(world)


@pytest.mark.parametrize("walks_ahead", [False, True])
def test_completions_that_the_driver_has_not_taken_stay_there(walks_ahead: bool) -> None:
    for position in range(12):
        for unconsumed in range(1, 5):
            world = World(position)
            driver = world.driver
            driver.enable(8, 8)
            world.create(1, 5, [5])
            world.work(driver.sqs[1], position)
            if walks_ahead:
                world.ahead()
            for _ in range(unconsumed):
                driver.read_or_write(driver.sqs[1], world.random)
            world.come_to_rest()
            world.switch()
            queue = world.target.cqs[1]
            assert (queue.tail - queue.head) % 5 == unconsumed
            assert world.on_target.signals == [1]
            finish(world)


def test_i8_a_walk_that_ends_at_any_of_its_commands_leaves_the_guest_alone() -> None:
    """Ahead of time or in the pause: the guest goes on at the source, and moves the next time."""
    step, done = 0, False
    while not done:
        world = World(step)
        world.driver.enable(6, 5)
        world.create(1, 5, [4])
        world.driver.submit(world.driver.sqs[0], 0x0C)
        world.here.run()
        world.work(world.driver.sqs[1], 7)
        before = bytes(world.memory.bytes)
        done = world.abort(step)
        assert bytes(world.memory.bytes) == before
        world.work(world.driver.sqs[1], 3)
        world.come_to_rest()
        world.switch()
        finish(world)
        step += 1
    assert step > 30


def test_a_queue_may_be_used_before_its_making_was_acknowledged() -> None:
    world = World(12)
    driver = world.driver
    driver.enable(8, 8)
    world.create(1, 8, [8])
    sq = driver.sqs.pop(1)
    world.admin(0x00, dwords=(1,))
    driver.sqs[1] = sq
    sq.tail = sq.head = 0
    driver.submit(driver.sqs[0], 0x01, prp1=sq.base, dwords=(7 << 16 | 1, 1 << 16 | 1))
    world.here.run()
    world.work(sq, 3)
    driver.take(driver.cqs[0])
    world.come_to_rest()
    world.switch()
    finish(world)


def test_a_walk_ahead_leaves_little_for_the_downtime() -> None:
    world = World(1)
    world.driver.enable(32, 32)
    world.create(1, 1024, [1024])
    world.work(world.driver.sqs[1], 1500, depth=16)
    world.ahead()
    world.work(world.driver.sqs[1], 10)
    world.come_to_rest()
    executed = world.target.executed
    world.switch()
    assert world.target.executed - executed == 10
    finish(world)


def test_a_completion_queue_whose_submission_queue_was_deleted() -> None:
    world = World(2)
    world.driver.enable(16, 16)
    world.create(1, 16, [16])
    world.create(4, 8, [8])
    world.work(world.driver.sqs[4], 11)
    world.admin(0x00, dwords=(4,))
    del world.driver.sqs[4]
    world.come_to_rest()
    world.switch()
    cq = world.target.cqs[4]
    assert (cq.tail, cq.phase, cq.head) == (3, 0, 3)
    finish(world)


def test_features_are_set_again_in_their_order_with_their_data() -> None:
    world = World(3)
    driver = world.driver
    driver.enable(16, 16)
    buffer = world.memory.allocate(4096)
    world.memory.write(buffer, b"12345678")
    world.admin(0x09, dwords=(1 << 31 | 8, 0x0105))
    world.admin(0x09, dwords=(0x0E,), prp1=buffer)
    world.admin(0x09, dwords=(8, 0x0203))
    world.memory.write(buffer, b"overwritten")
    world.create(1, 8, [8])
    world.come_to_rest()
    world.switch()
    assert world.target.features == {0x0E: 0, 8: 0x0203}
    assert world.target.feature_data[0x0E] == b"12345678"
    finish(world)


def test_what_is_not_known_is_relayed_and_counted() -> None:
    world = World(4)
    world.driver.enable(8, 8)
    world.create(1, 8, [8])
    world.admin(0xC0)
    world.come_to_rest()
    world.switch()
    finish(world)


def test_a_controller_that_is_not_enabled_moves_with_its_properties() -> None:
    world = World(5)
    world.driver.enable(8, 8)
    world.driver.access(0x14, struct.pack("<I", 6 << 16 | 4 << 20))
    world.watch.read(0, 0x1C, bytes(4))
    world.come_to_rest()
    world.switch()
    assert not world.target.ready
    assert world.target.aqa == 7 << 16 | 7
    world.driver.cqs.clear()
    world.driver.sqs.clear()
    world.driver.enable(4, 4)
    world.create(1, 4, [4])
    finish(world)


def test_a_guest_moves_twice() -> None:
    world = World(6)
    world.driver.enable(8, 8)
    world.create(1, 16, [16])
    world.work(world.driver.sqs[1], 21)
    world.come_to_rest()
    world.switch()
    world.work(world.driver.sqs[1], 9)
    world.source, world.target = world.target, world.source
    world.on_target = type(world.on_target)(world.target)
    world.walk = NVME.walk(world.inventory)
    world.ahead()
    world.work(world.driver.sqs[1], 3)
    world.come_to_rest()
    world.switch()
    finish(world)


def test_other_queues_than_ahead_of_time_are_made_in_the_downtime() -> None:
    world = World(7)
    world.driver.enable(8, 8)
    world.create(1, 16, [16])
    world.ahead()
    world.create(4, 32, [8, 8])
    world.work(world.driver.sqs[5], 19)
    world.come_to_rest()
    world.switch()
    finish(world)


def test_a_full_completion_ring_is_told_from_a_busy_controller() -> None:
    world = World(8)
    driver = world.driver
    driver.enable(8, 8)
    world.create(1, 4, [16])
    for _ in range(6):
        driver.read_or_write(driver.sqs[1], world.random)
    world.here.step()
    world.watch.look()
    assert world.watch.rest() is Rest.BUSY
    world.here.run()
    world.watch.look()
    assert world.watch.rest() is Rest.BLOCKED
    driver.take(driver.cqs[1])
    world.come_to_rest()
    world.switch()
    finish(world)


def test_a_controller_that_refuses_the_walk_is_told() -> None:
    world = World(9)
    world.driver.enable(8, 8)
    world.create(1, 8, [8])
    world.target.max_queues = 1
    world.admin(0x09, dwords=(7, 0))
    world.come_to_rest()
    state = world.watch.state()
    run(world.walk.ahead(state), world.on_target)
    world.create(4, 8, [8])
    world.come_to_rest()
    with pytest.raises(CannotMove, match="the target's controller grants 1 and 1"):
        run(world.walk.ahead(world.watch.state()), world.on_target)


def test_a_command_that_fails_in_a_walk_ends_it() -> None:
    world = World(10)
    world.driver.enable(8, 8)
    world.create(1, 8, [8])
    world.work(world.driver.sqs[1], 3)
    world.come_to_rest()
    world.target._io = lambda taken: (0, 0x281)  # type: ignore[method-assign]
    with pytest.raises(WalkFailed, match="0x281"):
        run(world.walk.ahead(world.watch.state()), world.on_target)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state[:-1],
        lambda state: state.replace(b'"size": 8', b'"size": 1'),
        lambda state: state.replace(b'"size": 8', b'"size": 99999999'),
        lambda state: state.replace(b'"cq": 0', b'"cq": 7'),
        lambda state: state.replace(b'"sqs"', b'"rings"'),
        lambda state: state.replace(b'"create": "', b'"create": "00'),
        lambda state: state.replace(b'"id": 1', b'"id": -1'),
        lambda state: b"[" * 100_000,
        lambda state: b"null",
    ],
)
def test_i9_a_state_that_makes_no_sense_is_refused(damage: object) -> None:
    world = World(11)
    world.driver.enable(8, 8)
    world.create(1, 8, [8])
    state = world.watch.state()
    run(world.walk.ahead(state), world.on_target)
    with pytest.raises(StateError):
        run(world.walk.ahead(damage(state)), world.on_target)  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(30))
def test_what_a_controller_that_died_left_is_done_by_the_next(seed: int) -> None:
    """Whatever it had taken, executed or completed; twice in a row."""
    world = World(seed)
    driver, chance = world.driver, world.random
    driver.enable(6, 5)
    world.create(1, chance.choice([9, 16]), [chance.choice([7, 16]), 12])
    for _ in range(chance.randrange(4)):
        driver.submit(driver.sqs[0], 0x0C)
        world.here.run()
    for _ in range(chance.randrange(3)):
        world.work(driver.sqs[1], chance.randrange(1, 40), depth=5)
    for _ in range(chance.randrange(7)):
        sq = driver.sqs[chance.choice([1, 2])]
        if sq.room() and sum(key[0] in (1, 2) for key in driver.asked) < sq.cq.entries - 1:
            driver.read_or_write(sq, chance)
        for _ in range(chance.randrange(4)):
            world.here.step()
        if chance.random() < 0.3:
            driver.take(driver.cqs[1])
    if chance.random() < 0.5:
        driver.submit(driver.sqs[0], 0x06, prp1=GUEST_IOVA + (511 << 12), dwords=(1,))
        for _ in range(chance.randrange(3)):
            world.here.step()
    world.die()
    finish(world)


def test_what_may_not_be_done_twice_is_not() -> None:
    world = World(1)
    world.driver.enable(6, 5)
    world.create(1, 16, [16])
    world.driver.submit(world.driver.sqs[1], 0x7D, nsid=1)
    with pytest.raises(CannotMove, match="0x7d may have been executed"):
        world.watch.lost()
