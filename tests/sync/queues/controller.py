"""A model of an NVMe controller, written from the specification: numbers stand here a second time
on purpose. It does nothing by itself: `step` does one thing, in an order that a generator picks.
"""

import random
import struct
from dataclasses import dataclass, field

PAGE = 4096
BLOCK = 512


class Fault(Exception):
    """The controller reached for an address that it is not shown."""


class Space:
    """What a device sees: pages by number. A page is a view of somebody's memory."""

    def __init__(self) -> None:
        self.pages: dict[int, memoryview] = {}

    def show(self, iova: int, memory: memoryview) -> None:
        assert iova % PAGE == 0 and len(memory) % PAGE == 0
        for at in range(0, len(memory), PAGE):
            page = (iova + at) // PAGE
            assert page not in self.pages, f"{iova + at:#x} is shown already"
            self.pages[page] = memory[at : at + PAGE]

    def hide(self, iova: int, length: int) -> None:
        for page in range(iova // PAGE, (iova + length) // PAGE):
            del self.pages[page]

    def read(self, iova: int, length: int) -> bytes:
        result = b""
        while length:
            view, at = self._at(iova)
            part = bytes(view[at : at + length])
            result += part
            iova, length = iova + len(part), length - len(part)
        return result

    def write(self, iova: int, data: bytes) -> None:
        while data:
            view, at = self._at(iova)
            count = min(PAGE - at, len(data))
            view[at : at + count] = data[:count]
            iova, data = iova + count, data[count:]

    def _at(self, iova: int) -> tuple[memoryview, int]:
        page, at = divmod(iova, PAGE)
        if page not in self.pages:
            raise Fault(f"{iova:#x}")
        return self.pages[page], at


@dataclass
class Completion:
    base: int
    entries: int
    vector: int
    tail: int = 0
    head: int = 0
    phase: int = 1

    def full(self) -> bool:
        return (self.tail + 1) % self.entries == self.head


@dataclass
class Submission:
    base: int
    entries: int
    cq: int
    head: int = 0
    tail: int = 0


@dataclass
class Taken:
    sq: int
    entry: bytes

    @property
    def opcode(self) -> int:
        return self.entry[0]

    @property
    def cid(self) -> int:
        return int.from_bytes(self.entry[2:4], "little")

    def dword(self, number: int) -> int:
        return int.from_bytes(self.entry[4 * number : 4 * number + 4], "little")

    @property
    def prp1(self) -> int:
        return int.from_bytes(self.entry[24:32], "little")


@dataclass
class Controller:
    space: Space
    random: random.Random
    blocks: dict[int, bytes] = field(default_factory=dict)
    stride: int = 0
    serial: bytes = b"model-1"
    n_blocks: int = 4096
    metadata: int = 0
    max_queues: int = 16

    def __post_init__(self) -> None:
        self.interrupts: list[int] = []
        self.bad_status: list[str] = []
        self.executed = 0
        self.function_reset()

    # Properties.

    def function_reset(self) -> None:
        self.aqa = self.cc = 0
        self.asq = self.acq = bytes(8)
        self.mask = 0
        self.ready = False
        self._forget()

    def _forget(self) -> None:
        self.sqs: dict[int, Submission] = {}
        self.cqs: dict[int, Completion] = {}
        self.taken: list[Taken] = []
        self.events: list[Taken] = []
        self.features: dict[int, int] = {}
        self.feature_data: dict[int, bytes] = {}

    def read(self, offset: int, length: int) -> bytes:
        properties = bytearray(0x40)
        struct.pack_into(
            "<Q", properties, 0, 4095 | 1 << 16 | 20 << 24 | self.stride << 32 | 1 << 37
        )
        struct.pack_into("<I", properties, 8, 0x0002_0000)
        struct.pack_into("<I", properties, 0x14, self.cc)
        struct.pack_into("<I", properties, 0x1C, int(self.ready))
        return bytes(properties[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        value = int.from_bytes(data, "little")
        if offset >= 0x1000:
            number, rest = divmod(offset - 0x1000, 4 << self.stride)
            assert rest == 0 and len(data) == 4
            if number % 2:
                queue = self.cqs[number // 2]
                taken = (value - queue.head) % queue.entries
                there = (queue.tail - queue.head) % queue.entries
                assert value < queue.entries and taken <= there, "consumed what is not there"
                queue.head = value
            else:
                ring = self.sqs[number // 2]
                assert value < ring.entries
                ring.tail = value
        elif offset == 0x14:
            if value & 1 and not self.cc & 1:
                sizes = self.aqa & 0xFFF, self.aqa >> 16 & 0xFFF
                bases = (int.from_bytes(each, "little") for each in (self.asq, self.acq))
                self.sqs[0] = Submission(next(bases), sizes[0] + 1, 0)
                self.cqs[0] = Completion(next(bases), sizes[1] + 1, 0)
                self.ready = True
            if not value & 1 and self.cc & 1:
                self._forget()
                self.mask = 0
                self.ready = False
            self.cc = value
        elif 0x24 <= offset < 0x38 and self.cc & 1:
            raise AssertionError("the admin queue is set up at a controller that is enabled")
        elif offset == 0x24:
            self.aqa = value
        elif offset == 0x0C:
            self.mask |= value
        elif 0x28 <= offset < 0x30:
            self.asq = _patched(self.asq, offset - 0x28, data)
        elif 0x30 <= offset < 0x38:
            self.acq = _patched(self.acq, offset - 0x30, data)

    # Work.

    def step(self) -> bool:
        """Take one command, or complete one. Whether there was anything to do."""
        able: list[tuple[str, int]] = [
            ("take", queue_id) for queue_id, ring in self.sqs.items() if ring.head != ring.tail
        ]
        able += [
            ("complete", at)
            for at, each in enumerate(self.taken)
            if not self.cqs[self.sqs[each.sq].cq].full()
        ]
        if not able:
            return False
        what, which = self.random.choice(able)
        if what == "take":
            self._take(which)
        else:
            self._complete(self.taken.pop(which))
        return True

    def run(self) -> None:
        while self.step():
            pass

    def event(self) -> None:
        """Something happened that an event request waits for."""
        self._post(self.events.pop(0), 0x0001_0203, 0)

    def _take(self, queue_id: int) -> None:
        ring = self.sqs[queue_id]
        entry = self.space.read(ring.base + 64 * ring.head, 64)
        ring.head = (ring.head + 1) % ring.entries
        taken = Taken(queue_id, entry)
        if queue_id == 0 and taken.opcode == 0x0C:
            self.events.append(taken)
        else:
            self.taken.append(taken)

    def _complete(self, taken: Taken) -> None:
        self.executed += 1
        execute = self._admin if taken.sq == 0 else self._io
        result, status = execute(taken)
        if status:
            self.bad_status.append(f"opcode {taken.opcode:#x} of {taken.sq}: {status:#x}")
        self._post(taken, result, status)

    def _post(self, taken: Taken, result: int, status: int) -> None:
        ring = self.sqs[taken.sq]
        queue = self.cqs[ring.cq]
        assert not queue.full()
        entry = struct.pack(
            "<IIHHHH", result, 0, ring.head, taken.sq, taken.cid, status << 1 | queue.phase
        )
        self.space.write(queue.base + 16 * queue.tail, entry)
        queue.tail += 1
        if queue.tail == queue.entries:
            queue.tail, queue.phase = 0, 1 - queue.phase
        self.interrupts.append(queue.vector)

    def _admin(self, taken: Taken) -> tuple[int, int]:
        queue_id, entries = taken.dword(10) & 0xFFFF, (taken.dword(10) >> 16) + 1
        match taken.opcode:
            case 0x05:
                if queue_id in self.cqs or not 2 <= entries <= 4096:
                    return 0, 0x101
                self.cqs[queue_id] = Completion(taken.prp1, entries, taken.dword(11) >> 16)
            case 0x01:
                if queue_id in self.sqs or taken.dword(11) >> 16 not in self.cqs:
                    return 0, 0x101
                self.sqs[queue_id] = Submission(taken.prp1, entries, taken.dword(11) >> 16)
            case 0x00:
                if queue_id not in self.sqs:
                    return 0, 0x101
                del self.sqs[queue_id]
            case 0x04:
                if any(ring.cq == queue_id for ring in self.sqs.values()):
                    return 0, 0x10C
                del self.cqs[queue_id]
            case 0x06:
                self.space.write(taken.prp1, self._identify(taken.dword(10) & 0xFF))
            case 0x09:
                fid = taken.dword(10) & 0xFF
                self.features[fid] = taken.dword(11)
                if taken.prp1:
                    self.feature_data[fid] = self.space.read(taken.prp1, 8)
                if fid == 7:
                    return (self.max_queues - 1) << 16 | (self.max_queues - 1), 0
            case 0xC0:
                pass
            case _:
                return 0, 0x01
        return 0, 0

    def _identify(self, cns: int) -> bytes:
        data = bytearray(PAGE)
        if cns == 1:
            data[4:24] = self.serial.ljust(20)
            data[24:64] = b"model".ljust(40)
            data[64:72] = b"1.0".ljust(8)
        elif cns == 2:
            data[0:4] = struct.pack("<I", 1)
        elif cns == 0:
            struct.pack_into("<QQ", data, 0, self.n_blocks, self.n_blocks)
            struct.pack_into("<I", data, 128, 9 << 16 | self.metadata)
            data[104:120] = bytes(range(16))
        return bytes(data)

    def _io(self, taken: Taken) -> tuple[int, int]:
        lba = taken.dword(10)
        if taken.opcode == 0x02:
            self.space.write(taken.prp1, self.blocks.get(lba, bytes(BLOCK)))
        elif taken.opcode == 0x01:
            self.blocks[lba] = self.space.read(taken.prp1, BLOCK)
        elif taken.opcode != 0x00:
            return 0, 0x01
        return 0, 0


def _patched(old: bytes, at: int, data: bytes) -> bytes:
    return old[:at] + data + old[at + len(data) :]
