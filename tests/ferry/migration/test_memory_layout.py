"""The target finds the source's pages in its own RAM, whatever part of it is in the DMA map."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.errors import Mismatch, PeerProtocolError
from ferry.migration.memory_layout import MemoryLayout, same_pages
from sync.memory import MemoryRegion

PAGE = 4096
MIB = 1 << 20


@pytest.fixture(scope="module")
def files() -> Iterator[tuple[int, int]]:
    descriptors = (os.memfd_create("low"), os.memfd_create("high"))
    for descriptor, size in zip(descriptors, (4 * MIB, 8 * MIB), strict=True):
        os.ftruncate(descriptor, size)
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def region(iova: int, length: int, offset: int, fd: int) -> MemoryRegion:
    return MemoryRegion(iova, length, offset, True, fd, PAGE)


def test_a_target_whose_firmware_has_not_run(files: tuple[int, int]) -> None:
    low, _ = files
    booted = [
        region(0, 0xC3000, 0, low),
        region(0xE8000, 0x8000, 0xE8000, low),
        region(MIB, 3 * MIB, MIB, low),
    ]
    fresh = [region(0, 0xC0000, 0, low), region(MIB, 3 * MIB, MIB, low)]
    assert same_pages(MemoryLayout.of(booted), fresh) == booted


@pytest.mark.parametrize("change", [(0, 0xC0000, PAGE), (MIB, 3 * MIB, 0), (0x2000, PAGE, 0x3000)])
def test_ram_in_another_place_is_refused(
    files: tuple[int, int], change: tuple[int, int, int]
) -> None:
    low, _ = files
    source = [region(0, 0xC3000, 0, low), region(MIB, 3 * MIB, MIB, low)]
    with pytest.raises(Mismatch, match="start the VMM with the same memory"):
        same_pages(MemoryLayout.of(source), [region(*change, low)])


def test_ram_of_another_size_is_refused(files: tuple[int, int]) -> None:
    low, high = files
    layout = MemoryLayout.of([region(0, MIB, 0, low)])
    with pytest.raises(Mismatch):
        same_pages(layout, [region(0, MIB, 0, high)])


@given(st.data())
def test_the_same_ram_is_found_page_by_page(files: tuple[int, int], data: st.DataObject) -> None:
    """Oracle: a table from page to (file, page of the file)."""

    def draw(fits: bool) -> dict[int, tuple[int, int]]:
        shift = 0 if fits else 1
        table = {}
        for page in data.draw(st.sets(st.integers(0, 40))):
            file = int(page >= 20)
            table[page] = (files[file], page - 20 * file + shift)
        # Both files are there from the start, so that their numbers mean the same.
        return table | {0: (files[0], shift), 20: (files[1], shift)}

    def regions(table: dict[int, tuple[int, int]]) -> list[MemoryRegion]:
        return [region(p * PAGE, PAGE, o * PAGE, fd) for p, (fd, o) in sorted(table.items())]

    fits = data.draw(st.booleans())
    source, target = draw(True), draw(fits)
    layout = MemoryLayout.of(regions(source))
    if fits:
        assert same_pages(layout, regions(target)) == regions(source)
    else:
        with pytest.raises(Mismatch):
            same_pages(layout, regions(target))


def test_it_arrives_as_it_was_sent(files: tuple[int, int]) -> None:
    layout = MemoryLayout.of([region(0, MIB, 0, files[0]), region(MIB, MIB, PAGE, files[1])])
    assert MemoryLayout.from_rows(*layout.rows()) == layout


@pytest.mark.parametrize(
    "rows",
    [
        [[0, MIB, 1, 0]],
        [[0, MIB, 0, 4 * MIB]],
        [[0, 0, 0, 0]],
        [[1, PAGE, 0, 0]],
        [[0, 2 * PAGE, 0, 0], [PAGE, PAGE, 0, 0]],
    ],
)
def test_i9_regions_outside_their_file_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(PeerProtocolError):
        MemoryLayout.from_rows([[4 * MIB, PAGE]], rows)
