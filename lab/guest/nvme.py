"""The guest's driver of an NVMe namespace: two I/O queues, a vector for each, events asked for.

Commands go to the two queues in turn. Source: NVM Express Base Specification 1.4, sections 3.1
(registers), 4.3 (PRP), 5 (admin commands), 7.6.1 (initialisation).
"""

import struct
import time
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from lab.guest import pci_function
from lab.guest.device_link import DeviceLink
from lab.guest.disk_driver import DiskDriver
from lab.guest.errors import GuestPanic, StreamError
from lab.guest.fields import Fields
from lab.guest.layout import REQUEST_BYTES, Layout
from lab.guest.nvme_queue import Completion, QueuePair, queue_sizes
from lab.guest.options import GuestOptions
from lab.guest.pci_function import AssignedBar, load_bars
from lab.guest.ram import Ram
from lab.guest.requests import Kind, Request
from lab.guest.workload import Workload
from sync import pci
from sync.memory import PAGE_BYTES

CLASS_CODE = 0x010802
BAR = 0
DEADLINE_S = 20.0
"""For the controller to get ready, and for an admin command."""
POLL_S = 0.0005
NAMESPACE = 1
N_IO_QUEUES = 2
EVENT_ID = 0xFFFF
"""Command ID of the event request; other admin commands have lower ones."""
PRP = struct.Struct("<Q")
MAX_BLOCK_LOG2 = 12


class Register(IntEnum):
    """Offsets in BAR 0 (NVMe Base Specification 2.0, 3.1.3)."""

    CAP = 0x00
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    DOORBELLS = 0x1000


class Admin(IntEnum):
    CREATE_SQ = 0x01
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    SET_FEATURES = 0x09
    EVENT_REQUEST = 0x0C


OPCODES = {Kind.FLUSH: 0x00, Kind.WRITE: 0x01, Kind.READ: 0x02}
CC_ENABLE = 1 | 6 << 16 | 4 << 20
"""With entries of 64 and of 16 bytes."""
READY, FATAL = 1, 2
NUMBER_OF_QUEUES = 7
CONTIGUOUS, INTERRUPTS = 1, 2


@dataclass(slots=True)
class Found:
    """What was found at boot. It is driver state, and moves with the guest."""

    bars: list[AssignedBar]
    doorbell_bytes: int
    block_log2: int = 0
    """Of a logical block, in bytes."""


class NvmeDriver(DiskDriver):
    """Drives the first namespace of one controller."""

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
        self._queues: list[QueuePair] = []
        at = layout.queue
        for sizes in queue_sizes(options):
            self._queues.append(QueuePair(ram, at, sizes))
            at = self._queues[-1].end
        self._page = at
        self._found: Found | None = None
        self._commands = 0
        """I/O commands submitted so far: every other one goes to the second queue."""
        self._told: list[int] = [0] * len(self._queues)
        """The submission tail that the device knows, of each queue."""

    def start(self) -> None:
        link = self._link
        class_code = link.config_read(8, 4) >> 8
        if class_code != CLASS_CODE:
            raise GuestPanic(f"the device has class {class_code:06x}, no NVMe controller")
        bars = pci_function.assign_bars(link)
        command = pci.Command.MEMORY | pci.Command.BUS_MASTER | pci.Command.INTX_DISABLE
        link.config_write(pci.COMMAND, 2, command)
        capabilities = self._read(Register.CAP) | self._read(Register.CAP + 4) << 32
        self._found = Found(bars, 4 << (capabilities >> 32 & 0xF))
        largest = (capabilities & 0xFFFF) + 1
        if any(max(queue.sizes) > largest for queue in self._queues):
            raise GuestPanic(f"the controller's queues have up to {largest} entries")
        self._enable()
        capacity = self._identify()
        self._make_queues()
        self._ask_for_event()
        if self.started:
            self._submit_again()
            return
        self._workload.limit_blocks(capacity)
        self.started = True

    def interrupt(self, vectors: set[int]) -> None:
        counters = self._workload.counters
        counters.interrupts += len(vectors)
        for number in sorted(vectors):
            completions = self._take(number)
            counters.spurious_interrupts += not completions
            for command_id, status, _ in completions:
                if number:
                    self._finish(command_id, status)
                elif command_id == EVENT_ID:
                    self._ask_for_event()
                else:
                    raise GuestPanic(f"the device finished admin command {command_id}")

    def recover(self) -> None:
        """The controller is initialised: a doorbell that got lost cannot be told from one that did
        not, and may not be written again."""
        self._workload.counters.device_reconnects += 1
        if self.started:
            self._workload.counters.device_resets += 1
        self.start()

    def state(self) -> dict[str, Any]:
        return {
            "started": self.started,
            "found": asdict(self._found) if self._found is not None else None,
            "queues": [queue.state() for queue in self._queues],
            "commands": self._commands % N_IO_QUEUES,
            "slots": self._slots_state(),
        }

    def load_state(self, fields: Fields) -> None:
        self.started = fields.flag("started")
        if self.started:
            found = fields.object("found")
            self._found = Found(
                load_bars(found),
                found.number("doorbell_bytes", 4 << 0xF, 4),
                found.number("block_log2", MAX_BLOCK_LOG2, 9),
            )
        queues = list(fields.objects("queues", len(self._queues)))
        if len(queues) != len(self._queues):
            raise StreamError("another number of queues")
        for queue, state in zip(self._queues, queues, strict=True):
            queue.load_state(state)
        self._told = [queue.sq_tail for queue in self._queues]
        self._commands = fields.number("commands", N_IO_QUEUES - 1)
        self._load_slots(fields)

    # Commands.

    def _add(self, slot: int, request: Request) -> None:
        number = 1 + self._commands % N_IO_QUEUES
        self._commands += 1
        if request.kind is Kind.FLUSH:
            self._queues[number].add(OPCODES[request.kind], slot, NAMESPACE, (0, 0))
            return
        assert self._found is not None
        n_blocks = self._layout.block_bytes >> self._found.block_log2
        lba = request.block * n_blocks
        self._queues[number].add(
            OPCODES[request.kind],
            slot,
            NAMESPACE,
            self._data_pointer(slot, request),
            *(lba & 0xFFFF_FFFF, lba >> 32, n_blocks - 1),
        )

    def _data_pointer(self, slot: int, request: Request) -> tuple[int, int]:
        """Two pages, or one and a list of those that follow."""
        first = self._workload.data_address(request)
        n_pages = self._workload.data_bytes(request) // PAGE_BYTES
        if n_pages <= 2:
            return first, first + PAGE_BYTES if n_pages == 2 else 0
        at = self._layout.requests + slot * REQUEST_BYTES
        for number in range(1, n_pages):
            self._ram.store(at + PRP.size * (number - 1), PRP, first + number * PAGE_BYTES)
        return first, at

    def _publish(self) -> None:
        for number, queue in enumerate(self._queues):
            if queue.sq_tail != self._told[number]:
                self._told[number] = queue.sq_tail
                self._ring(2 * number, queue.sq_tail)

    def _take(self, number: int) -> list[Completion]:
        queue = self._queues[number]
        completions = queue.take()
        if completions:
            self._ring(2 * number + 1, queue.cq_head)
        return completions

    # The controller.

    def _enable(self) -> None:
        self._write(Register.CC, 0)
        self._await_ready(0)
        self._switch_interrupts_on()
        for queue in self._queues:
            queue.clear()
        self._told = [0] * len(self._queues)
        admin = self._queues[0]
        self._write(Register.AQA, (admin.sizes.cq - 1) << 16 | (admin.sizes.sq - 1))
        for register, address in (
            (Register.ASQ, admin.sq_address),
            (Register.ACQ, admin.cq_address),
        ):
            self._write(register, address & 0xFFFF_FFFF)
            self._write(register + 4, address >> 32)
        self._write(Register.CC, CC_ENABLE)
        self._await_ready(READY)

    def _switch_interrupts_on(self) -> None:
        found = (each for each in pci_function.capabilities(self._link))
        msix = [each.offset for each in found if each.id == pci.MSIX_CAPABILITY]
        if not msix or self._link.n_vectors < len(self._queues):
            raise GuestPanic(f"the controller has no MSI-X with {len(self._queues)} vectors")
        self._link.config_write(msix[0] + 2, 2, pci.MSIX_ENABLE)
        self._link.irqs_enable(len(self._queues))

    def _identify(self) -> int:
        """Takes the serial number and the format; returns the namespace's size in bytes."""
        self._admin(Admin.IDENTIFY, 0, self._page, 1)
        serial = bytes(self._ram.view(self._page + 4, 20))
        self._workload.device_id = serial.decode("ascii", "replace").strip()
        self._admin(Admin.IDENTIFY, NAMESPACE, self._page, 0)
        data = self._ram.view(self._page, PAGE_BYTES)
        (n_blocks,) = struct.unpack_from("<Q", data)
        (form,) = struct.unpack_from("<I", data, 128 + 4 * (data[26] & 0xF))
        log2: int = form >> 16 & 0xFF
        if form & 0xFFFF or not 9 <= log2 <= MAX_BLOCK_LOG2:
            raise GuestPanic(f"a namespace with a format that is not known: {form:#x}")
        assert self._found is not None
        self._found.block_log2 = log2
        return int(n_blocks) << log2

    def _make_queues(self) -> None:
        wanted = (N_IO_QUEUES - 1) << 16 | (N_IO_QUEUES - 1)
        given = self._admin(Admin.SET_FEATURES, 0, 0, NUMBER_OF_QUEUES, wanted)
        if min(given >> 16, given & 0xFFFF) < N_IO_QUEUES - 1:
            raise GuestPanic("the controller has too few I/O queues")
        for number, queue in enumerate(self._queues[1:], 1):
            flags = number << 16 | CONTIGUOUS
            size = (queue.sizes.cq - 1) << 16 | number
            self._admin(Admin.CREATE_CQ, 0, queue.cq_address, size, flags | INTERRUPTS)
            size = (queue.sizes.sq - 1) << 16 | number
            self._admin(Admin.CREATE_SQ, 0, queue.sq_address, size, flags)

    def _ask_for_event(self) -> None:
        self._queues[0].add(Admin.EVENT_REQUEST, EVENT_ID, 0, (0, 0))
        self._publish()

    def _admin(self, opcode: int, namespace: int, address: int, *cdws: int) -> int:
        """One command, and its result. Raises `GuestPanic` if it fails or does not end."""
        self._queues[0].add(opcode, 0, namespace, (address, 0), *cdws)
        self._publish()
        deadline = time.monotonic() + DEADLINE_S
        while True:
            if 0 in self._link.take_interrupts():
                for completion in self._take(0):
                    if completion.status:
                        raise GuestPanic(f"admin command {opcode:#x} failed: {completion}")
                    return completion.result
            if time.monotonic() > deadline:
                raise GuestPanic(f"admin command {opcode:#x} does not end in {DEADLINE_S:g} s")
            time.sleep(POLL_S)

    def _await_ready(self, wanted: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while (status := self._read(Register.CSTS)) & READY != wanted:
            if status & FATAL or time.monotonic() > deadline:
                raise GuestPanic(f"the controller does not get ready: its status is {status:#x}")
            time.sleep(POLL_S)

    def _read(self, register: int) -> int:
        return self._link.bar_read(BAR, register, 4)

    def _write(self, register: int, value: int) -> None:
        self._link.bar_write(BAR, register, 4, value)

    def _ring(self, index: int, value: int) -> None:
        assert self._found is not None
        self._write(Register.DOORBELLS + index * self._found.doorbell_bytes, value)
