"""Copies into and out of mappings of files that somebody else may cut short meanwhile.

A process that touches a page behind the end of a mapped file is ended by SIGBUS (mmap(2)); a system
call that is given the page's address returns EFAULT. So the kernel copies, through a file of our
own. What no one can cut short needs none of this (`cannot_shrink`).
"""

import errno
import fcntl
import mmap
import os

from sync.memory import PAGE_BYTES, page_bytes_of


def cannot_shrink(descriptor: int) -> bool:
    """Whether every page of the file can be touched for good: a memfd sealed against shrinking, in
    pages of 4096 bytes (the system may be out of huge ones). QEMU seals its memfds by default."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        return bool(seals & fcntl.F_SEAL_SHRINK) and page_bytes_of(descriptor) == PAGE_BYTES
    except OSError:
        return False


class Bounce:
    """The file in between. Either call raises OSError (EFAULT) for a page that is not there; part
    of a write may have been done by then."""

    def __init__(self) -> None:
        self._file = os.memfd_create("bounce", os.MFD_CLOEXEC)

    def read(self, mapping: mmap.mmap, start: int, size: int) -> bytes:
        """`size` bytes of `mapping` from `start` on."""
        with memoryview(mapping) as whole, whole[start : start + size] as part:
            _check(os.pwrite(self._file, part, 0), size)
        return os.pread(self._file, size, 0)

    def write(self, mapping: mmap.mmap, start: int, data: bytes | memoryview) -> None:
        """Writes `data` to `mapping` from `start` on."""
        os.pwrite(self._file, data, 0)
        with memoryview(mapping) as whole, whole[start : start + len(data)] as part:
            _check(os.preadv(self._file, [part], 0), len(data))

    def close(self) -> None:
        """Can be called more than once."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _check(copied: int, size: int) -> None:
    if copied != size:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
