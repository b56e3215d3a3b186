"""The eventfds that the VMM gave the device, so that each vector can be fired once by ourselves.

Owned here: duplicates of the descriptors. An interrupt that is lost around a stop leaves the guest
waiting for good, a spurious one costs it microseconds. Source: vfio-user, VFIO_USER_SET_IRQS.

Who reads an eventfd has emptied it, so nobody else can see that a device interrupts. While that is
to be known the device gets *taps*, eventfds of ours, and what arrives there is passed on.
"""

import os
import select
from contextlib import suppress

from sync.vfio_user.protocol import IrqSet, PciIrq, SetIrqs

MAX_VECTORS = 4096
"""Twice the largest MSI-X table: more than a device can have (PCI 3.0, 6.8.2)."""

_ASSIGN = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER


class Interrupts:
    """What SET_IRQS has set up, by index and vector."""

    def __init__(self) -> None:
        self._vectors: dict[int, dict[int, int]] = {}
        self._taps: dict[int, int] = {}
        """By tap: where it leads to, a duplicate of what the VMM gave."""
        self._arrivals = select.epoll()
        self.tapping = False
        """Whether what the VMM assigns now is tapped."""
        self.arrived = 0
        """How often a tap was found fired."""
        self.revision = 0
        """Goes up with each change."""

    @property
    def n_vectors(self) -> int:
        return sum(len(vectors) for vectors in self._vectors.values())

    def apply(self, request: SetIrqs, descriptors: list[int]) -> None:
        """Follows a request that the device has accepted; takes `descriptors` over."""
        vectors = self._vectors.setdefault(request.index, {})
        self.revision += 1
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

    @property
    def assigned(self) -> list[tuple[int, int, int]]:
        """Index, vector and descriptor of each."""
        return [
            (index, vector, descriptor)
            for index, vectors in self._vectors.items()
            for vector, descriptor in vectors.items()
        ]

    def assign(self, index: int, vector: int, descriptor: int) -> None:
        """As the VMM has done before another process; owns `descriptor`."""
        self._vectors.setdefault(index, {})[vector] = descriptor

    @property
    def watched(self) -> bool:
        """Whether the device may have taps."""
        return self.tapping or bool(self._taps)

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
        return sum(_fire(descriptor) for descriptor in message_signalled or intx)

    # --- taps ---

    @property
    def n_tapped(self) -> int:
        return len(self._taps)

    def fileno(self) -> int:
        """Readable while a tap has fired."""
        return self._arrivals.fileno()

    def tap(self, descriptors: list[int]) -> list[int]:
        """What the device is to be given in place of `descriptors`, which are taken over: taps, or
        the same where there is no room for any."""
        taps: list[int] = []
        try:
            if len(self._taps) + len(descriptors) > MAX_VECTORS:
                return descriptors
            taps.extend(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in descriptors)
            passed = [os.dup(tap) for tap in taps]
        except OSError:
            for tap in taps:
                os.close(tap)
            return descriptors
        for tap, descriptor in zip(taps, descriptors, strict=True):
            self._taps[tap] = descriptor
            self._arrivals.register(tap, select.EPOLLIN)
        return passed

    def reassign(self) -> list[tuple[SetIrqs, int]]:
        """The requests that give the device all vectors anew, each with its descriptor (to own):
        tapped if `tapping`. One that cannot be had stays as it is."""
        requests = []
        for index, vectors in self._vectors.items():
            for vector, descriptor in vectors.items():
                with suppress(OSError):
                    passed = [os.dup(descriptor)]
                    passed = self.tap(passed) if self.tapping else passed
                    requests.append((SetIrqs(_ASSIGN, index, vector, 1), passed[0]))
        return requests

    def pass_on(self) -> None:
        """Fires at the VMM what has fired at a tap."""
        for tap, _ in self._arrivals.poll(0):
            with suppress(BlockingIOError):
                os.eventfd_read(tap)
                self.arrived += 1
                _fire(self._taps[tap])

    def close_taps(self) -> None:
        """Passes on what is left. Only once the device has none of them any more."""
        self.pass_on()
        for tap, descriptor in self._taps.items():
            self._arrivals.unregister(tap)
            os.close(tap)
            os.close(descriptor)
        self._taps.clear()

    def close(self) -> None:
        if not self._arrivals.closed:
            self.close_taps()
            self._arrivals.close()
        for vectors in self._vectors.values():
            _close(vectors, list(vectors))


def _fire(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not any(events & select.POLLOUT for _, events in poll.poll(0)):
        return False
    try:
        os.write(descriptor, (1).to_bytes(8, "little"))
    except OSError:
        return False
    return True


def _close(vectors: dict[int, int], which: list[int]) -> None:
    for vector in which:
        os.close(vectors.pop(vector))
