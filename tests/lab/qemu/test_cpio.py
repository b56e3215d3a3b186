"""The archive is read back by a reader that knows only the kernel's description of the format."""

import stat
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.qemu.cpio import CpioArchive
from lab.qemu.errors import GuestImageError


@dataclass
class Entry:
    name: str
    mode: int
    links: int
    inode: int
    device: tuple[int, int]
    content: bytes


def read_newc(data: bytes) -> list[Entry]:
    """buffer-format.rst: header, name, padding, content, padding; TRAILER!!! ends it."""
    entries: list[Any] = []
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        ino, mode, uid, gid, nlink, mtime, size, _, _, major, minor, name_size, check = fields
        assert (uid, gid, mtime, check) == (0, 0, 0, 0)
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = -(-(at + 110 + name_size) // 4) * 4
        content = data[start : start + size]
        assert len(content) == size
        at = -(-(start + size) // 4) * 4
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return entries
        entries.append(Entry(name[:-1].decode(), mode, nlink, ino, (major, minor), content))


names = st.lists(
    st.text("abcXYZ.-_é", min_size=1, max_size=6).filter(lambda part: part not in (".", "..")),
    min_size=1,
    max_size=4,
).map("/".join)


@given(st.dictionaries(names, st.binary(max_size=40), max_size=12))
def test_files_come_back_with_their_folders_before_them(files: dict[str, bytes]) -> None:
    archive = CpioArchive()
    taken: dict[str, bytes] = {}
    for name, content in files.items():
        parents = [name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1)]
        below = any(other.startswith(name + "/") for other in taken)
        if below or any(parent in taken for parent in parents):
            continue
        archive.add_file(name, content, 0o640)
        taken[name] = content

    entries = read_newc(archive.finish())

    regular = {e.name: e for e in entries if stat.S_ISREG(e.mode)}
    assert {name: e.content for name, e in regular.items()} == taken
    assert all(stat.S_IMODE(e.mode) == 0o640 and e.links == 1 for e in regular.values())
    assert len({e.inode for e in entries}) == len(entries) == len({e.name for e in entries})
    seen: set[str] = set()
    for entry in entries:
        parent = entry.name.rpartition("/")[0]
        assert not parent or parent in seen
        if stat.S_ISDIR(entry.mode):
            seen.add(entry.name)


def test_links_devices_and_folders_keep_their_kind() -> None:
    archive = CpioArchive()
    archive.add_folder("/run", 0o1777)
    archive.add_link("sbin/init", "/init")
    archive.add_character_device("dev/console", 5, 1)
    entries = {entry.name: entry for entry in read_newc(archive.finish())}
    assert entries["run"].mode == stat.S_IFDIR | 0o1777
    assert entries["run"].links == 2
    assert stat.S_ISLNK(entries["sbin/init"].mode)
    assert entries["sbin/init"].content == b"/init"
    assert entries["dev/console"].mode == stat.S_IFCHR | 0o600
    assert entries["dev/console"].device == (5, 1)


def test_the_same_entries_make_the_same_bytes() -> None:
    def build() -> bytes:
        archive = CpioArchive()
        archive.add_file("a/b", b"content")
        archive.add_folder("c")
        return archive.finish()

    assert build() == build()


def test_an_archive_may_grow_after_it_was_finished() -> None:
    archive = CpioArchive()
    archive.add_file("a", b"1")
    assert [e.name for e in read_newc(archive.finish())] == ["a"]
    archive.add_file("b", b"2")
    assert [e.name for e in read_newc(archive.finish())] == ["a", "b"]
    assert "/b" in archive
    assert "c" not in archive


@pytest.mark.parametrize("path", ["../etc/passwd", "a/../b", "a\0b", "", "/", "TRAILER!!!"])
def test_a_path_that_the_kernel_would_misread_is_refused(path: str) -> None:
    with pytest.raises(GuestImageError):
        CpioArchive().add_file(path, b"")


def test_a_path_is_used_once() -> None:
    archive = CpioArchive()
    archive.add_file("init", b"")
    with pytest.raises(GuestImageError, match="init"):
        archive.add_link("/init", "elsewhere")
