"""The DMA map: what can be reached, what is absent, what is a fault."""

import os
from collections.abc import Iterator

import pytest

from lab.devices.dirty_log import DirtyLog
from lab.devices.memory import MAX_ABSENT_RANGES, GuestMemory, MemoryAbsent, MemoryFault
from sync.errors import SyncError
from sync.vfio_user.protocol import Disconnected, DmaFlags, DmaMap, VfioUserError

PAGE = 4096
READ, WRITE = DmaFlags.READ, DmaFlags.WRITE


class Messages:
    """A client that answers messages from a plain array at 1 MiB."""

    base = 1 << 20

    def __init__(self) -> None:
        self.bytes = bytearray(16 * PAGE)
        self.error: SyncError | None = None

    def read(self, address: int, count: int) -> bytes:
        if self.error:
            raise self.error
        return bytes(self.bytes[address - self.base : address - self.base + count])

    def write(self, address: int, data: bytes) -> None:
        if self.error:
            raise self.error
        self.bytes[address - self.base : address - self.base + len(data)] = data


@pytest.fixture
def messages() -> Messages:
    return Messages()


@pytest.fixture
def memory(messages: Messages) -> Iterator[GuestMemory]:
    memory = GuestMemory()
    memory.attach(messages)
    yield memory
    memory.unmap_all()


def memfd(size: int = 16 * PAGE, content: bytes = b"") -> int:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    return fd


def add(
    memory: GuestMemory,
    address: int,
    size: int,
    *,
    flags: DmaFlags = READ | WRITE,
    offset: int = 0,
    fd: int | None = None,
) -> None:
    memory.map(DmaMap(flags, offset, address, size), fd)


def test_ranges_go_over_adjacent_regions_of_both_kinds(
    memory: GuestMemory, messages: Messages
) -> None:
    add(memory, Messages.base - PAGE, PAGE, fd=memfd())
    add(memory, Messages.base, PAGE)
    add(memory, Messages.base + PAGE, PAGE, fd=memfd(), offset=PAGE)
    data = os.urandom(PAGE + 20)
    start = Messages.base - 10
    memory.write(start, data)
    assert memory.read(start, len(data)) == data
    assert messages.bytes[:PAGE] == data[10 : 10 + PAGE]
    kinds = [segment.view is None for segment in memory.segments(start, len(data), READ)]
    assert kinds == [False, True, False]


def test_writes_reach_the_file(memory: GuestMemory) -> None:
    fd = memfd()
    add(memory, 0, 2 * PAGE, fd=os.dup(fd), offset=PAGE)
    memory.write(PAGE - 2, b"abcd")
    memory.write_u16(10, 0x4241)
    assert os.pread(fd, 4, 2 * PAGE - 2) == b"abcd"
    assert os.pread(fd, 2, PAGE + 10) == b"AB"
    assert memory.read_u16(10) == 0x4241
    os.close(fd)


def test_numbers_by_message(memory: GuestMemory, messages: Messages) -> None:
    add(memory, Messages.base, PAGE)
    memory.write_u16(Messages.base + 2, 0x1234)
    assert messages.bytes[2:4] == b"\x34\x12"
    assert memory.read_u16(Messages.base + 2) == 0x1234


def test_a_number_over_the_edge_of_a_region(memory: GuestMemory) -> None:
    add(memory, 0, PAGE, fd=memfd())
    memory.settle()
    with pytest.raises(MemoryFault):
        memory.read_u16(PAGE - 1)
    with pytest.raises(MemoryFault):
        memory.write_u16(PAGE - 1, 1)


def test_access_rights(memory: GuestMemory) -> None:
    add(memory, 0, PAGE, flags=READ, fd=memfd(content=b"rom"))
    add(memory, PAGE, PAGE, flags=WRITE, fd=memfd())
    memory.settle()
    assert memory.read(0, 3) == b"rom"
    with pytest.raises(MemoryFault):
        memory.write(0, b"x")
    memory.write(PAGE, b"x")
    with pytest.raises(MemoryFault):
        memory.read(PAGE, 1)


@pytest.mark.parametrize("address", [PAGE, 5 * PAGE, (1 << 64) - 1])
def test_what_never_was_is_a_fault_once_the_driver_works(memory: GuestMemory, address: int) -> None:
    add(memory, 0, PAGE, fd=memfd())
    with pytest.raises(MemoryAbsent):
        memory.read(address, 1)
    memory.settle()
    with pytest.raises(MemoryFault):
        memory.read(address, 1)
    with pytest.raises(MemoryFault):
        memory.segments(address - 1, 100, READ)


def test_what_was_unmapped_is_absent_until_it_is_mapped_again(memory: GuestMemory) -> None:
    for start in (0, PAGE, 4 * PAGE):
        add(memory, start, PAGE, fd=memfd())
    memory.settle()
    memory.unmap(PAGE, PAGE)
    with pytest.raises(MemoryAbsent):
        memory.segments(PAGE - 1, 2, READ)
    memory.settle()
    with pytest.raises(MemoryAbsent):
        memory.read(2 * PAGE - 1, 1)
    with pytest.raises(MemoryFault):
        memory.read(2 * PAGE, 1)
    add(memory, PAGE, PAGE, fd=memfd(content=b"back"))
    assert memory.read(PAGE, 4) == b"back"
    memory.unmap(PAGE, PAGE)
    memory.forget_absent()
    with pytest.raises(MemoryFault):
        memory.read(PAGE, 1)


def test_a_part_of_what_was_unmapped_may_come_back(memory: GuestMemory) -> None:
    add(memory, 0, PAGE, fd=memfd())
    add(memory, 4 * PAGE, 4 * PAGE, fd=memfd())
    memory.settle()
    memory.unmap(4 * PAGE, 4 * PAGE)
    add(memory, 5 * PAGE, PAGE, fd=memfd())
    assert memory.read(5 * PAGE, 1) == b"\0"
    for address in (4 * PAGE, 6 * PAGE, 8 * PAGE - 1):
        with pytest.raises(MemoryAbsent):
            memory.read(address, 1)


def test_i9_what_is_remembered_of_unmapped_ranges_is_bounded(memory: GuestMemory) -> None:
    add(memory, 1 << 40, PAGE, fd=memfd())
    memory.settle()
    for number in range(MAX_ABSENT_RANGES + 1):
        add(memory, 2 * PAGE * number, PAGE)
        memory.unmap(2 * PAGE * number, PAGE)
    with pytest.raises(MemoryFault):
        memory.read(0, 1)
    with pytest.raises(MemoryAbsent):
        memory.read(2 * PAGE, 1)


def test_nothing_is_touched_without_a_client(memory: GuestMemory) -> None:
    add(memory, 0, PAGE, fd=memfd())
    (segment,) = memory.segments(0, 4, WRITE)
    memory.lose()
    for touch in (
        lambda: memory.read(0, 1),
        lambda: memory.write(0, b"x"),
        lambda: memory.read_u16(0),
        lambda: memory.write_u16(0, 1),
        lambda: memory.write_segment(segment, b"abcd"),
        memory.require_client,
    ):
        with pytest.raises(MemoryAbsent):
            touch()


def test_answers_of_the_client(memory: GuestMemory, messages: Messages) -> None:
    add(memory, Messages.base, PAGE)
    messages.error = VfioUserError(14)
    with pytest.raises(MemoryFault):
        memory.read(Messages.base, 1)
    with pytest.raises(MemoryFault):
        memory.write(Messages.base, b"x")
    messages.error = Disconnected("gone")
    with pytest.raises(MemoryAbsent):
        memory.read(Messages.base, 1)
    with pytest.raises(MemoryAbsent):
        memory.write(Messages.base, b"x")


def test_only_writes_through_an_own_mapping_are_logged(messages: Messages) -> None:
    log = DirtyLog(PAGE)
    memory = GuestMemory(log)
    memory.attach(messages)
    add(memory, 0, 4 * PAGE, fd=memfd())
    add(memory, Messages.base, 4 * PAGE)
    log.start(PAGE, [])
    memory.read(0, PAGE)
    memory.write(PAGE, b"x")
    memory.write_u16(3 * PAGE, 1)
    memory.write(Messages.base, b"x")
    memory.unmap(0, 4 * PAGE)
    assert log.report(0, 1 << 30, PAGE).rstrip(b"\0") == bytes([0b1010])


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 17 * PAGE), (16 * PAGE, PAGE), (1, PAGE), (1 << 62, PAGE)]
)
def test_i9_a_region_beyond_its_file_is_refused(
    memory: GuestMemory, offset: int, size: int
) -> None:
    """It would be a bus error later. The descriptor stays with the caller."""
    fd = memfd()
    with pytest.raises(VfioUserError):
        add(memory, 0, size, offset=offset, fd=fd)
    os.close(fd)


def test_a_descriptor_that_cannot_be_mapped(memory: GuestMemory) -> None:
    reader, writer = os.pipe()
    with pytest.raises(VfioUserError):
        add(memory, 0, PAGE, fd=reader)
    os.close(reader)
    os.close(writer)


def test_unmapping_what_is_not_there(memory: GuestMemory) -> None:
    add(memory, 0, 2 * PAGE, fd=memfd())
    with pytest.raises(VfioUserError):
        memory.unmap(0, PAGE)
