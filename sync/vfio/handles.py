"""Descriptors of the kernel's that one function needs, and calls on them, with errors in words."""

import errno

from sync.vfio.errors import FunctionBusy, NoVfio, VfioError
from sync.vfio.kernel import Kernel


class Handles:
    """Owns the descriptors. `name` is the function, for errors."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self._open: list[int] = []

    def close(self) -> None:
        """Close all, the last one first. May be called again."""
        while self._open:
            self.kernel.close(self._open.pop())

    def take(self, path: str) -> int:
        """Open a file. Raises `FunctionBusy`, `NoVfio`."""
        try:
            return self.own(self.kernel.open(path))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise FunctionBusy(
                    f"{path} is in use: another process has {self.name} or a function of its group"
                ) from error
            hint = "modprobe vfio-pci" if error.errno == errno.ENOENT else "run as root"
            raise NoVfio(f"{path}: {error.strerror} ({hint})") from error

    def own(self, fd: int) -> int:
        """Keep a descriptor that the kernel gave, until `close`."""
        self._open.append(fd)
        return fd

    def ioctl(self, what: str, fd: int, request: int, argument: int | bytes | bytearray) -> int:
        """Raises `VfioError`, which says that VFIO cannot `what`."""
        try:
            return self.kernel.ioctl(fd, request, argument)
        except OSError as error:
            raise VfioError(f"{self.name}: VFIO cannot {what}: {error.strerror}") from error
