"""How a device interrupts: INTx as a level, MSI-X as messages, both by eventfd.

Owns the client's eventfds, the INTx line with its automatic mask, vectors that fired while nobody
listened, and the MSI-X table and pending bits as memory of the device. Does not own when a device
interrupts. Per-vector masks are the client's business, as with every VFIO device: a VMM keeps the
guest's MSI-X table itself and takes a masked vector's eventfd aside.

Sources: vfio-user, `VFIO_USER_DEVICE_SET_IRQS`; PCI 3.0, 6.8.2 (MSI-X).
"""

import errno
import os
import select
import struct
import threading

from sync.pci import MSIX_ENTRY_BYTES
from sync.vfio_user.protocol import IrqFlags, IrqInfo, IrqSet, PciIrq, SetIrqs, VfioUserError

_VECTOR_MASKED = struct.pack("<IIII", 0, 0, 0, 1)
_VECTOR_WRITABLE = struct.pack("<IIII", 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF_FFFF, 1)


class Interrupts:
    """One INTx line and `n_vectors` MSI-X vectors. Thread-safe."""

    def __init__(self, n_vectors: int) -> None:
        self.n_vectors = n_vectors
        self._lock = threading.Lock()
        self._line_fd: int | None = None
        self._line_asserted = False
        self._line_masked = False
        self._vector_fds: list[int | None] = [None] * n_vectors
        self._pending: set[int] = set()
        self._msix_configured = False

    @property
    def msix_configured(self) -> bool:
        """Whether the client set MSI-X up."""
        return self._msix_configured

    def info(self, index: int) -> IrqInfo:
        """Raises `VfioUserError` for an index that PCI does not have."""
        if index == PciIrq.INTX:
            flags = IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
            return IrqInfo(index, flags, 1)
        if index == PciIrq.MSIX:
            return IrqInfo(index, IrqFlags.EVENTFD | IrqFlags.NORESIZE, self.n_vectors)
        if index in (PciIrq.MSI, PciIrq.ERR, PciIrq.REQ):
            return IrqInfo(index, IrqFlags.EVENTFD, 0)
        raise VfioUserError(errno.EINVAL, f"interrupt index {index}")

    def set_irqs(self, request: SetIrqs, fds: list[int]) -> None:
        """Do what the client asks for. Owns `fds` when it returns. Raises `VfioUserError`."""
        count = self.info(request.index).count
        if request.start + request.count > count:
            raise VfioUserError(errno.EINVAL, f"index {request.index} has {count} interrupts")
        uses_fds = bool(request.flags & IrqSet.DATA_EVENTFD)
        if fds and (not uses_fds or len(fds) != request.count):
            raise VfioUserError(errno.EINVAL, f"{len(fds)} descriptors")
        with self._lock:
            if request.flags & IrqSet.ACTION_TRIGGER:
                if request.is_disable:
                    self._disable(request.index)
                elif uses_fds:
                    self._assign(request, fds)
                else:
                    self._trigger(request)
            elif request.index == PciIrq.INTX and not uses_fds and request.count:
                if request.flags & IrqSet.DATA_NONE or request.data[0]:
                    self._line_masked = bool(request.flags & IrqSet.ACTION_MASK)
                    self._fire_line()
            else:
                # Masks by eventfd would need a thread that listens; VMMs do without them.
                raise VfioUserError(errno.EINVAL, "only INTx is masked, and only by message")

    def set_level(self, asserted: bool) -> None:
        """Drive the INTx line."""
        with self._lock:
            self._line_asserted = asserted
            self._fire_line()

    def signal(self, vector: int) -> None:
        """Send an MSI-X message; it stays pending until somebody listens to its vector."""
        with self._lock:
            self._fire_vector(vector)

    def pending(self) -> frozenset[int]:
        """Vectors that fired while nobody listened."""
        with self._lock:
            return frozenset(self._pending)

    def set_pending(self, vectors: frozenset[int]) -> None:
        """Replace the pending vectors; those that somebody listens to fire now."""
        with self._lock:
            self._pending.clear()
            for vector in vectors:
                self._fire_vector(vector)

    def disconnect(self, unseen: frozenset[int] = frozenset()) -> None:
        """The client went, and its eventfds with it. What is pending stays pending.

        `unseen`: vectors that are pending too, because their last signal may be lost.
        """
        with self._lock:
            self._assign_line(None)
            self._assign_vectors(0, [None] * self.n_vectors)
            self._msix_configured = False
            self._pending |= unseen

    def reset(self) -> None:
        """Nothing is asserted or pending. The client's eventfds stay."""
        with self._lock:
            self._line_asserted = False
            self._line_masked = False
            self._pending.clear()

    def _disable(self, index: int) -> None:
        if index == PciIrq.INTX:
            self._assign_line(None)
        elif index == PciIrq.MSIX:
            self._assign_vectors(0, [None] * self.n_vectors)
            self._msix_configured = False

    def _assign(self, request: SetIrqs, fds: list[int]) -> None:
        taken: list[int | None] = [*fds] or [None] * request.count
        if request.index == PciIrq.INTX:
            self._assign_line(taken[0])
        else:
            self._msix_configured = True
            self._assign_vectors(request.start, taken)

    def _assign_line(self, fd: int | None) -> None:
        _close(self._line_fd)
        self._line_fd = fd
        self._line_masked = False
        self._fire_line()

    def _assign_vectors(self, start: int, fds: list[int | None]) -> None:
        for vector, fd in enumerate(fds, start):
            _close(self._vector_fds[vector])
            self._vector_fds[vector] = fd
            if vector in self._pending:
                self._fire_vector(vector)

    def _trigger(self, request: SetIrqs) -> None:
        chosen = [
            request.start + at
            for at in range(request.count)
            if request.flags & IrqSet.DATA_NONE or request.data[at]
        ]
        for number in chosen:
            fd = self._line_fd if request.index == PciIrq.INTX else self._vector_fds[number]
            if fd is not None:
                _signal(fd)

    def _fire_line(self) -> None:
        if self._line_asserted and not self._line_masked and self._line_fd is not None:
            self._line_masked = True
            _signal(self._line_fd)

    def _fire_vector(self, vector: int) -> None:
        fd = self._vector_fds[vector]
        if fd is None:
            self._pending.add(vector)
        else:
            self._pending.discard(vector)
            _signal(fd)


class MsixTable:
    """The MSI-X table as a driver reads and writes it in a BAR. Nothing follows from its values."""

    def __init__(self, n_vectors: int) -> None:
        self._initial = _VECTOR_MASKED * n_vectors
        self._bytes = bytearray(self._initial)

    def __len__(self) -> int:
        return len(self._bytes)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._bytes[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        for at, value in enumerate(data, offset):
            if at < len(self._bytes):
                mask = _VECTOR_WRITABLE[at % MSIX_ENTRY_BYTES]
                self._bytes[at] = (self._bytes[at] & ~mask) | (value & mask)

    def reset(self) -> None:
        self._bytes[:] = self._initial


def _signal(fd: int) -> None:
    # Never wait for a client: a full eventfd has a signal in it already, and a descriptor that is
    # something else harms only the client that sent it.
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if poller.poll(0):
        try:
            os.eventfd_write(fd, 1)
        except OSError:
            return


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
