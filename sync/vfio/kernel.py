"""The calls into the kernel that VFIO needs, so that a test can stand in for it."""

import fcntl
import os
from typing import Protocol

from sync.service_manager import open_device


class Kernel(Protocol):
    """Each call raises `OSError`."""

    def open(self, path: str) -> int: ...

    def close(self, fd: int) -> None: ...

    def ioctl(self, fd: int, request: int, argument: int | bytearray | bytes) -> int:
        """`argument`: a number, bytes for the kernel, or a buffer that it also writes to."""

    def pread(self, fd: int, count: int, offset: int) -> bytes: ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int: ...

    def read(self, fd: int, count: int) -> bytes:
        """Of a stream; does not wait."""

    def write(self, fd: int, data: bytes) -> int:
        """To a stream; does not wait."""


class HostKernel:
    """The kernel that runs this process."""

    def open(self, path: str) -> int:
        return open_device(path)

    def close(self, fd: int) -> None:
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray | bytes) -> int:
        if isinstance(argument, int):
            return fcntl.ioctl(fd, request, argument)
        # A mutable buffer keeps the return value, which is a descriptor for some requests.
        buffer = argument if isinstance(argument, bytearray) else bytearray(argument)
        result: int = fcntl.ioctl(fd, request, buffer, True)
        return result

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        return os.pread(fd, count, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def read(self, fd: int, count: int) -> bytes:
        os.set_blocking(fd, False)
        return os.read(fd, count)

    def write(self, fd: int, data: bytes) -> int:
        os.set_blocking(fd, False)
        return os.write(fd, data)
