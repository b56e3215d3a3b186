"""Where the guest keeps what in its RAM. Everything follows from the options.

    1 MiB   counters | queues | request slots | write area | cache area
    4 GiB   block table | read table | read area

The block table says what each block of the disk has to contain, the read table what each buffer
of the read area does: both are what the guest checks itself against, and they move in its RAM.
"""

import struct
from dataclasses import dataclass

from lab.guest.errors import GuestOptionsError
from lab.guest.nvme_queue import queues_bytes
from lab.guest.options import GuestOptions
from lab.guest.ram import HIGH_BASE, LOW_DMA_RESTART
from lab.guest.virtqueue import queue_bytes
from sync.memory import PAGE_BYTES

REQUEST_BYTES = 128
"""A slot of one request: virtio's header, status and indirect table, or NVMe's list of pages."""
BLOCK_ENTRY = struct.Struct("<QQ")
"""Checksum and generation of a block; generation 0: never written."""
READ_ENTRY = struct.Struct("<QQ")
"""Checksum of a buffer in the read area, and 1 if it is known."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Guest-physical addresses and how many of each there are."""

    counters: int
    queue: int
    requests: int
    write_area: int
    n_write_buffers: int
    cache_area: int
    n_cache_pages: int
    block_table: int
    n_blocks: int
    read_table: int
    read_area: int
    n_read_buffers: int
    block_bytes: int

    @classmethod
    def of(cls, options: GuestOptions) -> "Layout":
        """Raises `GuestOptionsError` if the RAM is too small for it."""
        low = _Allocator("low_bytes", LOW_DMA_RESTART, options.low_bytes)
        high = _Allocator("high_bytes", HIGH_BASE, HIGH_BASE + options.high_bytes)
        nvme = options.disk == "nvme"
        n_read_buffers = options.read_area_bytes // options.block_bytes
        return cls(
            counters=low.take(PAGE_BYTES),
            queue=low.take(queues_bytes(options) if nvme else queue_bytes(options.queue_size)),
            requests=low.take(options.queue_depth * REQUEST_BYTES),
            write_area=low.take(options.write_area_bytes),
            n_write_buffers=options.write_area_bytes // options.block_bytes,
            cache_area=low.take(options.cache_area_bytes),
            n_cache_pages=options.cache_area_bytes // PAGE_BYTES,
            block_table=high.take(options.blocks * BLOCK_ENTRY.size),
            n_blocks=options.blocks,
            read_table=high.take(n_read_buffers * READ_ENTRY.size),
            read_area=high.take(options.read_area_bytes),
            n_read_buffers=n_read_buffers,
            block_bytes=options.block_bytes,
        )

    def read_buffer(self, number: int) -> int:
        return self.read_area + number * self.block_bytes

    def write_buffer(self, number: int) -> int:
        return self.write_area + number * self.block_bytes


class _Allocator:
    def __init__(self, name: str, start: int, end: int) -> None:
        self._name = name
        self._next = start
        self._end = end

    def take(self, n_bytes: int) -> int:
        at = self._next
        self._next += -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
        if self._next > self._end:
            raise GuestOptionsError(
                f"{self._name} is too small for the workload by {self._next - self._end} bytes"
            )
        return at
