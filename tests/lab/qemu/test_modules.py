import gzip
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.qemu.errors import GuestImageError
from lab.qemu.modules import load_order, module_name, parse_dependencies, read_module, read_order

DEP = """\
kernel/fs/mbcache.ko.xz:
kernel/fs/jbd2/jbd2.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2/jbd2.ko.xz kernel/fs/mbcache.ko.xz
kernel/arch/x86/crypto/crc32c-intel.ko.xz:

"""


def test_a_module_comes_behind_all_it_needs() -> None:
    order = load_order(["ext4", "crc32c_intel"], parse_dependencies(DEP))
    assert order.index("kernel/fs/ext4/ext4.ko.xz") == 3
    assert order[4] == "kernel/arch/x86/crypto/crc32c-intel.ko.xz"
    assert len(order) == 5


def test_what_is_built_in_is_not_loaded() -> None:
    builtin = ["kernel/drivers/virtio/virtio_pci.ko"]
    assert load_order(["virtio-pci"], parse_dependencies(DEP), builtin) == []


def test_an_unknown_module_is_refused_by_name() -> None:
    with pytest.raises(GuestImageError, match="no module e1000"):
        load_order(["e1000"], parse_dependencies(DEP))


def test_a_module_that_is_needed_but_not_listed_is_refused() -> None:
    with pytest.raises(GuestImageError, match=r"b\.ko"):
        load_order(["a"], {"a.ko": ["b.ko"]})


def test_a_cycle_is_refused() -> None:
    with pytest.raises(GuestImageError, match="cycle"):
        load_order(["a"], {"a.ko": ["b.ko"], "b.ko": ["a.ko"]})


@pytest.mark.parametrize("line", ["no colon", ": needs nothing"])
def test_a_line_that_makes_no_sense_is_refused(line: str) -> None:
    with pytest.raises(GuestImageError):
        parse_dependencies(line)


@given(st.data())
def test_any_order_satisfies_every_dependency_and_loads_nothing_else(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    # Modules only need ones of a smaller number, so there is no cycle.
    needs = {
        i: data.draw(st.sets(st.integers(0, i - 1), max_size=4)) if i else set()
        for i in range(count)
    }
    asked = data.draw(st.lists(st.integers(0, count - 1), max_size=5))
    reached: set[int] = set()
    frontier = set(asked)
    while frontier:
        reached |= frontier
        frontier = {j for i in frontier for j in needs[i]} - reached

    order = load_order(
        [f"m{i}" for i in asked],
        {f"d/m{i}.ko": [f"d/m{j}.ko" for j in sorted(needs[i])] for i in needs},
    )

    loaded = [int(path[3:-3]) for path in order]
    assert sorted(loaded) == sorted(reached)
    assert all(loaded.index(j) < loaded.index(i) for i in loaded for j in needs[i])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("kernel/a/virtio_blk.ko.xz", "virtio_blk"),
        ("crc32c-intel.ko", "crc32c_intel"),
        ("x/y.ko.zst", "y"),
    ],
)
def test_module_names(path: str, name: str) -> None:
    assert module_name(path) == name


def test_modules_are_uncompressed(tmp_path: Path) -> None:
    content = b"\x7fELF module"
    (tmp_path / "a.ko").write_bytes(content)
    (tmp_path / "a.ko.xz").write_bytes(lzma.compress(content))
    (tmp_path / "a.ko.gz").write_bytes(gzip.compress(content))
    assert {read_module(path) for path in tmp_path.iterdir()} == {content}


@pytest.mark.parametrize("name", ["a.ko.xz", "a.ko.gz", "a.ko.zst", "missing.ko"])
def test_a_damaged_or_unknown_module_is_refused(tmp_path: Path, name: str) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"not compressed at all")
    with pytest.raises(GuestImageError, match=name):
        read_module(tmp_path / name)


def test_a_folder_without_lists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match="list of modules"):
        read_order(tmp_path, ["ext4"])
