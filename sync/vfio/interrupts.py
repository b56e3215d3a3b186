"""Interrupts of a function that we own: what the VMM has asked for, and what the host has to tell.

Owns the VMM's eventfds, which the function signals without waking us, and two of our own: the
kernel tells by them that the function reported an error (ERR), and that the host wants it back
(REQ). Both are passed on to the VMM, if it has asked for them.

Source: Linux, include/uapi/linux/vfio.h, VFIO_PCI_ERR_IRQ_INDEX and VFIO_PCI_REQ_IRQ_INDEX.
"""

import contextlib
import errno
import os
import select

from sync.vfio.device import VfioDevice
from sync.vfio.errors import VfioError
from sync.vfio.guest_memory import close_all
from sync.vfio.user_device import UserDevice
from sync.vfio_user.protocol import (
    PCI_NUM_IRQS,
    IrqSet,
    PciIrq,
    SetIrqs,
    VfioUserError,
)

_TOLD = (PciIrq.ERR, PciIrq.REQ)


class FunctionInterrupts:
    """Those of `device`."""

    def __init__(self, device: VfioDevice | UserDevice) -> None:
        self._device = device
        self._asked_for: dict[PciIrq, dict[int, int]] = {index: {} for index in PciIrq}
        self.told: dict[int, PciIrq] = {}
        """Our own eventfds; each is readable when the kernel has to tell what it stands for."""
        for index in _TOLD:
            if device.vectors.get(index):
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                try:
                    device.set_irqs(index, [fd])
                except VfioError:
                    os.close(fd)
                else:
                    self.told[fd] = index

    def hear(self, fd: int) -> PciIrq:
        """What `fd`, one of `told`, stands for; it is passed on to the VMM."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        self._signal(self.told[fd], 0)
        return self.told[fd]

    def close(self) -> None:
        for fds in self._asked_for.values():
            close_all(list(fds.values()))
            fds.clear()
        close_all(list(self.told))
        self.told.clear()

    def set(self, request: SetIrqs, fds: list[int]) -> None:
        """What the VMM asks for. Takes the descriptors that it keeps out of `fds`.

        Raises `VfioUserError`, `VfioError`.
        """
        index = PciIrq(request.index) if request.index < PCI_NUM_IRQS else None
        count = self._device.vectors.get(index, 0) if index is not None else 0
        if index is None or request.start + request.count > count:
            raise VfioUserError(errno.EINVAL)
        if request.flags & IrqSet.ACTION_TRIGGER:
            self._trigger(index, request, fds)
        elif index is PciIrq.INTX and request.count:
            self._device.mask_intx(bool(request.flags & IrqSet.ACTION_MASK))
        else:
            raise VfioUserError(errno.ENOTSUP)

    def signal_vector(self, vector: int) -> None:
        """Fire a vector of the guest's; one that it has not asked for comes to nobody."""
        self._signal(PciIrq.MSIX, vector)

    def restore(self) -> None:
        """What the VMM has asked for, after a walk during which nobody was interrupted."""
        if self._device.vectors.get(PciIrq.MSIX):
            self._device.disable_irqs(PciIrq.MSIX)
        for index in (PciIrq.INTX, PciIrq.MSI, PciIrq.MSIX):
            known = self._asked_for[index]
            if known:
                fds = [known.get(vector, -1) for vector in range(max(known) + 1)]
                self._device.set_irqs(index, fds)

    def _trigger(self, index: PciIrq, request: SetIrqs, fds: list[int]) -> None:
        known = self._asked_for[index]
        ours = index in self.told.values()
        if request.is_disable:
            if not ours:
                self._device.disable_irqs(index)
            close_all(list(known.values()))
            known.clear()
        elif request.flags & IrqSet.DATA_EVENTFD:
            given = fds or [-1] * request.count
            if not ours:
                self._device.set_irqs(index, given, request.start)
            for vector, fd in enumerate(given, request.start):
                if vector in known:
                    os.close(known.pop(vector))
                if fd >= 0:
                    known[vector] = fd
            fds.clear()
        else:
            chosen = [
                request.start + at
                for at in range(request.count)
                if request.flags & IrqSet.DATA_NONE or request.data[at]
            ]
            for vector in chosen:
                self._device.trigger(index, vector)

    def _signal(self, index: PciIrq, vector: int) -> None:
        fd = self._asked_for[index].get(vector)
        if fd is None:
            return
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        # Never wait for a VMM: an eventfd that is full has a signal in it already (I9).
        if poller.poll(0):
            with contextlib.suppress(OSError):
                os.eventfd_write(fd, 1)
