"""A virtio 1.2 device on PCI, modern transport only: what every kind of virtio device shares.

Owns the capabilities, the register layout below, notifications, the ISR and who is interrupted
how, and the life of a request from ring to ring. Does not own what a request does: a kind of device
adds `execute` and its configuration.

=====  ========  ======  ==================================================================
BAR    offset    bytes   what
=====  ========  ======  ==================================================================
0      0x0000    0x38    common configuration; the registers from 0x18 on (but queue_select
                         itself, 0x16) are banked by queue_select, device_feature (0x04) by
                         device_feature_select (0x00), driver_feature (0x0c) by
                         driver_feature_select (0x08); device_status is 0x14
0      0x1000    1       ISR; read-to-clear
0      0x2000    kind's  device configuration; read-only
0      0x3000    4 n     notifications: queue i at 0x3000 + 4 i (multiplier 4), 2 bytes; a
                         write starts DMA; reads as 0
1      0x0000    16 v    MSI-X table; memory only, nothing follows from it
1      0x0800    v / 8   MSI-X pending bits; read-only
=====  ========  ======  ==================================================================

BAR 0 has 0x4000 bytes, BAR 1 has 0x1000, both are 32-bit memory; v = n + 1 vectors for n queues.
Capabilities: MSI-X at 0x40 (control word at 0x42), common 0x4c, notify 0x5c, ISR 0x70, device 0x80,
window into the BARs (`VIRTIO_PCI_CAP_PCI_CFG`) 0x90, and PCI Express 0xa4 if it is such a device.
An access to the window's data, 0xa0 to 0xa3 and nothing else, is an access to the BAR that it
shows; a read of more than that has no side effect. DMA needs bus mastering in the command register.

A device that takes over registers by replay touches no memory before it is notified. Notify every
enabled queue then: the driver may count on a notification that the device before it received.

Sources: virtio 1.2, sections 2 and 4.1; Linux, include/uapi/linux/virtio_pci.h.
"""

import logging
import struct
import threading
from abc import abstractmethod
from collections.abc import Callable
from enum import IntEnum, IntFlag

from lab.devices.config_space import (
    Bar,
    Capability,
    ConfigSpace,
    PciIdentity,
    error_reporting,
    express_capability,
    msix_capability,
)
from lab.devices.errors import StateStreamError
from lab.devices.interrupts import Interrupts
from lab.devices.memory import MemoryAbsent, MemoryFault
from lab.devices.pci_device import MSIX_BAR_BYTES, MSIX_PBA_OFFSET, PciDevice
from lab.devices.virtio.common_config import (
    COMMON_BYTES,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    NO_VECTOR,
    CommonConfiguration,
    Status,
)
from lab.devices.virtio.virtqueue import Chain, RingError, Virtqueue
from sync.pci import Command

logger = logging.getLogger(__name__)

VIRTIO_VENDOR_ID = 0x1AF4
_MODERN_DEVICE_ID = 0x1040
_SUBSYSTEM_ID = 0x1100

REGISTER_BAR = 0
MSIX_BAR = 1
BAR_BYTES = 0x4000
COMMON_OFFSET = 0x0000
ISR_OFFSET = 0x1000
DEVICE_OFFSET = 0x2000
NOTIFY_OFFSET = 0x3000
NOTIFY_MULTIPLIER = 4
_AREA_BYTES = 0x1000

_VENDOR_CAPABILITY_ID = 0x09
_WINDOW_DATA = 16
_WINDOW_DATA_BYTES = 4

MAX_QUEUES = 64


class _CapabilityType(IntEnum):
    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    WINDOW = 5


class Isr(IntFlag):
    """Why the INTx line is asserted."""

    QUEUE = 1
    CONFIGURATION = 2


class VirtioDevice(PciDevice[Virtqueue]):
    """A virtio device of kind `device_id`, as section 5 of the specification numbers them.

    `features`: bits of its kind; the transport adds its own. `config_bytes`: length of its device
    configuration. `queue_size`: the largest a driver may choose, a power of two. `express`: it is a
    PCI Express device with Advanced Error Reporting, else conventional PCI.
    The other arguments are those of `PciDevice`.
    """

    def __init__(
        self,
        device_id: int,
        class_code: int,
        *,
        features: int,
        config_bytes: int,
        n_queues: int,
        queue_size: int,
        n_workers: int,
        v2: bool,
        logging_page_bytes: int | None,
        express: bool,
    ) -> None:
        self._config_bytes = config_bytes
        self._isr = Isr(0)
        self.mute = ""
        """What it does not do: "interrupts", or "requests"."""
        self._line_lock = threading.Lock()
        n_vectors = n_queues + 1
        self.common = CommonConfiguration(
            features | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX,
            [Virtqueue(index, queue_size) for index in range(n_queues)],
            n_vectors,
            on_reset=self._reset_by_driver,
            on_driver_ok=self.wake,
        )
        capabilities = [
            msix_capability(n_vectors, MSIX_BAR, 0, MSIX_BAR, MSIX_PBA_OFFSET),
            _capability(_CapabilityType.COMMON, COMMON_OFFSET, COMMON_BYTES),
            _capability(
                _CapabilityType.NOTIFY,
                NOTIFY_OFFSET,
                NOTIFY_MULTIPLIER * n_queues,
                struct.pack("<I", NOTIFY_MULTIPLIER),
            ),
            _capability(_CapabilityType.ISR, ISR_OFFSET, 1),
            _capability(_CapabilityType.DEVICE, DEVICE_OFFSET, config_bytes),
            _window_capability(),
        ]
        config = ConfigSpace(
            PciIdentity(
                VIRTIO_VENDOR_ID,
                _MODERN_DEVICE_ID + device_id,
                class_code,
                revision_id=1,
                subsystem_vendor_id=VIRTIO_VENDOR_ID,
                subsystem_id=_SUBSYSTEM_ID,
            ),
            [Bar(REGISTER_BAR, BAR_BYTES), Bar(MSIX_BAR, MSIX_BAR_BYTES)],
            [*capabilities, express_capability()] if express else capabilities,
            extended=[error_reporting()] if express else [],
            interrupt_pin=1,
        )
        self._window = config.capability_offsets[len(capabilities) - 1]
        super().__init__(
            config,
            Interrupts(n_vectors),
            msix_bar=MSIX_BAR,
            n_workers=n_workers,
            v2=v2,
            logging_page_bytes=logging_page_bytes,
        )

    # What a kind of device adds.

    @abstractmethod
    def execute(self, chain: Chain) -> int:
        """Do a request, in any thread; the number of bytes written from its first writable one on.

        May raise `RingError` for a request that cannot be answered, and what memory raises.
        """

    @abstractmethod
    def device_config(self) -> bytes:
        """The device configuration, always of the same length."""

    # Registers.

    def bar_read(self, bar: int, offset: int, count: int) -> bytes:
        area, at = offset & -_AREA_BYTES, offset % _AREA_BYTES
        if area == COMMON_OFFSET:
            return self.common.read(at, count)
        if area == ISR_OFFSET and at == 0:
            return bytes([self._take_isr()]).ljust(count, b"\0")
        if area == DEVICE_OFFSET:
            return self.device_config()[at : at + count].ljust(count, b"\0")
        return bytes(count)

    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        area, at = offset & -_AREA_BYTES, offset % _AREA_BYTES
        if area == COMMON_OFFSET:
            self.common.write(at, data)
        elif area == NOTIFY_OFFSET:
            self._notify(at // NOTIFY_MULTIPLIER)

    def config_read(self, offset: int, count: int) -> bytes:
        if self._in_window(offset, count) and (target := self._window_target()):
            self.config.write(self._window + _WINDOW_DATA, self.region_read(*target))
        return super().config_read(offset, count)

    def config_write(self, offset: int, data: bytes) -> None:
        super().config_write(offset, data)
        if self._in_window(offset, len(data)) and (target := self._window_target()):
            bar, at, length = target
            self.region_write(bar, at, self.config.read(self._window + _WINDOW_DATA, length))

    # Requests.

    def step(self, work: Virtqueue) -> None:
        queue = work
        if not (self.common.is_live and queue.enabled):
            return
        try:
            chain = queue.take(self.memory)
            if chain is None:
                return
            try:
                if queue.has_more(self.memory):
                    self.workers.kick(queue)
                written = self.execute(chain)
                if queue.complete(self.memory, chain.head, written):
                    self._interrupt(queue.vector, Isr.QUEUE)
            except MemoryAbsent:
                queue.put_back(chain.head)
        except MemoryAbsent as absent:
            # The next map kicks the queue again.
            logger.debug("queue %d waits: %s", queue.index, absent)
        except (RingError, MemoryFault) as error:
            self._break(f"queue {queue.index}: {error}")

    def failed(self, work: Virtqueue) -> None:
        self._break(f"queue {work.index}: internal error")

    def wake(self) -> None:
        for queue in self.common.queues:
            if queue.notified:
                self.workers.kick(queue)

    # State.

    def update_line(self) -> None:
        with self._line_lock:
            self._drive_line()

    def reset_function(self) -> None:
        self.workers.cancel_all()
        self.common.reset()
        self.memory.forget_absent()
        self.interrupts.set_pending(frozenset())
        with self._line_lock:
            self._isr = Isr(0)
            self._drive_line()

    def client_lost(self) -> frozenset[int]:
        # Signalling once too often is harmless, once too little stops the driver for good.
        if not self.common.status & Status.DRIVER_OK:
            return frozenset()
        if not self._uses_msix():
            self._interrupt(NO_VECTOR, Isr.QUEUE)
            return frozenset()
        vectors = {queue.vector for queue in self.common.queues if queue.enabled}
        return frozenset(vectors | {self.common.config_vector}) - {NO_VECTOR}

    def function_identity(self) -> bytes:
        queues = self.common.queues
        shape = struct.pack("<QHH", self.common.offered, len(queues), queues[0].max_size)
        return shape + self.device_config()

    def save_function(self) -> bytes:
        parts = [bytes([self._isr]), *_prefixed(self.common.save())]
        for queue in self.common.queues:
            parts += _prefixed(queue.save())
        return b"".join(parts)

    def load_function(self, state: bytes) -> Callable[[], None]:
        if not state or state[0] & ~int(Isr.QUEUE | Isr.CONFIGURATION):
            raise StateStreamError("an impossible ISR")
        isr = Isr(state[0])
        common, *parts = _split(state[1:], 1 + len(self.common.queues))
        queues = []
        for mine, part in zip(self.common.queues, parts, strict=True):
            queue = Virtqueue(mine.index, mine.max_size)
            queue.load(part, self.interrupts.n_vectors)
            queues.append(queue)
        take_over_common = self.common.load(common, queues)

        def take_over() -> None:
            self.workers.cancel_all()
            take_over_common()
            with self._line_lock:
                self._isr = isr

        return take_over

    def _notify(self, index: int) -> None:
        if self.mute == "requests":
            return
        if index < len(self.common.queues) and self.common.queues[index].enabled:
            self.common.queues[index].notified = True
            self.memory.settle()
            self.workers.kick(self.common.queues[index])

    def _reset_by_driver(self) -> None:
        with self.workers.quiet():
            self.reset_function()

    def _break(self, reason: str) -> None:
        if self.common.needs_reset:
            return
        logger.warning("the driver has to reset the device: %s", reason)
        self.common.needs_reset = True
        if self.common.status & Status.DRIVER_OK:
            self._interrupt(self.common.config_vector, Isr.CONFIGURATION)

    def _interrupt(self, vector: int, cause: Isr) -> None:
        if self.mute == "interrupts":
            return
        if self._uses_msix():
            if vector != NO_VECTOR:
                self.interrupts.signal(vector)
            return
        with self._line_lock:
            self._isr |= cause
            self._drive_line()

    def _take_isr(self) -> Isr:
        with self._line_lock:
            isr, self._isr = self._isr, Isr(0)
            self._drive_line()
        return isr

    def _drive_line(self) -> None:
        pending = bool(self._isr) and not self._uses_msix()
        self.config.interrupt_status = pending
        disabled = bool(self.config.command & Command.INTX_DISABLE)
        self.interrupts.set_level(pending and not disabled)

    def _uses_msix(self) -> bool:
        # A VMM that keeps the capability to itself only ever sets up eventfds.
        return self.config.msix_enabled or self.interrupts.msix_configured

    def _in_window(self, offset: int, count: int) -> bool:
        start = self._window + _WINDOW_DATA
        return start <= offset and offset + count <= start + _WINDOW_DATA_BYTES

    def _window_target(self) -> tuple[int, int, int] | None:
        """(BAR, offset, length) that the window shows; None if it shows nothing legal."""
        raw = self.config.read(self._window, _WINDOW_DATA)
        bar, offset, length = struct.unpack("<4xB3xII", raw)
        if bar not in (REGISTER_BAR, MSIX_BAR) or length not in (1, 2, 4):
            return None
        size = BAR_BYTES if bar == REGISTER_BAR else MSIX_BAR_BYTES
        return (bar, offset, length) if offset % length == 0 and offset < size else None


def _capability(
    kind: _CapabilityType, offset: int, length: int, extra: bytes = b"", writable: bytes = b""
) -> Capability:
    total = 16 + len(extra)
    body = struct.pack("<BBB3xII", total, kind, REGISTER_BAR, offset, length) + extra
    return Capability(_VENDOR_CAPABILITY_ID, body, writable)


def _window_capability() -> Capability:
    writable = struct.pack("<xxB3xIII", 0xFF, *[0xFFFF_FFFF] * 3)
    return _capability(_CapabilityType.WINDOW, 0, 0, bytes(_WINDOW_DATA_BYTES), writable)


def _prefixed(part: bytes) -> tuple[bytes, bytes]:
    return struct.pack("<I", len(part)), part


def _split(data: bytes, count: int) -> list[bytes]:
    parts = []
    for _ in range(count):
        if len(data) < 4:
            raise StateStreamError("the state is truncated")
        (length,) = struct.unpack_from("<I", data)
        if 4 + length > len(data):
            raise StateStreamError("the state is truncated")
        parts.append(data[4 : 4 + length])
        data = data[4 + length :]
    if data:
        raise StateStreamError("bytes behind the last queue")
    return parts
