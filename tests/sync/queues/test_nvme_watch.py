"""What the watch refuses by name, and which pages it calls dirty."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.queues.choose import find_class, load_classes
from sync.queues.errors import CannotMove, StateError
from sync.queues.interface import run
from sync.queues.nvme.inventory import Inventory
from sync.registers.profile.locate import DeviceView
from tests.sync.queues.controller import PAGE, Controller
from tests.sync.queues.world import GUEST_IOVA, NVME, World


def world_at_work(seed: int = 1) -> World:
    world = World(seed)
    world.driver.enable(16, 16)
    world.create(1, 16, [16])
    return world


def answer_all(controller: Controller) -> None:
    """Every command succeeds, whatever it is."""
    controller._admin = controller._io = lambda taken: (0, 0)  # type: ignore[method-assign]


def test_a_controller_that_was_at_work_before_is_refused_until_it_is_reset() -> None:
    world = world_at_work()
    world.watch = NVME.watch(world.memory, world.inventory)
    world.work(world.driver.sqs[1], 2)
    assert "before the gateway saw it" in world.watch.refusals()[0]
    with pytest.raises(CannotMove, match="before the gateway saw it"):
        world.watch.state()
    world.driver.cqs.clear()
    world.driver.sqs.clear()
    world.driver.enable(8, 8)
    assert not world.watch.refusals()


@pytest.mark.parametrize(
    ("sq_id", "opcode", "dwords", "words"),
    [
        (0, 0x7C, (), "shadow doorbells"),
        (0, 0x09, (0x0D, 1), "host memory buffer"),
        (0, 0x80, (), "namespaces were formatted"),
        (0, 0x0D, (), "namespaces were formatted"),
        (0, 0x15, (), "namespaces were formatted"),
        (0, 0x84, (), "sanitize"),
        (0, 0x10, (), "firmware"),
        (0, 0x19, (), "directives"),
        (0, 0x1C, (), "virtual functions"),
        (0, 0x81, (), "security"),
        (0, 0x05, (7 << 16 | 9, 0), "one piece"),
        (1, 0x0D, (), "reservations"),
        (1, 0x11, (), "reservations"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_its_name(
    sq_id: int, opcode: int, dwords: tuple[int, ...], words: str
) -> None:
    world = world_at_work()
    answer_all(world.source)
    assert not world.watch.refusals()
    driver = world.driver
    driver.submit(driver.sqs[sq_id], opcode, dwords=dwords, nsid=1)
    world.here.run()
    driver.take(driver.sqs[sq_id].cq)
    with pytest.raises(CannotMove, match=words):
        world.watch.state()


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0x50, 3, "controller memory buffer"),
        (0xE04, 1, "persistent memory"),
        (0x14, 6 << 16 | 4 << 20 | 1 | 1 << 14, "shutting the controller down"),
    ],
)
def test_what_registers_say_is_refused_by_its_name(offset: int, value: int, words: str) -> None:
    world = world_at_work()
    world.watch.write(0, offset, struct.pack("<I", value))
    assert words in world.watch.refusals()[0]


def test_a_fatal_status_is_refused() -> None:
    world = world_at_work()
    world.watch.read(0, 0x1C, b"\x03\0\0\0")
    assert "fatal" in world.watch.refusals()[0]


def test_a_queue_outside_of_guest_memory_is_refused() -> None:
    world = world_at_work()
    answer_all(world.source)
    world.admin(0x01, prp1=0x10_0000_0000, dwords=(7 << 16 | 5, 1 << 16 | 1))
    world.watch.write(0, 0x1000 + 8 * 5, struct.pack("<I", 1))
    assert "controller memory buffer" in world.watch.refusals()[0]


@pytest.mark.parametrize("doorbell", [(0x1000, 99), (0x1000 + 8 * 7, 1), (0x100C, 5)])
def test_i9_a_guest_that_rings_wrongly_ends_nothing_but_its_move(doorbell: tuple[int, int]) -> None:
    world = world_at_work()
    world.watch.write(0, doorbell[0], struct.pack("<I", doorbell[1]))
    world.watch.look()
    assert "disagree" in world.watch.refusals()[0]


def test_a_reset_ends_what_it_ends_and_no_more() -> None:
    world = world_at_work()
    answer_all(world.source)
    for opcode in (0x7C, 0x84):
        world.admin(opcode)
    assert len(world.watch.refusals()) == 2
    world.driver.access(0x14, bytes(4))
    assert ["sanitize" in words for words in world.watch.refusals()] == [True]


def test_the_class_is_found_by_its_class_code() -> None:
    classes = load_classes()
    view = DeviceView(1, 2, 3, 4, 0x010802, bytes(256), {0: 0x4000})
    assert find_class(view, classes) is not None
    other = DeviceView(1, 2, 3, 4, 0x010000, bytes(256), {0: 0x4000})
    assert find_class(other, classes) is None


def test_namespaces_and_identity_are_compared() -> None:
    world = World(1)
    assert not NVME.differences(world.inventory, world.target_inventory)
    world.target.serial, world.target.n_blocks = b"model-2", 8192
    other = run(NVME.inventory(), world.on_target)
    names = [difference.name for difference in NVME.differences(world.inventory, other)]
    assert names == ["serial number", "namespace 1 blocks", "namespace 1 capacity"]


# Dirty pages.


def page(iova: int) -> int:
    return iova // PAGE


def test_i1_a_page_is_dirty_from_the_doorbell_until_the_round_after_its_completion() -> None:
    world = world_at_work()
    driver, watch = world.driver, world.watch
    watch.dirty()
    buffer = world.memory.allocate(PAGE)
    driver.submit(driver.sqs[1], 2, prp1=buffer, nsid=1)
    for _ in range(3):
        assert page(buffer) in watch.dirty()
    world.here.run()
    assert page(buffer) in watch.dirty()
    assert page(buffer) not in watch.dirty()
    assert not watch.dirty()


def test_what_is_under_way_when_tracking_begins_is_dirty() -> None:
    world = world_at_work()
    buffer = world.memory.allocate(PAGE)
    world.driver.submit(world.driver.sqs[1], 2, prp1=buffer, nsid=1)
    assert {page(buffer), page(world.driver.cqs[1].base)} <= world.watch.dirty()
    world.watch.forget_dirty()


def test_what_a_controller_may_write_until_it_says_that_it_was_reset_is_dirty() -> None:
    world = world_at_work()
    world.watch.dirty()
    buffer = world.memory.allocate(PAGE)
    world.driver.submit(world.driver.sqs[1], 2, prp1=buffer, nsid=1)
    world.watch.write(0, 0x14, bytes(4))
    world.watch.dirty()
    assert page(buffer) in world.watch.dirty()
    world.watch.read(0, 0x1C, bytes(4))
    assert page(buffer) in world.watch.dirty()
    assert not world.watch.dirty()


def submit_raw(world: World, flags: int, pointer: bytes, length_blocks: int) -> None:
    driver = world.driver
    sq = driver.sqs[1]
    entry = struct.pack("<BBHIIIQ", 2, flags, 77, 1, 0, 0, 0) + pointer
    entry += struct.pack("<IIIIII", 0, 0, length_blocks - 1, 0, 0, 0)
    world.memory.write(sq.base + 64 * sq.tail, entry)
    sq.tail = (sq.tail + 1) % sq.entries
    world.watch.write(0, 0x1008, struct.pack("<I", sq.tail))


def data_pages(world: World) -> set[int]:
    return world.watch.dirty() - {page(cq.base) for cq in world.driver.cqs.values()}


@pytest.mark.parametrize(("at", "n_blocks"), [(0, 8), (0x800, 4), (0x800, 5), (0, 16), (0xE00, 1)])
def test_a_transfer_of_one_or_two_pages(at: int, n_blocks: int) -> None:
    world = world_at_work()
    world.watch.dirty()
    first, second = world.memory.allocate(PAGE), world.memory.allocate(PAGE)
    submit_raw(world, 0, struct.pack("<QQ", first + at, second), n_blocks)
    wanted = {page(first)} | ({page(second)} if at + n_blocks * 512 > PAGE else set())
    assert data_pages(world) == wanted


@given(n_pages=st.integers(3, 40), at=st.integers(0, 511))
@settings(max_examples=30)
def test_a_list_of_pages_that_goes_on_at_the_end_of_its_page(n_pages: int, at: int) -> None:
    world = world_at_work()
    world.watch.dirty()
    lists = [world.memory.allocate(PAGE) for _ in range(45)]
    pages = [GUEST_IOVA + (400 + number) * PAGE for number in range(n_pages)]
    left, position, here = pages[1:], lists[0] + 8 * at, lists.pop(0)
    start = position
    while left:
        room = (here + PAGE - position) // 8
        part = left if len(left) <= room else left[: room - 1]
        left = left[len(part) :]
        following = [lists[0]] if left else []
        entries = struct.pack(f"<{len(part) + len(following)}Q", *part, *following)
        world.memory.write(position, entries)
        if left:
            position = here = lists.pop(0)
    submit_raw(world, 0, struct.pack("<QQ", pages[0], start), 8 * n_pages)
    assert data_pages(world) == {page(iova) for iova in pages}


def test_a_scatter_gather_list_with_a_segment_behind_another() -> None:
    world = world_at_work()
    world.watch.dirty()
    segment, last = world.memory.allocate(PAGE), world.memory.allocate(PAGE)
    one, two = world.memory.allocate(2 * PAGE), world.memory.allocate(PAGE)

    def descriptor(address: int, length: int, kind: int) -> bytes:
        return struct.pack("<QIxxxB", address, length, kind << 4)

    world.memory.write(segment, descriptor(one + 0x800, PAGE, 0) + descriptor(last, 32, 3))
    world.memory.write(last, descriptor(0, 512, 1) + descriptor(two, 512, 0))
    submit_raw(world, 0x40, descriptor(segment, 32, 2), 10)
    assert data_pages(world) == {page(one), page(one) + 1, page(two)}


def test_i9_lists_that_lead_in_circles_and_lengths_beyond_belief_end() -> None:
    world = world_at_work()
    world.watch.dirty()
    circle = world.memory.allocate(PAGE)
    world.memory.write(circle + PAGE - 8, struct.pack("<Q", circle + PAGE - 8))
    submit_raw(world, 0, struct.pack("<QQ", circle, circle + PAGE - 8), 65536)
    assert page(circle) in world.watch.dirty()
    submit_raw(world, 0x40, struct.pack("<QIxxxB", 0, 0xFFFF_FFFF, 0), 1)
    submit_raw(world, 0x40, struct.pack("<QIxxxB", circle, 0xFFFF_FFFF, 0x20), 1)
    assert "disagree" in world.watch.refusals()[0]


def test_a_command_of_unknown_length_names_all_that_it_may_write() -> None:
    world = world_at_work()
    world.watch.dirty()
    pages = [world.memory.allocate(PAGE) for _ in range(4)]
    at_its_end = pages[1] + PAGE - 16
    world.memory.write(at_its_end, struct.pack("<QQ", pages[2], pages[3]))
    driver = world.driver
    driver.submit(driver.sqs[0], 0xC2, prp1=pages[0], prp2=at_its_end)
    assert {page(iova) for iova in pages} <= world.watch.dirty()


@given(seed=st.integers(0, 1 << 32), depth=st.integers(1, 8), rounds=st.integers(1, 8))
@settings(max_examples=30)
def test_every_page_that_differs_was_named(seed: int, depth: int, rounds: int) -> None:
    """The oracle compares all of guest memory; the driver's own writes are known to it."""
    world = world_at_work(seed)
    driver, sq = world.driver, world.driver.sqs[1]
    world.watch.dirty()
    mine: set[int] = set()
    write = world.memory.write

    def noted(iova: int, data: bytes) -> None:
        mine.add(page(iova))
        write(iova, data)

    world.memory.write = noted  # type: ignore[method-assign]
    copy = bytes(world.memory.bytes)
    step: Callable[[], bool] = world.here.step
    for _ in range(rounds):
        for _ in range(min(depth, sq.room(), 15 - len([k for k in driver.asked if k[0]]))):
            driver.read_or_write(sq, world.random)
            step()
        if world.random.random() < 0.5:
            driver.take(sq.cq)
        while world.random.random() < 0.5 and step():
            pass
        named = world.watch.dirty() | mine
        for at in range(0, len(copy), PAGE):
            if copy[at : at + PAGE] != world.memory.bytes[at : at + PAGE]:
                assert page(GUEST_IOVA + at) in named
        copy = bytes(world.memory.bytes)
        mine.clear()


@pytest.mark.parametrize(
    "text",
    ["[" * 9000, '{"namespaces": {}, "controller": {}, "cap": 1e999, "version": 1}', "{}", "[]"],
    ids=lambda text: text[:20],
)
def test_i9_an_inventory_that_makes_no_sense_is_refused(text: str) -> None:
    """The peer sends it."""
    with pytest.raises(StateError):
        Inventory.unpack(text.encode())
