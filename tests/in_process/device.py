"""A device that is served in a thread: registers, DMA, and each way of moving both."""

import mmap
from contextlib import suppress

from sync.vfio_user.protocol import (
    Disconnected,
    DmaMap,
    DmaUnmap,
    Feature,
    MigrationState,
    VfioUserError,
)
from tests.sync.gateway.conftest import ServedDevice

PROFILE = """
format = 1
name = "model"
version = "1"

[[match]]
vendor = 0x1af4
device = 0x1042

[[register]]
name = "number"
base = "bar0"
offset = 0x40
size = 4
class = "snapshot"

[[register]]
name = "doorbell"
base = "bar0"
offset = 0x80
size = 4
class = "hold"
"""
NUMBER, DOORBELL = 0x40, 0x80


class ModelDevice(ServedDevice):
    """Its state (v2) is its BAR."""

    def __init__(self, *, v2: bool, logging: bool) -> None:
        super().__init__(v2=v2, logging=logging)
        self._memory: dict[int, mmap.mmap] = {}

    def dma_write(self, address: int, data: bytes) -> None:
        """As the device does it at this moment; where it has no access, nothing comes of it."""
        for start, memory in list(self._memory.items()):
            if start <= address < start + len(memory):
                memory[address - start : address - start + len(data)] = data
                self.features.wrote(address, len(data))
                return
        if self.dma is not None:
            with suppress(VfioUserError, Disconnected):
                self.dma.write(address, data)

    def dma_map(self, region: DmaMap, fd: int | None) -> None:
        if fd is not None:
            self._memory[region.address] = mmap.mmap(fd, region.size, offset=region.offset)
        super().dma_map(region, fd)

    def dma_unmap(self, request: DmaUnmap) -> None:
        self._memory.pop(request.address, None)
        super().dma_unmap(request)

    def detached(self) -> None:
        self._memory.clear()
        super().detached()

    def feature(self, request: Feature) -> bytes:
        before = self.features.state
        answer = super().feature(request)
        state = self.features.state
        if state is not before:
            at_rest = state is MigrationState.STOP_COPY
            self.features.state_data = bytes(self.registers.bar) if at_rest else b""
            if state is MigrationState.RESUMING:
                self.features.loaded = b""
            elif before is MigrationState.RESUMING and state is MigrationState.STOP:
                self.registers.bar[:] = self.features.loaded
        return answer
