"""The eventfds that the VMM gave the device, so that each vector can be fired once by ourselves.

Owned here: duplicates of the descriptors. An interrupt that is lost around a stop leaves the guest
waiting for good, a spurious one costs it microseconds. Source: vfio-user, VFIO_USER_SET_IRQS.
"""

import os
import select

from sync.vfio_user.protocol import IrqSet, PciIrq, SetIrqs

MAX_VECTORS = 4096
"""Twice the largest MSI-X table: more than a device can have (PCI 3.0, 6.8.2)."""

_ASSIGN = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER


class Interrupts:
    """What SET_IRQS has set up, by index and vector."""

    def __init__(self) -> None:
        self._vectors: dict[int, dict[int, int]] = {}

    @property
    def n_vectors(self) -> int:
        return sum(len(vectors) for vectors in self._vectors.values())

    def apply(self, request: SetIrqs, descriptors: list[int]) -> None:
        """Follows a request that the device has accepted; takes `descriptors` over."""
        vectors = self._vectors.setdefault(request.index, {})
        if request.is_disable and request.flags & IrqSet.ACTION_TRIGGER:
            _close(vectors, list(vectors))
        elif request.flags == _ASSIGN:
            end = request.start + request.count
            _close(vectors, [vector for vector in vectors if request.start <= vector < end])
            for vector in range(request.start, min(end, request.start + len(descriptors))):
                if self.n_vectors >= MAX_VECTORS:
                    break
                vectors[vector] = descriptors.pop(0)
        for descriptor in descriptors:
            os.close(descriptor)

    def fire_all(self) -> int:
        """Fires every vector once; INTx only if there is no message-signalled one. Returns how
        many. A descriptor that cannot take an event now is passed over: its reader has one."""
        message_signalled = [
            descriptor
            for index, vectors in self._vectors.items()
            if index in (PciIrq.MSI, PciIrq.MSIX)
            for descriptor in vectors.values()
        ]
        intx = list(self._vectors.get(PciIrq.INTX, {}).values())
        fired = 0
        for descriptor in message_signalled or intx:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            if any(events & select.POLLOUT for _, events in poll.poll(0)):
                try:
                    os.write(descriptor, (1).to_bytes(8, "little"))
                except OSError:
                    continue
                fired += 1
        return fired

    def close(self) -> None:
        for vectors in self._vectors.values():
            _close(vectors, list(vectors))


def _close(vectors: dict[int, int], which: list[int]) -> None:
    for vector in which:
        os.close(vectors.pop(vector))
