"""A model of a virtio block or entropy device on PCI, written from the specification (virtio 1.2):
numbers stand here a second time on purpose. It does nothing by itself: `step` does one thing, in an
order that a generator picks. It objects to what a driver must not do.
"""

import random
import struct
from dataclasses import dataclass, field

from tests.sync.queues.controller import Space

BAR = 4
COMMON, ISR, DEVICE, NOTIFY = 0x000, 0x100, 0x200, 0x1000
CONFIG = 7
MULTIPLIER = 8
INDIRECT, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
SECTOR = 512
CAPACITY = 4096


@dataclass
class Request:
    head: int
    readable: bytes
    writable: list[tuple[int, int]]


@dataclass
class Queue:
    size: int
    vector: int = 0xFFFF
    enabled: bool = False
    addresses: list[int] = field(default_factory=lambda: [0, 0, 0])
    taken: int = 0
    used: int = 0
    requests: list[Request] = field(default_factory=list)
    awake: bool = False
    """It looks at its ring by itself, and wants no kick."""

    @property
    def at_rest(self) -> bool:
        return not self.requests and not self.awake


class Model:
    """`kind` 2 is block, 4 entropy."""

    def __init__(
        self,
        space: Space,
        generator: random.Random,
        blocks: dict[int, bytes],
        *,
        kind: int = 2,
        sizes: tuple[int, ...] = (16,),
        offered: int = VERSION_1 | INDIRECT | EVENT_IDX | 1 << 9 | 1 << 11,
        begins_at_used: bool = False,
        device_id: int = 0,
    ) -> None:
        self.space, self.random, self.blocks = space, generator, blocks
        self.kind, self.sizes, self.offered = kind, sizes, offered
        self.begins_at_used = begins_at_used
        self.device_id = device_id or 0x1040 + kind
        self.capacity = CAPACITY
        self.interrupts: list[int] = []
        self.executed = 0
        self.function_reset()

    def function_reset(self) -> None:
        self.status = self.features = 0
        self.selects = [0, 0, 0]
        self.config_vector = 0xFFFF
        self.writeback = b"\1"
        self.queues = [Queue(size) for size in self.sizes]

    # Registers.

    def read(self, region: int, offset: int, length: int) -> bytes:
        if region == CONFIG:
            return self._config_space()[offset : offset + length]
        assert region == BAR
        if offset >= DEVICE:
            return self._device_config()[offset - DEVICE : offset - DEVICE + length]
        common = bytearray(0x40)
        words = [self.offered >> 32 * at & 0xFFFF_FFFF if at < 2 else 0 for at in self.selects[:2]]
        struct.pack_into("<III", common, 0, self.selects[0], words[0], self.selects[1])
        struct.pack_into(
            "<HHBB", common, 0x10, self.config_vector, len(self.queues), self.status, 0
        )
        struct.pack_into("<H", common, 0x16, self.selects[2])
        if self.selects[2] < len(self.queues):
            queue = self.queues[self.selects[2]]
            head = (queue.size, queue.vector, int(queue.enabled), self.selects[2])
            struct.pack_into("<4H3Q", common, 0x18, *head, *queue.addresses)
        assert offset + length <= 0x38
        return bytes(common[offset : offset + length])

    def write(self, region: int, offset: int, data: bytes) -> None:
        if region == CONFIG:
            return
        assert region == BAR
        value = int.from_bytes(data, "little")
        if offset >= NOTIFY:
            index, rest = divmod(offset - NOTIFY, MULTIPLIER)
            assert rest == 0 and value == index and len(data) == 2
            assert self.status & 4, "a kick before DRIVER_OK"
            self._wake(self.queues[index])
        elif offset >= DEVICE:
            assert offset == DEVICE + 32 and len(data) == 1
            self.writeback = data
        else:
            self._write_common(offset, len(data), value)

    def _write_common(self, offset: int, length: int, value: int) -> None:
        queue = self.queues[self.selects[2]] if self.selects[2] < len(self.queues) else None
        match offset, length:
            case (0x00, 4):
                self.selects[0] = value
            case (0x08, 4):
                self.selects[1] = value
            case (0x0C, 4):
                assert self.status & 2 and not self.status & 8, "features are settled"
                shift = 32 * self.selects[1]
                self.features = self.features & ~(0xFFFF_FFFF << shift) | value << shift
            case (0x10, 2):
                self.config_vector = value
            case (0x14, 1):
                self._write_status(value)
            case (0x16, 2):
                self.selects[2] = value
            case (0x18, 2):
                assert queue and not queue.enabled and value & (value - 1) == 0 < value
                assert value <= self.sizes[self.selects[2]]
                queue.size = value
            case (0x1A, 2):
                assert queue
                queue.vector = value
            case (0x1C, 2):
                assert queue and value == 1 and not queue.enabled, "enabled once"
                assert self.status & 8
                for address, alignment in zip(queue.addresses, (16, 2, 4), strict=True):
                    assert address % alignment == 0
                queue.enabled = True
            case (at, 4) if 0x20 <= at < 0x38:
                assert queue and not queue.enabled
                which, high = divmod(at - 0x20, 8)
                shift = 8 * high
                queue.addresses[which] &= ~(0xFFFF_FFFF << shift)
                queue.addresses[which] |= value << shift
            case _:
                raise AssertionError(f"{length} bytes at {offset:#x} of the common structure")

    def _write_status(self, value: int) -> None:
        if not value:
            self.function_reset()
            return
        assert not self.status & ~value, "a driver takes no bit back"
        if value & 8 and not self.status & 8 and self.features & ~self.offered:
            value &= ~8
        assert not value & 4 or value & 8, "DRIVER_OK without FEATURES_OK"
        if value & 4 and not self.status & 4 and self.begins_at_used:
            for queue in self.queues:
                if queue.enabled:
                    queue.taken = queue.used = self._number(queue.addresses[2] + 2)
        self.status = value

    def _device_config(self) -> bytes:
        config = bytearray(64)
        struct.pack_into("<QIIIIHBBIB", config, 0, self.capacity, 0, 0, 0, SECTOR, 0, 0, 0, 0, 0)
        config[32:33] = self.writeback
        return bytes(config)

    def _config_space(self) -> bytes:
        space = bytearray(256)
        struct.pack_into("<HH", space, 0, 0x1AF4, self.device_id)
        space[0x34] = 0x40
        at = 0x40
        places = [(1, COMMON, 0x38), (3, ISR, 4), (4, DEVICE, 64), (2, NOTIFY, 0x1000), (5, 0, 0)]
        for kind, offset, length in places:
            own = 20 if kind in (2, 5) else 16
            following = at + own if kind != 5 else 0
            struct.pack_into("<BBBBB3xII", space, at, 9, following, own, kind, BAR, offset, length)
            if kind == 2:
                struct.pack_into("<I", space, at + 16, MULTIPLIER)
            at += own
        return bytes(space)

    # Work.

    def step(self) -> bool:
        """Take a buffer, use one, or go to sleep. Whether there was anything to do."""
        able: list[tuple[str, Queue, int]] = []
        for queue in self.queues:
            if not (self.status & 4 and queue.enabled):
                continue
            if queue.awake:
                there = self._number(queue.addresses[1] + 2) != queue.taken
                able.append(("take" if there else "sleep", queue, 0))
            able += [("use", queue, at) for at in range(len(queue.requests))]
        if not able:
            return False
        what, queue, at = self.random.choice(able)
        if what == "take":
            self._take(queue)
        elif what == "use":
            self._use(queue, queue.requests.pop(at))
        else:
            self._sleep(queue)
        return True

    def run(self) -> None:
        while self.step():
            pass

    def _wake(self, queue: Queue) -> None:
        if queue.awake:
            return
        queue.awake = True
        if not self.features & EVENT_IDX:
            self._write_number(queue.addresses[2], 1)

    def _sleep(self, queue: Queue) -> None:
        """Want to be kicked again; look once more, for a kick may have been left out meanwhile."""
        if self.features & EVENT_IDX:
            self._write_number(queue.addresses[2] + 4 + 8 * queue.size, queue.taken)
        else:
            self._write_number(queue.addresses[2], 0)
        queue.awake = self._number(queue.addresses[1] + 2) != queue.taken

    def _take(self, queue: Queue) -> None:
        waiting = (self._number(queue.addresses[1] + 2) - queue.taken) % 65536
        assert waiting <= queue.size, "more buffers than the ring has entries"
        head = self._number(queue.addresses[1] + 4 + 2 * (queue.taken % queue.size))
        assert head not in {request.head for request in queue.requests}, "a buffer given twice"
        request = Request(head, b"", [])
        table, entries, at, seen = queue.addresses[0], queue.size, head, 0
        while True:
            assert at < entries and seen < entries, "a chain that leads nowhere"
            seen += 1
            raw = self.space.read(table + 16 * at, 16)
            address, length, flags, following = struct.unpack("<QIHH", raw)
            if flags & 4:
                assert self.features & INDIRECT and flags == 4 and seen == 1
                table, entries, at, seen = address, length // 16, 0, 0
                continue
            if flags & 2:
                request.writable.append((address, length))
            else:
                assert not request.writable, "what is read comes first"
                request.readable += self.space.read(address, length)
            if not flags & 1:
                break
            at = following
        queue.taken = (queue.taken + 1) % 65536
        queue.requests.append(request)

    def _use(self, queue: Queue, request: Request) -> None:
        answer = self._answer(request, sum(length for _, length in request.writable))
        written = len(answer)
        for address, length in request.writable:
            self.space.write(address, answer[:length])
            answer = answer[length:]
        at = queue.addresses[2] + 4 + 8 * (queue.used % queue.size)
        self.space.write(at, struct.pack("<II", request.head, written))
        queue.used = (queue.used + 1) % 65536
        self._write_number(queue.addresses[2] + 2, queue.used)
        self.executed += 1
        if queue.vector != 0xFFFF:
            self.interrupts.append(queue.vector)

    def _answer(self, request: Request, room: int) -> bytes:
        if self.kind == 4:
            assert not request.readable and room
            return self.random.randbytes(room)
        kind, _, sector = struct.unpack_from("<IIQ", request.readable)
        if kind == 8:
            return b"model".ljust(room - 1, b"\0") + b"\0"
        if kind == 0:
            assert room == SECTOR + 1
            return self.blocks.get(sector, bytes(SECTOR)) + b"\0"
        assert kind == 1 and len(request.readable) == 16 + SECTOR and room == 1
        self.blocks[sector] = request.readable[16:]
        return b"\0"

    def _number(self, iova: int) -> int:
        return int.from_bytes(self.space.read(iova, 2), "little")

    def _write_number(self, iova: int, value: int) -> None:
        self.space.write(iova, value.to_bytes(2, "little"))
