"""Writes the cpio format that Linux reads as an initramfs.

Owns the bytes of the archive and nothing of what is in it. Source: Linux,
Documentation/driver-api/early-userspace/buffer-format.rst ("newc"): each entry is a header of
fourteen numbers, the path, the content, each padded to four bytes:

    070701 ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize 0
    path NUL pad   content pad

The same entries always make the same bytes: owner root, time 0, inodes counted up.
"""

import stat
from pathlib import PurePosixPath

from lab.qemu.errors import GuestImageError

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
MAX_FILE_BYTES = 0xFFFFFFFF
"""The size field has eight hexadecimal digits."""


class CpioArchive:
    """Collects entries in order; folders above an entry are made as they are needed."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._paths: set[str] = set()

    def __contains__(self, path: str) -> bool:
        return _relative(path) in self._paths

    def add_folder(self, path: str, mode: int = 0o755) -> None:
        """A folder; nothing happens when it is there already."""
        name = _relative(path)
        if name and name not in self._paths:
            self._add(name, stat.S_IFDIR | mode)

    def add_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """A regular file. Raises `GuestImageError` for a path that is there already."""
        self._add(_relative(path), stat.S_IFREG | mode, content)

    def add_link(self, path: str, target: str) -> None:
        """A symbolic link to `target`, which is not checked."""
        self._add(_relative(path), stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(_relative(path), stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive. Entries may still be added; another call includes them."""
        return bytes(self._data) + self._entry(TRAILER, 0, b"", (0, 0), inode=0)

    def _add(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        if not name or name in self._paths or name == TRAILER:
            raise GuestImageError(f"{name or '/'} cannot be put into the initramfs twice")
        if len(content) > MAX_FILE_BYTES:
            raise GuestImageError(f"{name} is too large for an initramfs")
        parent = str(PurePosixPath(name).parent)
        if parent != ".":
            self.add_folder(parent)
        self._paths.add(name)
        self._data += self._entry(name, mode, content, device, inode=len(self._paths))

    @staticmethod
    def _entry(
        name: str, mode: int, content: bytes, device: tuple[int, int], *, inode: int
    ) -> bytes:
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(path), 0)
        header = MAGIC + b"".join(b"%08X" % number for number in numbers) + path
        return header + b"\0" * (-len(header) % 4) + content + b"\0" * (-len(content) % 4)


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if ".." in parts or "\0" in path:
        raise GuestImageError(f"{path!r} is not a path inside the initramfs")
    return "/".join(part for part in parts if part != "/")
