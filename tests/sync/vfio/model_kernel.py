"""The double of the kernel with a model NVMe controller as its function: memory that is mapped is
really seen by the controller."""

import ctypes
import random
import struct

from tests.sync.queues.controller import Controller, Space
from tests.sync.vfio.fake_kernel import CONFIG_OFFSET, FakeKernel

CLASS = bytes((2, 8, 1))


class ModelKernel(FakeKernel):
    """`blocks` is the namespace, which several may share."""

    def __init__(self, blocks: dict[int, bytes], seed: int = 1) -> None:
        super().__init__()
        self.controller = Controller(Space(), random.Random(seed), blocks)
        self.express = True
        self.works = True
        """Whether the controller does anything by itself."""
        self.config[9:12] = CLASS

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        if offset >= CONFIG_OFFSET:
            return super().pread(fd, count, offset)
        return self.controller.read(offset, count).ljust(count, b"\0")

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if offset >= CONFIG_OFFSET:
            return super().pwrite(fd, data, offset)
        self.controller.write(offset, data)
        if self.works and self.config[4] & 4:
            self.controller.run()
        return len(data)

    def _map(self, argument: bytes) -> None:
        super()._map(argument)
        _, _, address, iova, length = struct.unpack("=IIQQQ", argument)
        memory = (ctypes.c_char * length).from_address(address)
        self.controller.space.show(iova, memoryview(memory).cast("B"))

    def _unmap(self, argument: bytearray) -> None:
        _, _, iova, length = struct.unpack("=IIQQ", argument)
        super()._unmap(argument)
        self.controller.space.hide(iova, length)

    def _reset(self, _: int) -> None:
        super()._reset(0)
        self.controller.function_reset()
