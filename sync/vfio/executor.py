"""Executes the plans of `sync.queues` on a function of the host.

Owns scratch memory and how long is waited. Guest memory is the caller's: it is named once the
function is shown it, and scratch memory is gone by then. Between plans and while one runs, MSI-X is
enabled with nobody at the vectors, if the function has it.
"""

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable
from typing import Protocol

from sync.queues.errors import WalkFailed, WalkTimeout
from sync.queues.interface import (
    AwaitMemory,
    AwaitRegister,
    Command,
    MapScratch,
    ReadMemory,
    ReadRegister,
    ResetFunction,
    Signal,
    UnmapScratch,
    WriteMemory,
    WriteRegister,
    number,
)
from sync.vfio.device import VfioDevice
from sync.vfio.errors import VfioError
from sync.vfio.uapi import IrqIndex
from sync.vfio.user_device import UserDevice

DEADLINE_S = 30.0
"""For a register: a controller may take half a minute to get ready (CAP.TO)."""
COMMAND_DEADLINE_S = 5.0
"""For a command's completion: a guest may be standing still meanwhile."""
_SPINS = 200
_PAUSE_S = 0.0005
_BAR = 0


class WritableMemory(Protocol):
    """Guest memory, as `start` needs it."""

    def read(self, iova: int, length: int) -> bytes: ...

    def write(self, iova: int, data: bytes) -> None: ...


class Executor:
    """Executes commands on `device`; `signal` fires a vector of the guest's."""

    def __init__(
        self,
        device: VfioDevice | UserDevice,
        signal: Callable[[int], None] = lambda vector: None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.guest: WritableMemory | None = None
        """What the function sees in place of scratch memory; set once it is mapped."""
        self._device = device
        self._signal = signal
        self._deadline_s = deadline_s
        self._scratch: dict[int, mmap.mmap] = {}

    def __call__(self, command: Command) -> bytes:
        device = self._device
        match command:
            case ResetFunction():
                device.reset()
                device.set_bus_master(True)
                self.quiet_interrupts()
            case ReadRegister(offset, length):
                return device.read(_BAR, offset, length)
            case WriteRegister(offset, data):
                device.write(_BAR, offset, data)
            case AwaitRegister(offset, length, mask, value):
                return self._await(
                    lambda: device.read(_BAR, offset, length), mask, value, self._deadline_s
                )
            case MapScratch(iova, length):
                fd = os.memfd_create("scratch", os.MFD_CLOEXEC)
                try:
                    os.ftruncate(fd, length)
                    memory = mmap.mmap(fd, length)
                    # The address outlives the view, which would keep the memory from being closed.
                    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                    device.map_dma(iova, length, address, file=(fd, 0))
                finally:
                    os.close(fd)
                self._scratch[iova] = memory
            case UnmapScratch(iova, length):
                device.unmap_dma(iova, length)
                self._scratch.pop(iova).close()
            case ReadMemory(iova, length):
                return self._read(iova, length)
            case WriteMemory(iova, data):
                self._write(iova, data)
            case AwaitMemory(iova, length, mask, value):
                deadline_s = min(self._deadline_s, COMMAND_DEADLINE_S)
                return self._await(lambda: self._read(iova, length), mask, value, deadline_s)
            case Signal(vector):
                self._signal(vector)
        return b""

    def quiet_interrupts(self) -> None:
        """MSI-X is on, and every vector comes to nobody. The kernel has one kind on at a time."""
        for index in (IrqIndex.INTX, IrqIndex.MSI):
            if self._device.vectors.get(index):
                with contextlib.suppress(VfioError):
                    self._device.disable_irqs(index)
        count = self._device.vectors.get(IrqIndex.MSIX, 0)
        if count:
            self._device.enable_msix()
            self._device.set_irqs(IrqIndex.MSIX, [-1] * count)

    def drop_scratch(self) -> None:
        """Take all scratch memory away after a plan that failed."""
        for iova, memory in list(self._scratch.items()):
            self._device.unmap_dma(iova, len(memory))
            del self._scratch[iova]
            memory.close()

    def _await(self, look: Callable[[], bytes], mask: int, value: int, deadline_s: float) -> bytes:
        end = time.monotonic() + deadline_s
        spins = 0
        while True:
            data = look()
            if number(data) & mask == value:
                return data
            spins += 1
            if spins > _SPINS:
                if time.monotonic() > end:
                    raise WalkTimeout(
                        f"{self._device.name} did not do its part within {deadline_s:g} s"
                    )
                time.sleep(_PAUSE_S)

    def _read(self, iova: int, length: int) -> bytes:
        if self.guest is not None:
            return self.guest.read(iova, length)
        start, memory = self._find(iova, length)
        return memory[iova - start : iova - start + length]

    def _write(self, iova: int, data: bytes) -> None:
        if self.guest is not None:
            self.guest.write(iova, data)
            return
        start, memory = self._find(iova, len(data))
        memory[iova - start : iova - start + len(data)] = data

    def _find(self, iova: int, length: int) -> tuple[int, mmap.mmap]:
        for start, memory in self._scratch.items():
            if start <= iova and iova + length <= start + len(memory):
                return start, memory
        raise WalkFailed(f"no scratch memory at {iova:#x}")
