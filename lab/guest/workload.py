"""What the guest does with its disk and its RAM, and how it checks that nothing was lost.

Decides which request comes next and judges how each one ended; it drives no queue and no device.

- A block that is written consists of real content with a stamp (block, generation) in front. Its
  checksum goes to the block table once the device has acknowledged it.
- A read lands in the next buffer of the read area, is compared with the block table, and its
  checksum goes to the read table. Buffers are looked at again later: a buffer that has changed
  is a page that the device wrote and that was not carried along.
- At most one request at a time for each block, so that it is always known what it contains.
"""

import random
import struct
from typing import Any

from xxhash import xxh3_64_intdigest

from lab.guest.content import Content
from lab.guest.errors import GuestPanic
from lab.guest.fields import U64, Fields
from lab.guest.layout import BLOCK_ENTRY, READ_ENTRY, Layout
from lab.guest.options import GuestOptions
from lab.guest.ram import Ram
from lab.guest.report import Counters, Verification
from lab.guest.requests import Kind, Request
from sync.memory import PAGE_BYTES

STAMP = struct.Struct("<QQ")
COUNTER = struct.Struct("<Q")
DEVICE_ID_BYTES = 20
CPU_TICK_S = 0.02
"""How often the CPU does its own work, as a kernel's timer would have it do."""


class Workload:
    """The workload on one disk. `counters` and `verification` may be read from other threads."""

    def __init__(self, ram: Ram, layout: Layout, options: GuestOptions) -> None:
        self._ram = ram
        self._layout = layout
        self._options = options
        self._content = Content(options.content)
        self._random = random.Random(options.seed)
        self._n_blocks = layout.n_blocks
        self._busy_blocks: set[int] = set()
        self._busy_reads: set[int] = set()
        self._busy_writes: set[int] = set()
        self._next_read_buffer = 0
        self._next_write_buffer = 0
        self._next_cache_page = 0
        self._writes_since_flush = 0
        self._allowance = float(options.queue_depth)
        self._paced_at = 0.0
        self._cpu_at = 0.0
        self._cpu_owed = 0.0
        self.device_id = ""
        self.counters = Counters()
        self.verification = Verification()

    def limit_blocks(self, capacity_bytes: int) -> None:
        """Cuts the working set to the disk. Raises `GuestPanic` if too little is left."""
        self._n_blocks = min(self._layout.n_blocks, capacity_bytes // self._layout.block_bytes)
        if self._n_blocks < 2 * self._options.queue_depth:
            raise GuestPanic(f"a disk of {capacity_bytes} bytes is too small for this workload")

    def next_request(self, now: float) -> Request | None:
        """The next request, its data in place and held; None if there is none for now.

        `now`: seconds since the epoch.
        """
        request = self._choose(now)
        if request is not None:
            self.hold(request)
        return request

    def _choose(self, now: float) -> Request | None:
        if self.verification.running:
            return self._next_verifying()
        if not self._take_allowance(now):
            return None
        if 0 < self._options.flush_every <= self._writes_since_flush:
            self._writes_since_flush = 0
            return Request(Kind.FLUSH)
        block = self._random.randrange(self._n_blocks)
        while block in self._busy_blocks:
            block = self._random.randrange(self._n_blocks)
        _, generation = self._block_entry(block)
        if generation and self._random.random() < self._options.read_share:
            return self._read(block)
        return self._write(block, generation + 1)

    def get_id(self) -> Request:
        """The request with which a driver starts."""
        request = Request(Kind.GET_ID, buffer=self._take_read_buffer())
        self.hold(request)
        return request

    def data_address(self, request: Request) -> int:
        """Where the data of `request` is, or goes to."""
        if request.kind is Kind.WRITE:
            return self._layout.write_buffer(request.buffer)
        return self._layout.read_buffer(request.buffer)

    def data_bytes(self, request: Request) -> int:
        """How long it is."""
        if request.kind is Kind.GET_ID:
            return DEVICE_ID_BYTES
        return 0 if request.kind is Kind.FLUSH else self._layout.block_bytes

    def complete(self, request: Request, status: int, now: float) -> None:
        """Judges a request that the device has finished with `status` (0: well)."""
        counters = self.counters
        counters.operations += 1
        counters.longest_latency_s = max(counters.longest_latency_s, now - request.submitted_at)
        self.release(request)
        if status:
            counters.io_errors += 1
            counters.note(f"{request.kind} of block {request.block}: status {status}")
            self.verification.errors += request.verifying
            if request.kind is Kind.WRITE:
                # Nobody knows what the block contains now.
                self._store_block_entry(request.block, 0, 0)
        elif request.kind is Kind.READ:
            self._check_read(request)
        elif request.kind is Kind.WRITE:
            counters.writes += 1
            counters.written_bytes += self._layout.block_bytes
            self._store_block_entry(request.block, request.checksum, request.generation)
        elif request.kind is Kind.FLUSH:
            counters.flushes += 1
        else:
            raw = bytes(self._ram.view(self.data_address(request), DEVICE_ID_BYTES))
            self.device_id = raw.split(b"\0")[0].decode("ascii", "replace")
        self._end_verification_if_done()

    def hold(self, request: Request) -> None:
        """Keeps the block and the buffer of a request in flight from being used otherwise."""
        if request.kind is Kind.WRITE:
            self._busy_blocks.add(request.block)
            self._busy_writes.add(request.buffer)
        elif request.kind is Kind.READ:
            self._busy_blocks.add(request.block)
            self._busy_reads.add(request.buffer)
        elif request.kind is Kind.GET_ID:
            self._busy_reads.add(request.buffer)

    def release(self, request: Request) -> None:
        """The opposite of `hold`."""
        if request.kind is Kind.WRITE:
            self._busy_blocks.discard(request.block)
            self._busy_writes.discard(request.buffer)
        elif request.kind is Kind.READ:
            self._busy_blocks.discard(request.block)
            self._busy_reads.discard(request.buffer)
        elif request.kind is Kind.GET_ID:
            self._busy_reads.discard(request.buffer)

    def start_verification(self) -> int:
        """Has everything read back, instead of the usual requests; returns its number."""
        verification = self.verification
        if not verification.running:
            self.verification = Verification(verification.number + 1, True)
            self._verify_buffers()
        return self.verification.number

    def cpu_work(self, now: float) -> None:
        """What the CPU writes on its own account, if it is time: counters and cache pages."""
        elapsed = now - self._cpu_at
        if 0 <= elapsed < CPU_TICK_S:
            return
        self._cpu_at = now
        self._ram.store(self._layout.counters, COUNTER, self.counters.operations)
        self._cpu_owed += self._options.cpu_pages_per_s * min(max(elapsed, 0.0), 0.1)
        pages = min(int(self._cpu_owed), self._layout.n_cache_pages)
        self._cpu_owed -= int(self._cpu_owed)
        for _ in range(pages):
            page = self._next_cache_page
            self._next_cache_page = (page + 1) % self._layout.n_cache_pages
            address = self._layout.cache_area + page * PAGE_BYTES
            self._content.copy_to(self._ram, address, PAGE_BYTES)
        self.counters.cpu_pages += pages

    def idle_s(self, now: float, *, slots_free: bool) -> float:
        """How long the CPU may sleep if no interrupt comes, in seconds."""
        until_tick = max(0.0, min(CPU_TICK_S, self._cpu_at + CPU_TICK_S - now))
        rate = self._options.iops
        if not rate or not slots_free or self.verification.running:
            return until_tick
        self._refill(now)
        return min(until_tick, max(0.0, (1.0 - self._allowance) / rate))

    def state(self) -> dict[str, Any]:
        """VM state that is not in RAM."""
        return {
            "n_blocks": self._n_blocks,
            "next_read_buffer": self._next_read_buffer,
            "next_write_buffer": self._next_write_buffer,
            "next_cache_page": self._next_cache_page,
            "writes_since_flush": self._writes_since_flush,
            "random": self._random.getrandbits(64),
            "device_id": self.device_id,
            "counters": self.counters.to_json(),
            "verification": self.verification.to_json(),
        }

    def load_state(self, fields: Fields) -> None:
        """Takes `state` of the guest that this one continues. Raises `StreamError`."""
        layout = self._layout
        least_blocks = 2 * self._options.queue_depth
        self._n_blocks = fields.number("n_blocks", layout.n_blocks, least_blocks)
        self._next_read_buffer = fields.number("next_read_buffer", layout.n_read_buffers - 1)
        self._next_write_buffer = fields.number("next_write_buffer", layout.n_write_buffers - 1)
        self._next_cache_page = fields.number("next_cache_page", layout.n_cache_pages - 1)
        self._writes_since_flush = fields.number("writes_since_flush", U64)
        self._random.seed(fields.number("random", U64))
        self.device_id = fields.text("device_id", DEVICE_ID_BYTES)
        self.counters = Counters.from_json(fields.object("counters"))
        self.verification = Verification.from_json(fields.object("verification"))

    def _read(self, block: int, *, verifying: bool = False) -> Request:
        buffer = self._take_read_buffer()
        return Request(Kind.READ, block, buffer, verifying=verifying)

    def _write(self, block: int, generation: int) -> Request:
        while self._next_write_buffer in self._busy_writes:
            self._next_write_buffer = (self._next_write_buffer + 1) % self._layout.n_write_buffers
        buffer = self._next_write_buffer
        self._next_write_buffer = (buffer + 1) % self._layout.n_write_buffers
        address = self._layout.write_buffer(buffer)
        self._content.copy_to(self._ram, address, self._layout.block_bytes)
        self._ram.store(address, STAMP, block, generation)
        checksum = xxh3_64_intdigest(self._ram.view(address, self._layout.block_bytes))
        self._writes_since_flush += 1
        return Request(Kind.WRITE, block, buffer, checksum, generation)

    def _take_read_buffer(self) -> int:
        n_buffers = self._layout.n_read_buffers
        while self._next_read_buffer in self._busy_reads:
            self._next_read_buffer = (self._next_read_buffer + 1) % n_buffers
        buffer = self._next_read_buffer
        self._next_read_buffer = (buffer + 1) % n_buffers
        self._store_read_entry(buffer, 0, 0)
        return buffer

    def _next_verifying(self) -> Request | None:
        verification = self.verification
        while verification.next_block < self._n_blocks:
            block = verification.next_block
            if block in self._busy_blocks:
                return None
            verification.next_block += 1
            if self._block_entry(block)[1]:
                verification.blocks += 1
                return self._read(block, verifying=True)
        self._end_verification_if_done()
        return None

    def _end_verification_if_done(self) -> None:
        verification = self.verification
        if verification.next_block >= self._n_blocks and not self._busy_blocks:
            verification.running = False

    def _check_read(self, request: Request) -> None:
        counters = self.counters
        counters.reads += 1
        counters.read_bytes += self._layout.block_bytes
        address = self._layout.read_buffer(request.buffer)
        data = self._ram.view(address, self._layout.block_bytes)
        checksum = xxh3_64_intdigest(data)
        expected, generation = self._block_entry(request.block)
        if checksum == expected:
            self._store_read_entry(request.buffer, checksum, 1)
        else:
            block, found = STAMP.unpack_from(data)
            counters.checksum_errors += 1
            counters.note(
                f"block {request.block}, generation {generation}, read to {address:#x}: "
                f"its stamp says block {block}, generation {found}"
            )
            self.verification.errors += request.verifying
        if not request.verifying:
            self._check_buffer(self._random.randrange(self._layout.n_read_buffers))

    def _verify_buffers(self) -> None:
        before = self.counters.buffer_errors
        checked = self.counters.buffer_checks
        for buffer in range(self._layout.n_read_buffers):
            self._check_buffer(buffer)
        self.verification.buffers = self.counters.buffer_checks - checked
        self.verification.errors += self.counters.buffer_errors - before

    def _check_buffer(self, buffer: int) -> None:
        """Looks at a buffer again that was read some time ago."""
        checksum, known = self._ram.load(
            self._layout.read_table + buffer * READ_ENTRY.size, READ_ENTRY
        )
        if not known:
            return
        self.counters.buffer_checks += 1
        address = self._layout.read_buffer(buffer)
        if xxh3_64_intdigest(self._ram.view(address, self._layout.block_bytes)) != checksum:
            self.counters.buffer_errors += 1
            self.counters.note(f"the buffer at {address:#x} has changed since it was read")
            self._store_read_entry(buffer, 0, 0)

    def _block_entry(self, block: int) -> tuple[int, int]:
        """(checksum, generation) of what `block` has to contain."""
        checksum, generation = self._ram.load(
            self._layout.block_table + block * BLOCK_ENTRY.size, BLOCK_ENTRY
        )
        return checksum, generation

    def _store_block_entry(self, block: int, checksum: int, generation: int) -> None:
        address = self._layout.block_table + block * BLOCK_ENTRY.size
        self._ram.store(address, BLOCK_ENTRY, checksum, generation)

    def _store_read_entry(self, buffer: int, checksum: int, known: int) -> None:
        address = self._layout.read_table + buffer * READ_ENTRY.size
        self._ram.store(address, READ_ENTRY, checksum, known)

    def _take_allowance(self, now: float) -> bool:
        if not self._options.iops:
            return True
        self._refill(now)
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True

    def _refill(self, now: float) -> None:
        elapsed = min(max(0.0, now - self._paced_at), 1.0)
        self._paced_at = now
        self._allowance = min(
            float(self._options.queue_depth), self._allowance + elapsed * self._options.iops
        )
