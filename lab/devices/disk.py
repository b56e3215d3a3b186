"""The image file behind a block device. Knows sectors, no virtio and no guest memory."""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from lab.devices.errors import DeviceError

SECTOR_BYTES = 512
_IOV_MAX = 1024


class Disk:
    """An image file of whole sectors, open for reading and (unless `read_only`) writing.

    Usable from several threads at once. Raises `DeviceError` when it cannot be opened.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            raise DeviceError(f"cannot open the image {path}: {error.strerror}") from error
        self.read_only = read_only
        mode = os.fstat(self._fd).st_mode
        # The size of a block device is found by seeking only.
        size = os.lseek(self._fd, 0, os.SEEK_END) if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else 0
        self.capacity_sectors = size // SECTOR_BYTES
        if not self.capacity_sectors:
            os.close(self._fd)
            raise DeviceError(f"the image {path} is no file with a sector of {SECTOR_BYTES} bytes")

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers` from byte `offset` on. Raises `OSError`, also at the end of the file."""
        _transfer(os.preadv, self._fd, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write `buffers` from byte `offset` on. Raises `OSError`."""
        _transfer(os.pwritev, self._fd, buffers, offset)

    def flush(self) -> None:
        """Return when everything written before is on stable storage. Raises `OSError`."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _transfer(
    operation: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    buffers: Sequence[memoryview],
    offset: int,
) -> None:
    left = deque(buffers)
    while left:
        done = operation(fd, list(islice(left, _IOV_MAX)), offset)
        if done <= 0:
            raise OSError(errno.EIO, "the image ends here")
        offset += done
        while left and done >= len(left[0]):
            done -= len(left.popleft())
        if done:
            left[0] = left[0][done:]
