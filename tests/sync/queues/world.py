"""A guest with a driver, two model controllers, and an executor of plans."""

import contextlib
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from sync.queues.errors import MemoryUnreadable
from sync.queues.interface import (
    AwaitMemory,
    AwaitRegister,
    Command,
    MapScratch,
    Plan,
    ReadMemory,
    ReadRegister,
    ResetFunction,
    Rest,
    Signal,
    UnmapScratch,
    WriteMemory,
    WriteRegister,
    run,
)
from sync.queues.nvme.device_class import Nvme
from tests.sync.queues.controller import BLOCK, PAGE, Controller, Space

GUEST_IOVA = 0x40_0000
GUEST_PAGES = 512
CANARY = bytes(range(256)) * (PAGE // 256)
NVME = Nvme()


class Executor:
    """Executes plans on one controller; scratch memory is its own."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.signals: list[int] = []
        self.log: list[Command] = []

    def __call__(self, command: Command) -> bytes:
        self.log.append(command)
        space = self.controller.space
        match command:
            case ResetFunction():
                self.controller.function_reset()
            case ReadRegister(offset, length, region):
                return self.read(region, offset, length)
            case WriteRegister(offset, data, region):
                self.write(region, offset, data)
            case AwaitRegister(offset, length, mask, value, region):
                return self._await(lambda: self.read(region, offset, length), mask, value)
            case MapScratch(iova, length):
                space.show(iova, memoryview(bytearray(length)))
            case UnmapScratch(iova, length):
                space.hide(iova, length)
            case ReadMemory(iova, length):
                return space.read(iova, length)
            case WriteMemory(iova, data):
                space.write(iova, data)
            case AwaitMemory(iova, length, mask, value):
                return self._await(lambda: space.read(iova, length), mask, value)
            case Signal(vector):
                self.signals.append(vector)
        return b""

    def read(self, region: int, offset: int, length: int) -> bytes:
        assert region == 0
        return self.controller.read(offset, length)

    def write(self, region: int, offset: int, data: bytes) -> None:
        assert region == 0
        self.controller.write(offset, data)

    def _await(self, look: Callable[[], bytes], mask: int, value: int) -> bytes:
        while int.from_bytes(look(), "little") & mask != value:
            assert self.controller.step(), "the plan waits for what will never come"
        return look()


class GuestMemory:
    """Guest memory with a canary in every page."""

    def __init__(self) -> None:
        self.bytes = bytearray(CANARY * GUEST_PAGES)
        self.free = GUEST_IOVA

    def allocate(self, length: int) -> int:
        iova = self.free
        self.free += -(-length // PAGE) * PAGE
        assert self.free <= GUEST_IOVA + len(self.bytes)
        at = iova - GUEST_IOVA
        self.bytes[at : at + length] = bytes(length)
        return iova

    def read(self, iova: int, length: int) -> bytes:
        at = iova - GUEST_IOVA
        if at < 0 or at + length > len(self.bytes):
            raise MemoryUnreadable(f"{iova:#x}")
        return bytes(self.bytes[at : at + length])

    def write(self, iova: int, data: bytes) -> None:
        at = iova - GUEST_IOVA
        self.bytes[at : at + len(data)] = data

    def show_to(self, controller: Controller) -> None:
        controller.space.show(GUEST_IOVA, memoryview(self.bytes))

    def hide_from(self, controller: Controller) -> None:
        controller.space.hide(GUEST_IOVA, len(self.bytes))


@dataclass
class DriverCq:
    id: int
    base: int
    entries: int
    head: int = 0
    phase: int = 1


@dataclass
class DriverSq:
    id: int
    base: int
    entries: int
    cq: DriverCq
    tail: int = 0
    head: int = 0
    """As far as the controller said that it took commands."""

    def room(self) -> int:
        return (self.head - self.tail - 1) % self.entries


@dataclass
class Asked:
    opcode: int
    buffer: int
    expected: bytes | None = None
    lba: int | None = None


@dataclass
class Driver:
    """A driver that knows one controller's registers through `access`, and checks what it gets."""

    memory: GuestMemory
    access: Callable[[int, bytes], None]
    stride: int = 0
    cqs: dict[int, DriverCq] = field(default_factory=dict)
    sqs: dict[int, DriverSq] = field(default_factory=dict)
    asked: dict[tuple[int, int], Asked] = field(default_factory=dict)
    events: list[int] = field(default_factory=list)
    next_cid: int = 1
    buffers: list[int] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    written: dict[int, bytes] = field(default_factory=dict)

    def enable(self, sq_entries: int, cq_entries: int) -> None:
        self.access(0x14, struct.pack("<I", 0))
        self.cqs[0] = DriverCq(0, self.memory.allocate(16 * cq_entries), cq_entries)
        self.sqs[0] = DriverSq(0, self.memory.allocate(64 * sq_entries), sq_entries, self.cqs[0])
        self.access(0x24, struct.pack("<I", (cq_entries - 1) << 16 | (sq_entries - 1)))
        self.access(0x28, struct.pack("<Q", self.sqs[0].base))
        self.access(0x30, struct.pack("<Q", self.cqs[0].base))
        self.access(0x14, struct.pack("<I", 6 << 16 | 4 << 20 | 1))

    def submit(
        self,
        sq: DriverSq,
        opcode: int,
        *,
        prp1: int = 0,
        prp2: int = 0,
        dwords: tuple[int, ...] = (),
        nsid: int = 0,
    ) -> int:
        cid = self.next_cid
        self.next_cid = cid % 0xFFFE + 1
        assert (sq.id, cid) not in self.asked
        padded = (*dwords, *(0,) * (6 - len(dwords)))
        entry = struct.pack("<BBHIIIQQQ6I", opcode, 0, cid, nsid, 0, 0, 0, prp1, prp2, *padded)
        self.memory.write(sq.base + 64 * sq.tail, entry)
        sq.tail = (sq.tail + 1) % sq.entries
        self.asked[sq.id, cid] = Asked(opcode, prp1)
        self.access(0x1000 + 2 * sq.id * (4 << self.stride), struct.pack("<I", sq.tail))
        return cid

    def take(self, cq: DriverCq, most: int | None = None) -> int:
        """Consume completions and tell the controller."""
        count = 0
        while most is None or count < most:
            raw = self.memory.read(cq.base + 16 * cq.head, 16)
            _, _, sq_head, sq_id, cid, status = struct.unpack("<IIHHHH", raw)
            if status & 1 != cq.phase:
                break
            assert status >> 1 == 0
            asked = self.asked.pop((sq_id, cid))
            self.sqs[sq_id].head = sq_head
            if asked.expected is not None:
                assert self.memory.read(asked.buffer, BLOCK) == asked.expected
            if asked.lba is not None:
                self.busy.discard(asked.lba)
                self.buffers.append(asked.buffer)
            if asked.opcode == 0x0C and not sq_id:
                self.events.append(cid)
            cq.head += 1
            if cq.head == cq.entries:
                cq.head, cq.phase = 0, 1 - cq.phase
            count += 1
        if count:
            self.access(0x1000 + (2 * cq.id + 1) * (4 << self.stride), struct.pack("<I", cq.head))
        return count

    def read_or_write(self, sq: DriverSq, rng: random.Random) -> None:
        """One block, with content that is checked once it is there."""
        lba = rng.choice([lba for lba in range(256) if lba not in self.busy])
        self.busy.add(lba)
        buffer = self.buffers.pop() if self.buffers else self.memory.allocate(PAGE)
        expected = self.written.get(lba, bytes(BLOCK))
        writes = rng.random() < 0.5
        if writes:
            expected = self.written[lba] = rng.randbytes(BLOCK)
            self.memory.write(buffer, expected)
        cid = self.submit(sq, 1 if writes else 2, prp1=buffer, dwords=(lba,), nsid=1)
        self.asked[sq.id, cid] = Asked(1 if writes else 2, buffer, expected, lba)


class World:
    """A guest on a source, watched, with a target that nobody uses yet."""

    def __init__(self, seed: int, *, stride: int = 0) -> None:
        self.random = random.Random(seed)
        blocks: dict[int, bytes] = {}
        self.source = Controller(Space(), self.random, blocks, stride)
        self.target = Controller(Space(), self.random, blocks, stride)
        self.memory = GuestMemory()
        self.on_source, self.on_target = Executor(self.source), Executor(self.target)
        self.inventory = run(NVME.inventory(), self.on_source)
        self.target_inventory = run(NVME.inventory(), self.on_target)
        self.memory.show_to(self.source)
        self.watch = NVME.watch(self.memory, self.inventory)
        self.watch.reset()
        self.here = self.source
        self.driver = Driver(self.memory, self._access, stride)
        self.walk = NVME.walk(self.target_inventory)

    def _access(self, offset: int, data: bytes) -> None:
        self.watch.write(0, offset, data)
        self.here.write(offset, data)

    def create(self, queue_id: int, cq_entries: int, sq_entries: list[int]) -> None:
        """A completion queue, and its submission queues, numbered from `queue_id` on."""
        driver = self.driver
        cq = DriverCq(queue_id, self.memory.allocate(16 * cq_entries), cq_entries)
        driver.cqs[queue_id] = cq
        size = (cq_entries - 1) << 16 | queue_id
        self.admin(0x05, prp1=cq.base, dwords=(size, queue_id << 16 | 3))
        for number, entries in enumerate(sq_entries, queue_id):
            sq = DriverSq(number, self.memory.allocate(64 * entries), entries, cq)
            self.admin(
                0x01, prp1=sq.base, dwords=((entries - 1) << 16 | number, queue_id << 16 | 1)
            )
            driver.sqs[number] = sq

    def admin(self, opcode: int, **fields: object) -> None:
        """An admin command from its beginning to its end."""
        self.driver.submit(self.driver.sqs[0], opcode, **fields)  # type: ignore[arg-type]
        self.here.run()
        self.driver.take(self.driver.cqs[0])

    def work(self, sq: DriverSq, count: int, depth: int = 1) -> None:
        """`count` blocks, up to `depth` at a time, all completed and consumed."""
        while count:
            batch = min(count, depth, sq.room(), sq.cq.entries - 1)
            for _ in range(batch):
                self.driver.read_or_write(sq, self.random)
            self.here.run()
            assert self.driver.take(sq.cq) == batch
            count -= batch

    def come_to_rest(self) -> None:
        """The guest is paused: the controller ends what it has."""
        self.source.run()
        self.watch.look()
        assert self.watch.rest() is Rest.AT_REST

    def abort(self, steps: int) -> bool:
        """The walk, ahead of time and in the pause, ends behind so many of its commands, and the
        target is reset. Whether it had fewer."""
        state = self.watch.state()
        commands = chain(*(self._each(plan(state)) for plan in (self.walk.ahead, self.walk.finish)))
        fewer = sum(1 for _ in islice(commands, steps)) < steps
        self.target.space.pages.clear()
        self.target.function_reset()
        self.walk = NVME.walk(self.target_inventory)
        return fewer

    def _each(self, plan: Plan[None]) -> Iterator[None]:
        with contextlib.suppress(StopIteration):
            command = next(plan)
            while True:
                answer = self.on_target(command)
                yield
                command = plan.send(answer)

    def unnamed_pages_are_untouched(self) -> bool:
        """Those that no command of the guest has named (the last one is for its admin commands)."""
        free = self.memory.bytes[self.memory.free - GUEST_IOVA : -PAGE]
        return free == CANARY * (len(free) // PAGE)

    def switch(self) -> None:
        """Memory and accesses go to the target, as after the commit."""
        self._switch(self.watch.state())

    def die(self) -> None:
        """The source is gone, in the middle of whatever it did; the target takes its place."""
        self._switch(self.watch.lost())

    def _switch(self, state: bytes) -> None:
        before = bytes(self.memory.bytes)
        run(self.walk.finish(state), self.on_target)
        assert not self.target.space.pages
        assert bytes(self.memory.bytes) == before
        self.memory.hide_from(self.source)
        self.memory.show_to(self.target)
        self.here = self.target
        self.watch = NVME.watch(self.memory, self.target_inventory, state)
        run(self.walk.start(state), self.on_target)
        self.target.run()

    def ahead(self) -> None:
        before = bytes(self.memory.bytes)
        run(self.walk.ahead(self.watch.state()), self.on_target)
        assert bytes(self.memory.bytes) == before
