"""Executes the plans of `sync.queues` on a function of the host.

Owns scratch memory and how long is waited. Guest memory is the caller's: it is named once the
function is shown it, and scratch memory is gone by then. Between plans and while one runs, MSI-X is
enabled with nobody at the vectors, if the function has it.

Whatever may take long is *work*, which is done in turns: the gateway has one thread, and a VMM
waits for no device that is walked.
"""

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

from sync.queues.errors import WalkFailed, WalkTimeout
from sync.queues.interface import (
    AwaitMemory,
    AwaitRegister,
    Command,
    MapScratch,
    Plan,
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
from sync.vfio.user_device import UserDevice
from sync.vfio_user.protocol import PciIrq

DEADLINE_S = 30.0
"""For a register: a controller may take half a minute to get ready (CAP.TO)."""
COMMAND_DEADLINE_S = 5.0
"""For a command's completion: a guest may be standing still meanwhile."""
TURN_S = 0.001
"""How long work goes on before others are served."""
PAUSE_S = 0.0005
"""Between two looks at what does not come at once."""

T = TypeVar("T")
Work = Generator[float, None, T]
"""Yields when others are to be served, with the seconds after which it is worth going on."""


def complete(work: Work[T]) -> T:
    """Do work to its end, for a caller who has nobody to serve."""
    while True:
        try:
            time.sleep(next(work))
        except StopIteration as end:
            result: T = end.value
            return result


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

    def work(self, plan: Plan[T]) -> Work[T]:
        """Execute a plan, in turns. Raises what the plan raises, `WalkTimeout` and `VfioError`."""
        began = time.monotonic()
        try:
            command = next(plan)
            while True:
                if isinstance(command, (AwaitRegister, AwaitMemory)):
                    answer = yield from self._await(command)
                else:
                    answer = self._execute(command)
                if time.monotonic() - began > TURN_S:
                    yield 0.0
                    began = time.monotonic()
                command = plan.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    def _execute(self, command: Command) -> bytes:
        device = self._device
        match command:
            case ResetFunction():
                device.reset()
                device.set_bus_master(True)
                self.quiet_interrupts()
            case WriteRegister(offset, data, region):
                device.write(region, offset, data)
            case MapScratch(iova, length):
                self._map(iova, length)
            case UnmapScratch(iova, length):
                device.unmap_dma(iova, length)
                self._scratch.pop(iova).close()
            case WriteMemory(iova, data):
                self._write(iova, data)
            case Signal(vector):
                self._signal(vector)
            case ReadRegister(offset, length, region) | AwaitRegister(
                offset, length, region=region
            ):
                return device.read(region, offset, length)
            case ReadMemory(iova, length) | AwaitMemory(iova, length):
                return self._read(iova, length)
        return b""

    def _await(self, command: AwaitRegister | AwaitMemory) -> Work[bytes]:
        limit_s = self._deadline_s
        if isinstance(command, AwaitMemory):
            limit_s = min(limit_s, COMMAND_DEADLINE_S)
        began = time.monotonic()
        while True:
            data = self._execute(command)
            if number(data) & command.mask == command.value:
                return data
            waited_s = time.monotonic() - began
            if waited_s > limit_s:
                raise WalkTimeout(f"{self._device.name} did not do its part within {limit_s:g} s")
            if waited_s > TURN_S:
                yield PAUSE_S

    def _map(self, iova: int, length: int) -> None:
        fd = os.memfd_create("scratch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, length)
            memory = mmap.mmap(fd, length)
            # The address outlives the view, which would keep the memory from being closed.
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            self._device.map_dma(iova, length, address, file=(fd, 0))
        finally:
            os.close(fd)
        self._scratch[iova] = memory

    def quiet_interrupts(self) -> None:
        """MSI-X is on, and every vector comes to nobody. The kernel has one kind on at a time."""
        for index in (PciIrq.INTX, PciIrq.MSI):
            if self._device.vectors.get(index):
                with contextlib.suppress(VfioError):
                    self._device.disable_irqs(index)
        count = self._device.vectors.get(PciIrq.MSIX, 0)
        if count:
            self._device.enable_msix()
            self._device.set_irqs(PciIrq.MSIX, [-1] * count)

    def drop_scratch(self) -> None:
        """Take all scratch memory away after a plan that failed."""
        for iova, memory in list(self._scratch.items()):
            self._device.unmap_dma(iova, len(memory))
            del self._scratch[iova]
            memory.close()

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
