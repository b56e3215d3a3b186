"""Real content for everything that the guest writes: files of this machine, read one by one.

Owns no memory of its own; the bytes go from the page cache straight to guest RAM. Which files
there are is not part of the guest's state: on another machine it goes on with other files.
"""

import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lab.guest.errors import GuestOptionsError
from lab.guest.ram import Ram

MAX_FILES = 512
"""Enough for several hundred MiB of content; listing more would slow down the start."""
MIN_FILE_BYTES = 512


class Content:
    """An endless stream of the content of `paths` (files, or folders searched in name order)."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._files = list(_files(paths))
        if not self._files:
            raise GuestOptionsError(f"no readable file of {MIN_FILE_BYTES} bytes in {paths}")
        self._next = 0
        self._fd = -1
        self._position = 0

    def copy_to(self, ram: Ram, address: int, length: int) -> None:
        """Writes the next `length` bytes to guest RAM at `address`, as the CPU."""
        done = fruitless = 0
        while done < length:
            count = 0
            if self._fd >= 0:
                try:
                    count = ram.fill_from(self._fd, self._position, address + done, length - done)
                except OSError:
                    count = 0
            if count:
                self._position += count
                done += count
                fruitless = 0
            else:
                fruitless += 1
                if fruitless > len(self._files):
                    raise GuestOptionsError("none of the content's files can be read any more")
                self._open_next()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open_next(self) -> None:
        self.close()
        path = self._files[self._next]
        self._next = (self._next + 1) % len(self._files)
        self._position = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            self._fd = -1


def _files(paths: tuple[str, ...]) -> Iterator[Path]:
    """Up to `MAX_FILES` regular files, an equal share from each of `paths`."""
    share = max(1, MAX_FILES // len(paths))
    for path in paths:
        yield from islice(_walk(Path(path)), share)


def _walk(path: Path) -> Iterator[Path]:
    if _is_usable(path):
        yield path
    for folder, names, files in os.walk(path):
        names.sort()
        yield from filter(_is_usable, (Path(folder, name) for name in sorted(files)))


def _is_usable(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    large_enough = status.st_size >= MIN_FILE_BYTES
    return stat.S_ISREG(status.st_mode) and large_enough and os.access(path, os.R_OK)
