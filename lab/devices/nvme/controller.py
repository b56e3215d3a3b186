"""An NVMe 1.4 controller on PCI, as the stock nvme driver knows it.

Owns the properties, the life of a command from ring to ring, and interrupts. Does not own the image
files (`lab.devices.disk`), nor the form of entries (`queues`).

===  ==========  =================================================================================
BAR  bytes       what
===  ==========  =================================================================================
0    0x4000      the properties; doorbells from 0x1000 on, 4 bytes each (stride 0)
4    0x1000      MSI-X table and, at 0x800, its pending bits
===  ==========  =================================================================================

A command is taken only when its completion has room, and is done before the next one is taken, by
one thread. Which ring is served next is chosen by an `arbiter`, so that a test can shuffle. A
controller that is reset begins every ring at 0: nothing but a walk brings it elsewhere. It offers
no VFIO migration. DMA needs bus mastering in the PCI command register.

Source: NVM Express Base Specification 1.4.
"""

import logging
import struct
from collections.abc import Callable, Sequence

from lab.devices.config_space import (
    Bar,
    BarKind,
    ConfigSpace,
    PciIdentity,
    error_reporting,
    express_capability,
    msix_capability,
)
from lab.devices.disk import SECTOR_BYTES, Disk
from lab.devices.errors import DeviceError, StateStreamError
from lab.devices.interrupts import Interrupts
from lab.devices.memory import MemoryAbsent, MemoryFault, Segment
from lab.devices.nvme import identity
from lab.devices.nvme.queues import (
    CompletionRing,
    Entry,
    Status,
    SubmissionRing,
    data_ranges,
)
from lab.devices.pci_device import MSIX_BAR_BYTES, MSIX_PBA_OFFSET, PciDevice
from sync.pci import Command
from sync.vfio_user.protocol import DmaFlags

logger = logging.getLogger(__name__)

CLASS_CODE = 0x010802
REGISTER_BAR, MSIX_BAR = 0, 4
BAR_BYTES = 0x4000
MAX_QUEUES = 64
MAX_QUEUE_SIZE = 4096
SERIAL_BYTES = 20

_CAP, _VS, _INTMS, _INTMC, _CC, _CSTS, _AQA, _ASQ, _ACQ = (
    *(0x00, 0x08, 0x0C, 0x10, 0x14, 0x1C),
    *(0x24, 0x28, 0x30),
)
_PROPERTIES = 0x40
_DOORBELLS = 0x1000
_CAPABILITIES = MAX_QUEUE_SIZE - 1 | 1 << 16 | 20 << 24 | 1 << 37
_READY, _FATAL = 1, 2
_SHUTDOWN_DONE = 2 << 2
_FEATURES = frozenset({0x01, 0x02, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B})

Arbiter = Callable[[Sequence[int]], int]
"""Chooses one of the submission rings, by ID, that have a command."""
_WORK = "work"


class NvmeController(PciDevice[str]):
    """A controller of `disks`, which are its namespaces 1, 2 and so on.

    `n_queues`: I/O queues that a driver may make. `serial`: up to 20 ASCII characters; the same for
    every controller that the namespaces may move to. Raises `DeviceError`.
    """

    def __init__(
        self,
        disks: Sequence[Disk],
        *,
        serial: str = "vfio-ferry",
        controller_id: int = 0,
        n_queues: int = 4,
        arbiter: Arbiter | None = None,
        logging_page_bytes: int | None = None,
    ) -> None:
        if not serial.isascii() or len(serial) > SERIAL_BYTES:
            raise DeviceError(f"a serial has up to {SERIAL_BYTES} ASCII characters: {serial!r}")
        if not 1 <= n_queues <= MAX_QUEUES:
            raise DeviceError(f"a controller has 1 to {MAX_QUEUES} I/O queues, not {n_queues}")
        self._disks = list(disks)
        self._serial = serial
        self._controller_id = controller_id
        self._n_queues = n_queues
        self._arbiter = arbiter or self._next_in_turn
        self._last_served = 0
        self._reset_controller()
        config = ConfigSpace(
            PciIdentity(
                identity.VENDOR_ID,
                identity.DEVICE_ID,
                CLASS_CODE,
                subsystem_vendor_id=identity.VENDOR_ID,
                subsystem_id=identity.DEVICE_ID,
            ),
            [Bar(REGISTER_BAR, BAR_BYTES, BarKind.MEMORY_64), Bar(MSIX_BAR, MSIX_BAR_BYTES)],
            [
                msix_capability(n_queues + 1, MSIX_BAR, 0, MSIX_BAR, MSIX_PBA_OFFSET),
                express_capability(),
            ],
            extended=[error_reporting()],
            interrupt_pin=1,
        )
        super().__init__(
            config,
            Interrupts(n_queues + 1),
            msix_bar=MSIX_BAR,
            n_workers=1,
            v2=False,
            logging_page_bytes=logging_page_bytes,
        )

    def close(self) -> None:
        super().close()
        for disk in self._disks:
            disk.close()

    # Properties.

    def bar_read(self, bar: int, offset: int, count: int) -> bytes:
        struct.pack_into("<I", self._properties, _CSTS, self._status)
        content = bytes(self._properties[offset : offset + count])
        return content.ljust(count, b"\0")

    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        value = int.from_bytes(data, "little")
        if offset >= _DOORBELLS:
            index, rest = divmod(offset - _DOORBELLS, 4)
            if not rest and len(data) == 4:
                self._doorbell(index // 2, bool(index % 2), value)
        elif offset == _INTMS:
            self._mask |= value
            self.update_line()
        elif offset == _INTMC:
            self._mask &= ~value
            self.update_line()
        elif offset == _CC:
            self._configure(value)
        elif offset >= _AQA and offset + len(data) <= _ACQ + 8:
            self._properties[offset : offset + len(data)] = data

    def _configure(self, value: int) -> None:
        (before,) = struct.unpack_from("<I", self._properties, _CC)
        if before & 1 and not value & 1:
            with self.workers.quiet():
                kept = self._properties[_AQA : _ACQ + 8]
                self._reset_controller()
                self._properties[_AQA : _ACQ + 8] = kept
            self.update_line()
        struct.pack_into("<I", self._properties, _CC, value)
        if value & 1 and not before & 1:
            self._enable(value)
        if value >> 14 & 3:
            self._status |= _SHUTDOWN_DONE

    def _enable(self, cc: int) -> None:
        (aqa,) = struct.unpack_from("<I", self._properties, _AQA)
        asq, acq = struct.unpack_from("<QQ", self._properties, _ASQ)
        sq_size, cq_size = (aqa & 0xFFF) + 1, (aqa >> 16 & 0xFFF) + 1
        if min(sq_size, cq_size) < 2 or cc >> 4 & 0x7F:
            self._status |= _FATAL
            return
        self._cqs[0] = CompletionRing(0, acq & -4096, cq_size, 0, True)
        self._sqs[0] = SubmissionRing(0, asq & -4096, sq_size, 0)
        self._status |= _READY

    def _doorbell(self, queue_id: int, completion: bool, value: int) -> None:
        ring = self._cqs.get(queue_id) if completion else self._sqs.get(queue_id)
        if ring is None or value >= ring.size:
            logger.debug("a doorbell of %d for queue %d, which cannot be", value, queue_id)
            return
        if isinstance(ring, CompletionRing):
            ring.head = value
            self.update_line()
        else:
            ring.tail = value
        self.memory.settle()
        self.workers.kick(_WORK)

    # Work.

    def step(self, work: str) -> None:
        able = [
            ring.id
            for ring in list(self._sqs.values())
            if ring.head != ring.tail and not self._cqs[ring.cq].is_full
        ]
        if not able or self._status & _FATAL:
            return
        ring = self._sqs[self._arbiter(able)]
        self._last_served = ring.id
        taken = False
        try:
            entry = ring.take(self.memory)
            taken = True
            outcome = self._execute(ring, entry)
            if outcome is not None:
                self._post(ring, entry.cid, *outcome)
        except MemoryAbsent as absent:
            # The next map kicks again.
            logger.debug("queue %d waits: %s", ring.id, absent)
            if taken:
                ring.put_back()
            return
        except MemoryFault as fault:
            logger.warning("queue %d lies where no memory is: %s", ring.id, fault)
            self._status |= _FATAL
            return
        self.workers.kick(work)

    def failed(self, work: str) -> None:
        self._status |= _FATAL

    def wake(self) -> None:
        self.workers.kick(_WORK)

    def _next_in_turn(self, able: Sequence[int]) -> int:
        return min(able, key=lambda ring_id: (ring_id <= self._last_served, ring_id))

    def _post(self, ring: SubmissionRing, cid: int, result: int, status: int) -> None:
        queue = self._cqs[ring.cq]
        queue.post(self.memory, ring, cid, result, status)
        if not queue.interrupts:
            return
        if self.config.msix_enabled:
            self.interrupts.signal(queue.vector)
        else:
            self.update_line()

    def _execute(self, ring: SubmissionRing, entry: Entry) -> tuple[int, int] | None:
        """Result and status; None: it completes later."""
        try:
            return self._admin(entry) if ring.id == 0 else (0, self._io(entry))
        except MemoryFault as fault:
            logger.debug("command %#x names no memory: %s", entry.opcode, fault)
            return 0, Status.DATA_TRANSFER_ERROR
        except OSError as error:
            logger.warning("command %#x failed: %s", entry.opcode, error.strerror)
            return 0, Status.INTERNAL_ERROR

    def _io(self, entry: Entry) -> int:
        if not 1 <= entry.nsid <= len(self._disks):
            return Status.INVALID_NAMESPACE
        disk = self._disks[entry.nsid - 1]
        if entry.opcode == 0x00:
            disk.flush()
            return Status.SUCCESS
        if entry.opcode not in (0x01, 0x02):
            return Status.INVALID_OPCODE
        lba, n_blocks = entry.cdw11 << 32 | entry.cdw10, (entry.cdw12 & 0xFFFF) + 1
        length = n_blocks * SECTOR_BYTES
        if length > 4096 << identity.MAX_TRANSFER_PAGES_LOG2:
            return Status.INVALID_FIELD
        if lba + n_blocks > disk.capacity_sectors:
            return Status.OUT_OF_RANGE
        offset = lba * SECTOR_BYTES
        if entry.opcode == 0x01:
            for segment in self._segments(entry, length, DmaFlags.READ):
                disk.write([memoryview(self.memory.read_segment(segment))], offset)
                offset += segment.length
        else:
            for segment in self._segments(entry, length, DmaFlags.WRITE):
                data = memoryview(bytearray(segment.length))
                disk.read([data], offset)
                self.memory.write_segment(segment, data)
                offset += segment.length
        return Status.SUCCESS

    def _segments(self, entry: Entry, length: int, flags: DmaFlags) -> list[Segment]:
        return [
            segment
            for address, count in data_ranges(entry, length, self.memory)
            for segment in self.memory.segments(address, count, flags)
        ]

    def _admin(self, entry: Entry) -> tuple[int, int] | None:
        match entry.opcode:
            case 0x00:
                return 0, self._delete_sq(entry.cdw10 & 0xFFFF)
            case 0x01:
                return 0, self._create_sq(entry)
            case 0x02:
                length = ((entry.cdw11 & 0xFFFF) << 16 | entry.cdw10 >> 16) * 4 + 4
                self._to_host(entry, bytes(min(length, identity.STRUCTURE_BYTES)))
                return 0, Status.SUCCESS
            case 0x04:
                return 0, self._delete_cq(entry.cdw10 & 0xFFFF)
            case 0x05:
                return 0, self._create_cq(entry)
            case 0x06:
                return 0, self._identify(entry)
            case 0x08:
                # Not aborted: what was submitted before is done already, or waits for an event.
                return 1, Status.SUCCESS
            case 0x09:
                return self._set_feature(entry)
            case 0x0A:
                fid = entry.cdw10 & 0xFF
                known = fid in _FEATURES
                result = self._features.get(fid, 0)
                return result, Status.SUCCESS if known else Status.INVALID_FIELD
            case 0x0C:
                if len(self._event_requests) == identity.MAX_EVENTS:
                    return 0, Status.TOO_MANY_EVENTS
                self._event_requests.append(entry.cid)
                return None
        return 0, Status.INVALID_OPCODE

    def _create_cq(self, entry: Entry) -> int:
        queue_id, size = entry.cdw10 & 0xFFFF, (entry.cdw10 >> 16) + 1
        vector = entry.cdw11 >> 16
        if not 1 <= queue_id <= self._n_queues or queue_id in self._cqs:
            return Status.QUEUE_ID_INVALID
        if not 2 <= size <= MAX_QUEUE_SIZE:
            return Status.QUEUE_SIZE_INVALID
        if not entry.cdw11 & 1 or entry.prp1 % 4096:
            return Status.INVALID_FIELD
        if vector > self._n_queues or (vector and not self.config.msix_enabled):
            return Status.VECTOR_INVALID
        ring = CompletionRing(queue_id, entry.prp1, size, vector, bool(entry.cdw11 & 2))
        self._cqs[queue_id] = ring
        return Status.SUCCESS

    def _create_sq(self, entry: Entry) -> int:
        queue_id, size = entry.cdw10 & 0xFFFF, (entry.cdw10 >> 16) + 1
        cq_id = entry.cdw11 >> 16
        if not cq_id or cq_id not in self._cqs:
            return Status.CQ_INVALID
        if not 1 <= queue_id <= self._n_queues or queue_id in self._sqs:
            return Status.QUEUE_ID_INVALID
        if not 2 <= size <= MAX_QUEUE_SIZE:
            return Status.QUEUE_SIZE_INVALID
        if not entry.cdw11 & 1 or entry.prp1 % 4096:
            return Status.INVALID_FIELD
        self._sqs[queue_id] = SubmissionRing(queue_id, entry.prp1, size, cq_id)
        return Status.SUCCESS

    def _delete_sq(self, queue_id: int) -> int:
        if not queue_id or queue_id not in self._sqs:
            return Status.QUEUE_ID_INVALID
        del self._sqs[queue_id]
        return Status.SUCCESS

    def _delete_cq(self, queue_id: int) -> int:
        if not queue_id or queue_id not in self._cqs:
            return Status.QUEUE_ID_INVALID
        if any(ring.cq == queue_id for ring in self._sqs.values()):
            return Status.QUEUE_IN_USE
        del self._cqs[queue_id]
        return Status.SUCCESS

    def _identify(self, entry: Entry) -> int:
        kind, nsid = entry.cdw10 & 0xFF, entry.nsid
        exists = 1 <= nsid <= len(self._disks)
        if kind == 1:
            data = identity.controller(self._serial, self._controller_id, len(self._disks))
        elif kind == 2:
            following = range(nsid + 1, len(self._disks) + 1)
            data = struct.pack(f"<{len(following)}I", *following)
            data = data.ljust(identity.STRUCTURE_BYTES, b"\0")
        elif kind in (0, 3) and not exists:
            return Status.INVALID_NAMESPACE
        elif kind == 0:
            n_blocks = self._disks[nsid - 1].capacity_sectors
            data = identity.namespace(self._serial, nsid, n_blocks)
        elif kind == 3:
            data = identity.descriptors(self._serial, nsid)
        else:
            return Status.INVALID_FIELD
        self._to_host(entry, data)
        return Status.SUCCESS

    def _set_feature(self, entry: Entry) -> tuple[int, int]:
        fid = entry.cdw10 & 0xFF
        if fid not in _FEATURES:
            return 0, Status.INVALID_FIELD
        value = entry.cdw11
        if fid == 0x07:
            value = (self._n_queues - 1) << 16 | (self._n_queues - 1)
        self._features[fid] = value
        return value if fid == 0x07 else 0, Status.SUCCESS

    def _to_host(self, entry: Entry, data: bytes) -> None:
        for segment in self._segments(entry, len(data), DmaFlags.WRITE):
            self.memory.write_segment(segment, data[: segment.length])
            data = data[segment.length :]

    # Interrupts and state.

    def update_line(self) -> None:
        pending = any(
            ring.interrupts and ring.head != ring.tail for ring in list(self._cqs.values())
        )
        asserted = pending and not self._mask & 1 and not self.config.msix_enabled
        self.config.interrupt_status = asserted
        disabled = bool(self.config.command & Command.INTX_DISABLE)
        self.interrupts.set_level(asserted and not disabled)

    def reset_function(self) -> None:
        self.workers.cancel_all()
        self.memory.forget_absent()
        self._reset_controller()

    def client_lost(self) -> frozenset[int]:
        return frozenset(
            ring.vector
            for ring in self._cqs.values()
            if ring.interrupts and ring.head != ring.tail and self.config.msix_enabled
        )

    def function_identity(self) -> bytes:
        return b""

    def save_function(self) -> bytes:
        raise StateStreamError("this device offers no VFIO migration")

    def load_function(self, state: bytes) -> Callable[[], None]:
        raise StateStreamError("this device offers no VFIO migration")

    def _reset_controller(self) -> None:
        self._properties = bytearray(_PROPERTIES)
        struct.pack_into("<QI", self._properties, _CAP, _CAPABILITIES, identity.VERSION)
        self._status = 0
        self._mask = 0
        self._sqs: dict[int, SubmissionRing] = {}
        self._cqs: dict[int, CompletionRing] = {}
        self._features: dict[int, int] = {}
        self._event_requests: list[int] = []
