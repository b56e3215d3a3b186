"""The guest's driver of a virtio disk: requests in the queue, interrupts, a device that dies.

Source: virtio 1.2, section 5.2 (block device). With INTx an interrupt counts only if the ISR
register says so.
"""

import struct
from typing import Any

from lab.guest.device_link import DeviceLink
from lab.guest.disk_driver import DiskDriver
from lab.guest.fields import U16, U64, Fields
from lab.guest.layout import REQUEST_BYTES, Layout
from lab.guest.options import SECTOR_BYTES, GuestOptions
from lab.guest.pci_function import load_bars
from lab.guest.ram import Ram
from lab.guest.requests import Kind, Request
from lab.guest.virtio_pci import (
    CONFIG_VECTOR,
    ISR_CONFIG,
    ISR_QUEUE,
    QUEUE_VECTOR,
    Feature,
    Found,
    Status,
    Structure,
    VirtioPci,
)
from lab.guest.virtqueue import Segment, SplitQueue
from lab.guest.workload import Workload
from sync.pci import BAR_COUNT

DEVICE_TYPE = 2
HEADER = struct.Struct("<IIQ")
STATUS = struct.Struct("<B")
STATUS_AT = 64
"""The status byte of a request slot; its indirect table lies between it and the header."""
NO_STATUS = 0xFF
TYPE_CODES = {Kind.READ: 0, Kind.WRITE: 1, Kind.FLUSH: 4, Kind.GET_ID: 8}
WANTED = {
    *(Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.RING_INDIRECT_DESC, Feature.BLK_FLUSH),
}


class BlockDriver(DiskDriver):
    """Drives one virtio-blk device."""

    def __init__(
        self,
        ram: Ram,
        layout: Layout,
        options: GuestOptions,
        link: DeviceLink,
        workload: Workload,
    ) -> None:
        super().__init__(layout, options, workload)
        self._ram = ram
        self._link = link
        self._transport = VirtioPci(link, DEVICE_TYPE, options.irq)
        self._queue = SplitQueue(ram, layout.queue, options.queue_size)
        self._indirect_owed = 0.0

    def start(self) -> None:
        self._queue.clear()
        self._transport.start(WANTED, self._queue.addresses, self._queue.size)
        capacity = self._transport.device_config(0, 4)
        capacity |= self._transport.device_config(4, 4) << 32
        if self.started:
            self._submit_again()
            return
        self._workload.limit_blocks(capacity * SECTOR_BYTES)
        self.started = True
        self._submit([self._workload.get_id()])

    def interrupt(self, vectors: set[int]) -> None:
        self._workload.counters.interrupts += len(vectors)
        if self._options.irq == "intx":
            isr = self._transport.read_isr()
            if isr & ISR_QUEUE:
                self._complete_used()
            if isr & ISR_CONFIG:
                self._look_at_status()
            if not isr:
                self._workload.counters.spurious_interrupts += 1
            self._link.intx_unmask()
            return
        if QUEUE_VECTOR in vectors:
            self._complete_used()
        if CONFIG_VECTOR in vectors:
            self._look_at_status()

    def recover(self) -> None:
        """A device that kept its state is only told again what may not have reached it, and what it
        has finished meanwhile is looked for, since interrupts had nowhere to go. Any other device
        is initialised.
        """
        self._workload.counters.device_reconnects += 1
        if not self.started:
            self.start()
            return
        self._transport.restore_config()
        status = self._transport.status()
        if status & Status.DRIVER_OK and not status & Status.NEEDS_RESET:
            self._transport.notify()
            self._complete(self._queue.take_used())
            if self._options.irq == "intx":
                self._link.intx_unmask()
        else:
            self._reset()

    def state(self) -> dict[str, Any]:
        found = self._transport.found
        return {
            "started": self.started,
            "found": found.to_json() if found is not None else None,
            "features": self._transport.features,
            "available_index": self._queue.available_index,
            "used_index": self._queue.used_index,
            "slots": self._slots_state(),
        }

    def load_state(self, fields: Fields) -> None:
        self.started = fields.flag("started")
        if self.started:
            self._transport.found = _load_found(fields.object("found"))
        self._transport.features = fields.number("features", U64)
        self._queue.available_index = fields.number("available_index", U16)
        self._queue.used_index = fields.number("used_index", U16)
        self._load_slots(fields)

    def _can_flush(self) -> bool:
        return self._transport.has(Feature.BLK_FLUSH)

    def _publish(self) -> None:
        self._queue.publish()
        self._transport.notify()

    def _add(self, slot: int, request: Request) -> None:
        request.indirect = self._next_is_indirect()
        base = self._layout.requests + slot * REQUEST_BYTES
        sector = request.block * (self._layout.block_bytes // SECTOR_BYTES)
        if request.kind not in (Kind.READ, Kind.WRITE):
            sector = 0
        self._ram.store(base, HEADER, TYPE_CODES[request.kind], 0, sector)
        self._ram.store(base + STATUS_AT, STATUS, NO_STATUS)
        segments = [Segment(base, HEADER.size, False)]
        length = self._workload.data_bytes(request)
        if length:
            address = self._workload.data_address(request)
            segments.append(Segment(address, length, request.kind is not Kind.WRITE))
        segments.append(Segment(base + STATUS_AT, STATUS.size, True))
        table = base + HEADER.size if request.indirect else None
        self._queue.add(slot, segments, table)

    def _complete_used(self) -> None:
        used = self._queue.take_used()
        if not used:
            self._workload.counters.spurious_interrupts += 1
        self._complete(used)

    def _complete(self, used: list[tuple[int, int]]) -> None:
        for slot, _written in used:
            self._in_flight(slot)
            (status,) = self._ram.load(
                self._layout.requests + slot * REQUEST_BYTES + STATUS_AT, STATUS
            )
            self._finish(slot, status)

    def _look_at_status(self) -> None:
        if self._transport.status() & Status.NEEDS_RESET:
            self._reset()

    def _reset(self) -> None:
        self._workload.counters.device_resets += 1
        self.start()

    def _next_is_indirect(self) -> bool:
        if not self._transport.has(Feature.RING_INDIRECT_DESC):
            return False
        self._indirect_owed += self._options.indirect_share
        if self._indirect_owed < 1.0:
            return False
        self._indirect_owed -= 1.0
        return True


def _load_found(fields: Fields) -> Found:
    def structure(name: str) -> Structure:
        member = fields.object(name)
        return Structure(
            member.number("bar", BAR_COUNT - 1),
            member.number("offset", (1 << 32) - 1),
            member.number("length", (1 << 32) - 1),
        )

    return Found(
        load_bars(fields),
        fields.number("msix_capability", 255),
        structure("common"),
        structure("notify"),
        structure("isr"),
        structure("device"),
        fields.number("notify_multiplier", (1 << 32) - 1),
        fields.number("notify_offset", U16),
    )
