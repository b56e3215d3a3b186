"""RAM: the guest-physical map, bounds, and what counts as written by the CPU."""

import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.guest.errors import RamError
from lab.guest.ram import HIGH_BASE, Ram
from sync.memory import PAGE_BYTES

LOW = 2 << 20
HIGH = 1 << 20
WORD = struct.Struct("<Q")


@pytest.fixture
def ram() -> Iterator[Ram]:
    memory = Ram(LOW, HIGH)
    yield memory
    memory.close()


def test_the_regions_cover_the_memory_but_for_the_hole_of_a_pc(ram: Ram) -> None:
    assert [tuple(region) for region in ram.dma_regions] == [
        (0, 640 << 10, 0),
        (1 << 20, LOW - (1 << 20), 1 << 20),
        (HIGH_BASE, HIGH, LOW),
    ]
    assert ram.n_pages == (LOW + HIGH) // 4096


def test_addresses_on_both_sides_of_the_hole_are_different_memory(ram: Ram) -> None:
    ram.store(LOW - 8, WORD, 1)
    ram.store(HIGH_BASE, WORD, 2)
    assert ram.load(LOW - 8, WORD) == (1,)
    assert ram.load(HIGH_BASE, WORD) == (2,)
    assert list(ram.dirty_indices()) == [LOW // 4096 - 1, LOW // 4096]


@pytest.mark.parametrize(
    ("address", "length"),
    [(-1, 1), (LOW, 1), (LOW - 4, 8), (HIGH_BASE - 1, 1), (HIGH_BASE + HIGH - 4, 8), (1 << 63, 1)],
)
def test_i9_what_is_not_there_cannot_be_touched(ram: Ram, address: int, length: int) -> None:
    with pytest.raises(RamError):
        ram.view(address, length)
    with pytest.raises(RamError):
        ram.write(address, bytes(length))
    assert not ram.dirty_pages()


@pytest.mark.parametrize("page", [(LOW + HIGH) // 4096, 0xFFFFFFFF])
def test_i9_a_page_that_is_not_there_cannot_be_loaded(ram: Ram, page: int) -> None:
    pages = np.array([0, page], np.uint32)
    with pytest.raises(RamError):
        ram.put_pages(pages, np.ones((2, 4096), np.uint8))
    with pytest.raises(RamError):
        ram.zero_pages(pages)
    assert bytes(ram.view(0, 4096)) == bytes(4096)


def test_views_cannot_be_written_to(ram: Ram) -> None:
    with pytest.raises(TypeError):
        ram.view(0, 8)[0] = 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, LOW + HIGH - 1), st.integers(1, 20_000)), min_size=1, max_size=20
    )
)
def test_exactly_the_pages_that_were_written_are_dirty(writes: list[tuple[int, int]]) -> None:
    ram = Ram(LOW, HIGH)
    model = bytearray(LOW + HIGH)
    touched: set[int] = set()
    for number, (offset, length) in enumerate(writes, 1):
        end = LOW if offset < LOW else LOW + HIGH
        length = min(length, end - offset)
        data = bytes([number]) * length
        ram.write(offset if offset < LOW else HIGH_BASE + offset - LOW, data)
        model[offset : offset + length] = data
        touched |= set(range(offset // 4096, (offset + length - 1) // 4096 + 1))
    assert list(ram.dirty_indices()) == sorted(touched)
    assert ram.dirty_pages() == len(touched)
    for page in touched:
        copy = ram.copy_pages(np.array([page], np.uint32))
        assert copy.tobytes() == model[page * 4096 : (page + 1) * 4096]
    ram.clean(ram.dirty_indices())
    assert ram.dirty_pages() == 0
    ram.close()


def test_dirty_pages_can_be_listed_while_the_cpu_marks_more() -> None:
    ram = Ram(16 << 20, 112 << 20)
    done = threading.Event()

    def scribble() -> None:
        page = 0
        while not done.is_set():
            page = (page + 769) % 4096
            ram.write(HIGH_BASE + page * PAGE_BYTES, b"x")
            ram.clean(np.array([4096 + page], np.uint32))

    cpu = threading.Thread(target=scribble)
    cpu.start()
    try:
        for _ in range(3000):
            assert ram.dirty_indices().size <= ram.n_pages
    finally:
        done.set()
        cpu.join()
        ram.close()
