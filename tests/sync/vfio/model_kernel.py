"""The double of the kernel with a model of a device as its function, an NVMe controller or a virtio
block device: memory that is mapped is really seen by it."""

import ctypes
import random
import struct

from tests.sync.queues.controller import Controller, Space
from tests.sync.queues.virtio_model import BAR, EVENT_IDX, INDIRECT, VERSION_1, Model
from tests.sync.vfio.fake_kernel import CONFIG_OFFSET, FakeKernel

CLASS = bytes((2, 8, 1))
ACCESS_PLATFORM = 1 << 33
_BAR_AT = BAR << 40


class SeeingKernel(FakeKernel):
    """`space` is what the device sees."""

    space: Space

    def _map(self, argument: bytes) -> None:
        super()._map(argument)
        _, _, address, iova, length = struct.unpack("=IIQQQ", argument)
        memory = (ctypes.c_char * length).from_address(address)
        self.space.show(iova, memoryview(memory).cast("B"))

    def _unmap(self, argument: bytearray) -> None:
        _, _, iova, length = struct.unpack("=IIQQ", argument)
        super()._unmap(argument)
        self.space.hide(iova, length)


class VirtioKernel(SeeingKernel):
    """`blocks` is the disk, which several may share; `more` are feature bits that it offers."""

    def __init__(self, blocks: dict[int, bytes], more: int = ACCESS_PLATFORM) -> None:
        super().__init__()
        self.space = Space()
        offered = VERSION_1 | INDIRECT | EVENT_IDX | more
        self.model = Model(self.space, random.Random(1), blocks, offered=offered)
        self.config[:256] = self.model.read(7, 0, 256)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        if offset >= CONFIG_OFFSET:
            return super().pread(fd, count, offset)
        return self.model.read(BAR, offset - _BAR_AT, count)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if offset >= CONFIG_OFFSET:
            return super().pwrite(fd, data, offset)
        self.model.write(BAR, offset - _BAR_AT, data)
        if self.config[4] & 4:
            self.model.run()
        return len(data)

    def _region(self, info: bytearray) -> None:
        _, _, index, _, _, _ = struct.unpack("=IIIIQQ", info)
        if index != BAR:
            super()._region(info)
        else:
            struct.pack_into("=IIIIQQ", info, 0, 32, 7, index, 0, 0x4000, _BAR_AT)

    def _reset(self, _: int) -> None:
        super()._reset(0)
        self.model.function_reset()


class ModelKernel(SeeingKernel):
    """`blocks` is the namespace, which several may share."""

    def __init__(self, blocks: dict[int, bytes], seed: int = 1) -> None:
        super().__init__()
        self.space = Space()
        self.controller = Controller(self.space, random.Random(seed), blocks)
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

    def _reset(self, _: int) -> None:
        super()._reset(0)
        self.controller.function_reset()
