"""A double of a kernel whose driver of the function offers VFIO migration v2 and DMA logging, and
which has iommufd: numbers and forms stand here a second time on purpose.
"""

import ctypes
import errno
import struct

from tests.sync.vfio.fake_kernel import DEVICE, FakeKernel

IOMMU, CHARACTER, STREAM = 200, DEVICE, 300
STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 1, 2, 3, 4, 6
ARCS = {
    (RUNNING, PRE_COPY),
    (RUNNING, STOP),
    (RUNNING, STOP_COPY),
    (PRE_COPY, STOP_COPY),
    (PRE_COPY, RUNNING),
    (STOP_COPY, STOP),
    (STOP_COPY, RUNNING),
    (STOP, RUNNING),
    (STOP, RESUMING),
    (RUNNING, RESUMING),
    (RESUMING, STOP),
}


class MigratingKernel(FakeKernel):
    """`initial` is what the driver has to tell in PRE_COPY, `rest` what comes in STOP_COPY."""

    def __init__(self) -> None:
        super().__init__()
        self.features = {1, 2, 6, 7, 8, 9}
        self.state = RUNNING
        self.initial, self.rest = b"initial state", b"the rest of it"
        self.taken = b""
        self.size = 27
        self.hangs = 0
        """So many times a stream is not ready."""
        self.dirty: set[int] = set()
        self.logging: tuple[int, list[tuple[int, int]]] | None = None
        self.tracks = True
        self.table: int | None = None
        self.bound = self.tracking = False
        self.attached = 0
        self.streams = 0

    def open(self, path: str) -> int:
        found = {"/dev/iommu": IOMMU, "/dev/vfio/devices/vfio3": CHARACTER}.get(path)
        if found is None:
            return super().open(path)
        self.opened.append(found)
        return found

    def read(self, fd: int, count: int) -> bytes:
        assert fd == STREAM + self.streams and fd in self.opened
        if self.hangs:
            self.hangs -= 1
            raise BlockingIOError(errno.EAGAIN, "not yet")
        if self.state == PRE_COPY:
            if not self.initial:
                raise OSError(errno.ENOMSG, "no more now")
            part, self.initial = self.initial[:count], self.initial[count:]
            return part
        assert self.state == STOP_COPY
        left = self.initial + self.rest
        part, self.initial, self.rest = left[: min(count, 5)], b"", left[min(count, 5) :]
        return part

    def write(self, fd: int, data: bytes) -> int:
        assert fd == STREAM + self.streams and fd in self.opened and self.state == RESUMING
        if self.hangs:
            self.hangs -= 1
            raise BlockingIOError(errno.EAGAIN, "not yet")
        self.taken += data[:7]
        return len(data[:7])

    def ioctl(self, fd: int, request: int, argument: int | bytearray | bytes) -> int:
        number = request - (0x3B << 8)
        if fd == IOMMU:
            assert isinstance(argument, (bytes, bytearray))
            return self._iommu(number, argument)
        if fd == STREAM + self.streams and number == 121:
            assert isinstance(argument, bytearray)
            assert struct.unpack("=IIQQ", argument)[0] == 24 and self.state == PRE_COPY
            struct.pack_into("=QQ", argument, 8, len(self.initial), 0)
            return 0
        if fd == DEVICE and number in (118, 119):
            assert isinstance(argument, bytearray)
            if number == 118:
                assert struct.unpack("=IIiI", argument)[:3] == (16, 0, IOMMU)
                struct.pack_into("=I", argument, 12, 77)
                self.bound = True
            else:
                size, flags, self.attached = struct.unpack("=III", argument)
                assert (size, flags) == (12, 0) and self.bound
            return 0
        return super().ioctl(fd, request, argument)

    # Features of the function.

    def _feature(self, argument: bytearray) -> None:
        size, flags = struct.unpack_from("=II", argument)
        assert size == len(argument)
        number = flags & 0xFFFF
        if number not in self.features:
            raise OSError(errno.ENOTTY, "no")
        if flags & 1 << 18:
            return
        sets = bool(flags & 1 << 17)
        if number == 1:
            struct.pack_into("=Q", argument, 8, 1 | 4)
        elif number == 2:
            self._state(argument, sets)
        elif number == 6:
            page, count, _, address = struct.unpack_from("=QIIQ", argument, 8)
            raw = ctypes.string_at(address, 16 * count)
            assert count and self.logging is None
            self.logging = page, list(struct.iter_unpack("=QQ", raw))
        elif number == 7:
            assert self.logging is not None
            self.logging = None
        elif number == 8:
            iova, length, page, address = struct.unpack_from("=QQQQ", argument, 8)
            assert self.logging is not None and not sets
            self._report(iova, length, page, address)
        else:
            struct.pack_into("=Q", argument, 8, self.size)

    def _state(self, argument: bytearray, sets: bool) -> None:
        wanted, stream = struct.unpack_from("=Ii", argument, 8)
        if sets:
            if wanted != self.state and (self.state, wanted) not in ARCS:
                raise OSError(errno.EINVAL, "no way")
            gives = (self.state, wanted) != (PRE_COPY, STOP_COPY)
            gives = gives and wanted in (PRE_COPY, STOP_COPY, RESUMING)
            self.state = wanted
            if gives:
                self.streams += 1
                stream = STREAM + self.streams
                self.opened.append(stream)
            else:
                stream = -1
        struct.pack_into("=Ii", argument, 8, self.state, stream)

    def _reset(self, _: int) -> None:
        super()._reset(0)
        self.state = RUNNING

    def _report(self, iova: int, length: int, page: int, address: int) -> None:
        assert page == 4096
        bitmap = (ctypes.c_uint8 * (-(-length // page // 64) * 8)).from_address(address)
        for number in [each for each in self.dirty if iova <= each * page < iova + length]:
            bit = number - iova // page
            bitmap[bit >> 3] |= 1 << (bit & 7)
            self.dirty.discard(number)

    # iommufd.

    def _iommu(self, number: int, argument: bytes | bytearray) -> int:
        (size,) = struct.unpack_from("=I", argument)
        assert size == len(argument)
        if number == 0x81:
            struct.pack_into("=I", argument, 8, 11)
        elif number == 0x85:
            _, flags, space, reserved, address, length, iova = struct.unpack("=IIIIQQQ", argument)
            assert space == 11 and flags & 1 and not reserved and iova not in self.mapped
            if self.map_error:
                raise OSError(self.map_error, "no")
            self.mapped[iova] = length, address, flags
        elif number == 0x86:
            _, space, iova, length = struct.unpack("=IIQQ", argument)
            assert space == 11 and self.mapped.pop(iova)[0] == length
        elif number == 0x89:
            _, flags, device, space, _, *rest = struct.unpack("=IIIIIIIIQ", argument)
            assert (flags, device, space) == (2, 77, 11) and not any(rest)
            if not self.tracks:
                raise OSError(errno.EOPNOTSUPP, "no")
            self.table = 12
            struct.pack_into("=I", argument, 16, self.table)
        elif number == 0x8B:
            _, on, table, reserved = struct.unpack("=IIII", argument)
            assert table == self.table and not reserved
            self.tracking = bool(on)
        else:
            _, table, flags, reserved, iova, length, page, address = struct.unpack(
                "=IIIIQQQQ", argument
            )
            assert number == 0x8C and (table, flags, reserved) == (self.table, 0, 0)
            assert self.tracking
            self._report(iova, length, page, address)
        return 0
