"""Guest memory by address: the map, and what a device may and may not reach by message."""

import errno
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.vfio_user.access import DmaAccess
from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.dma import AtDevice, DmaFault, DmaMemory, DmaRegion
from sync.gateway.engine.job_runner import Answer
from sync.gateway.errors import DeviceRefused, LayoutUnaligned
from sync.vfio_user.protocol import (
    HEADER,
    Capabilities,
    Command,
    DmaMap,
    DmaUnmap,
    Version,
    VfioUserError,
    encode_message,
)
from tests.sync.gateway.conftest import Bench

PAGE = 4096
RW, R, W = 3, 1, 2


def _memfd(size: int) -> int:
    number = os.memfd_create("ram")
    os.ftruncate(number, size)
    return number


@pytest.fixture
def memory() -> Iterator[DmaMemory]:
    """0x1000-0x3000 read and write, 0x3000-0x4000 (right behind it) in another file, 0x8000-0x9000
    read only, 0xa000-0xb000 write only, 0xc000-0xd000 without a descriptor."""
    memory = DmaMemory()
    rows = [
        (0x1000, 2 * PAGE, RW, PAGE),
        (0x3000, PAGE, RW, 0),
        (0x8000, PAGE, R, 0),
        (0xA000, PAGE, W, 0),
        (0xC000, PAGE, RW, None),
    ]
    for address, size, flags, offset in rows:
        fd = None if offset is None else _memfd(offset + size)
        region = memory.add(DmaMap(flags, offset or 0, address, size), fd)
        region.at_device = AtDevice.MESSAGE
    yield memory
    memory.close()


def _errno(action: Callable[[], object]) -> int:
    with pytest.raises(DmaFault) as caught:
        action()
    return caught.value.errno


def file_of(region: DmaRegion) -> int:
    assert region.descriptor is not None
    return region.descriptor


def test_an_access_may_span_adjacent_regions(memory: DmaMemory) -> None:
    memory.write(0x2FFC, b"left" + b"right")
    assert memory.read(0x2FFC, 9) == b"leftright"
    first, second = memory.regions[:2]
    assert os.pread(file_of(first), 4, PAGE + 2 * PAGE - 4) == b"left"
    assert os.pread(file_of(second), 5, 0) == b"right"


def test_i9_nothing_outside_of_the_map_is_reached(memory: DmaMemory) -> None:
    for address, count in [(0, 4), (0xFFE, 4), (0x3FFE, 4), (0x7FFF, 1), ((1 << 64) - 4, 4)]:
        assert _errno(partial(memory.read, address, count)) == errno.EFAULT
        assert _errno(partial(memory.write, address, bytes(count))) == errno.EFAULT


def test_i9_a_write_that_fails_half_way_writes_nothing(memory: DmaMemory) -> None:
    assert _errno(lambda: memory.write(0x3FFC, b"overflow")) == errno.EFAULT
    assert memory.read(0x3FFC, 4) == bytes(4)


def test_i9_the_permissions_of_the_vmm_hold(memory: DmaMemory) -> None:
    assert memory.read(0x8000, 4) == bytes(4)
    assert _errno(lambda: memory.write(0x8000, b"x")) == errno.EACCES
    memory.write(0xA000, b"x")
    assert _errno(lambda: memory.read(0xA000, 1)) == errno.EACCES


def test_i4_a_region_that_the_device_does_not_know_is_not_there_for_it(memory: DmaMemory) -> None:
    memory.regions[0].at_device = AtDevice.NOT
    assert _errno(lambda: memory.read(0x1000, 1)) == errno.EFAULT


def test_a_file_that_is_too_short_is_refused(memory: DmaMemory) -> None:
    fd = _memfd(PAGE)
    request = DmaMap(RW, PAGE, 0x20000, PAGE)
    assert _errno(lambda: memory.add(request, fd)) == errno.EINVAL
    os.close(fd)


def test_a_file_that_shrank_since_is_an_error_and_no_sigbus(memory: DmaMemory) -> None:
    region = memory.regions[1]
    os.ftruncate(file_of(region), 0)
    assert _errno(lambda: memory.read(0x3000, 1)) == errno.EFAULT


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8), st.booleans()), max_size=30))
@settings(deadline=None)
def test_the_map_holds_what_was_added_and_never_overlaps(
    steps: list[tuple[int, int, bool]],
) -> None:
    memory = DmaMemory()
    model: dict[int, int] = {}
    for page, pages, add in steps:
        address, size = page * PAGE, pages * PAGE
        overlaps = any(a < address + size and address < a + s for a, s in model.items())
        if add and not overlaps:
            memory.add(DmaMap(RW, 0, address, size), None)
            model[address] = size
        elif add:
            request = DmaMap(RW, 0, address, size)
            assert _errno(partial(memory.add, request, None)) == errno.EEXIST
        elif model.get(address) == size:
            memory.remove(memory.exactly(address, size))
            del model[address]
        else:
            assert _errno(partial(memory.exactly, address, size)) == errno.ENOENT
        assert [(r.address, r.request.size) for r in memory.regions] == sorted(model.items())


def test_the_flat_page_space_is_the_regions_with_a_descriptor_in_order(memory: DmaMemory) -> None:
    flat = memory.flat()
    assert [(r.iova, r.length // PAGE, r.first_page) for r in flat] == [
        (0x1000, 2, 0),
        (0x3000, 1, 2),
        (0x8000, 1, 3),
        (0xA000, 1, 4),
    ]
    assert [r.writable for r in flat] == [True, True, False, True]
    fd = _memfd(2 * PAGE)
    memory.add(DmaMap(RW, 512, 0x20000, PAGE), fd)
    with pytest.raises(LayoutUnaligned):
        memory.flat()


# --- by message ---


def _access(bench: Bench, command: int, address: int, count: int, data: bytes = b"") -> int:
    return bench.dma(command, struct.pack("<QQ", address, count) + data)[0]


def test_dma_by_message_is_answered_from_our_own_mapping(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, 4 * PAGE)
    os.pwrite(fd, b"guest", 100)
    error, body = bench.dma(Command.DMA_READ, DmaAccess(0x10064, 5).pack())
    assert (error, DmaAccess.unpack(body).data) == (0, b"guest")
    assert _access(bench, Command.DMA_WRITE, 0x10FFE, 4, b"over") == 0
    assert os.pread(fd, 4, 0xFFE) == b"over"
    assert bench.to_vmm[-1][0][:4] == struct.pack("<HH", 1, Command.DMA_MAP), "the VMM saw none"
    os.close(fd)


@pytest.mark.parametrize(
    ("address", "count", "carried", "expected"),
    [
        (0x10000, 0, 0, errno.EINVAL),
        (0x10000, 4, 3, errno.EINVAL),
        (0x10000, 4, 5, errno.EINVAL),
        (0x10000, (1 << 20) + 1, 0, errno.EINVAL),
        (0x10000, 1 << 63, 0, errno.EINVAL),
        ((1 << 64) - 2, 4, 4, errno.EINVAL),
        (0x0, 4, 4, errno.EFAULT),
        (0x10FFE, 4, 4, errno.EFAULT),
        (0x20000, 4, 4, errno.EACCES),
    ],
)
def test_i9_hostile_dma_writes_are_refused_and_leave_no_trace(
    make_bench: Callable[..., Bench], address: int, count: int, carried: int, expected: int
) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, PAGE), bench.share(0x20000, PAGE, flags=R)]
    assert _access(bench, Command.DMA_WRITE, address, count, b"\xff" * carried) == expected
    for fd in fds:
        assert os.pread(fd, PAGE, 0) == bytes(PAGE)
        os.close(fd)


@given(st.binary(max_size=64), st.sampled_from([Command.DMA_READ, Command.DMA_WRITE, 3, 77]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i9_any_bytes_from_the_device_are_answered_with_an_error_or_executed(
    make_bench: Callable[..., Bench], body: bytes, command: int
) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    error, _ = bench.dma(command, body)
    assert error in (0, errno.EINVAL, errno.EFAULT, errno.ENOTSUP)
    os.close(fd)
    bench.close()


def test_a_region_without_a_descriptor_is_the_vmms_to_answer(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    bench.share(0x10000, PAGE, fd=False)
    replies: list[bytes] = []
    message = encode_message(500, Command.DMA_READ, DmaAccess(0x10000, 4).pack())
    relay = bench.link.relay
    for _ in range(2):
        relay.from_twin(
            500,
            Command.DMA_READ,
            0,
            memoryview(bytearray(message)),
            lambda data, fds: replies.append(bytes(data)),
        )
    asked = [message for message, _ in bench.to_vmm[-2:]]
    assert [sent[2:] for sent in asked] == [message[2:]] * 2
    ids = [HEADER.unpack_from(sent)[0] for sent in asked]
    assert len(set(ids)) == 2, "the device used one id twice, the VMM must not see that"
    for number in reversed(ids):
        reply = encode_message(
            number, Command.DMA_READ, DmaAccess(0x10000, 4, b"data").pack(), reply=True
        )
        relay.from_vmm(number, Command.DMA_READ, 1, 0, memoryview(bytearray(reply)), [])
    assert [HEADER.unpack_from(reply)[0] for reply in replies] == [500, 500]
    assert replies[0][16:] == DmaAccess(0x10000, 4, b"data").pack()


@pytest.mark.parametrize("command", [Command.DMA_READ, Command.DMA_WRITE])
@pytest.mark.parametrize("refused_at", [None, 0, 2])
def test_a_vmm_gets_pieces_of_the_size_that_it_takes(
    make_bench: Callable[..., Bench], command: int, refused_at: int | None
) -> None:
    """The device was offered more than the VMM that came later takes."""
    bench = make_bench()
    bench.share(0x10000, PAGE, fd=False)
    link, memory = bench.link, bytearray(range(256)) * 16
    link.attach_vmm(bench._to_vmm, Version(capabilities=Capabilities(max_data_xfer_size=48)))
    assert link.service.vmm_max_bytes == 48
    data = bytes(reversed(range(200))) if command == Command.DMA_WRITE else b""
    replies: list[bytes] = []
    message = encode_message(500, command, struct.pack("<QQ", 0x10010, 200) + data)
    del bench.to_vmm[:]
    link.relay.from_twin(
        500, command, 0, memoryview(bytearray(message)), lambda m, fds: replies.append(bytes(m))
    )
    answered = 0
    while not replies:
        asked, _ = bench.to_vmm[answered]
        number = HEADER.unpack_from(asked)[0]
        address, count = struct.unpack_from("<QQ", asked, 16)
        assert 0 < count <= 48
        failed = answered == refused_at
        body = struct.pack("<QQ", address, count)
        at = address - 0x10000
        if command == Command.DMA_WRITE:
            memory[at : at + count] = asked[32:]
        else:
            body += memory[at : at + count]
        number_of_error = errno.EFAULT if failed else 0
        reply = encode_message(
            number, command, b"" if failed else body, reply=True, error=number_of_error
        )
        flags = HEADER.unpack_from(reply)[3]
        link.relay.from_vmm(number, command, flags, 0, memoryview(bytearray(reply)), [])
        answered += 1
    (reply,) = replies
    message_id, _, _, flags, error = HEADER.unpack_from(reply)
    assert message_id == 500
    if refused_at is not None:
        assert (error, answered) == (errno.EFAULT, refused_at + 1)
        return
    assert answered == 5 and not flags & 0x20
    if command == Command.DMA_WRITE:
        assert memory[16:216] == data
    else:
        assert reply[32:] == memory[16:216]


def test_an_errno_that_c_does_not_have_is_told_as_a_number() -> None:
    for number in (1 << 31, (1 << 32) - 1):
        assert str(number) in str(VfioUserError(number))
        with pytest.raises(DeviceRefused, match=str(number)):
            Answer(number).expect("it")


def test_regions_without_a_descriptor_do_not_change_the_map_that_is_tracked(
    make_bench: Callable[..., Bench],
) -> None:
    """A guest that reads an option ROM or switches memory decoding makes and unmakes them."""
    bench = make_bench()
    os.close(bench.share(0x10000, PAGE))
    memory = bench.link.memory
    before = memory.generation
    bench.share(0xE0000000, PAGE, fd=False)
    assert memory.generation == before
    unmap = DmaUnmap(0, 0xE0000000, PAGE).pack()
    assert bench.ask(Command.DMA_UNMAP, unmap)[0] == 0
    assert memory.generation == before
    bench.device.refuse[Command.DMA_MAP] = errno.ENOMEM
    fd = _memfd(PAGE)
    assert bench.ask(Command.DMA_MAP, DmaMap(3, 0, 0x40000, PAGE).pack(), fds=(fd,))[0]
    assert memory.generation == before, "nothing came of it"
    bench.device.refuse.clear()
    assert bench.ask(Command.DMA_MAP, DmaMap(3, 0, 0x40000, PAGE).pack(), fds=(fd,))[0] == 0
    os.close(fd)
    assert memory.generation == before + 1
    assert bench.ask(Command.DMA_UNMAP, DmaUnmap(0, 0x40000, PAGE).pack())[0] == 0
    assert memory.generation == before + 2


def test_i1_a_write_by_message_is_marked_after_the_copy(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark that comes before the copy can be taken by a reader that then misses the data."""
    bench = make_bench()
    fd = bench.share(0x10000, 4 * PAGE)
    bitmap = DirtyBitmap(bench.link.memory.flat())
    bench.link.track(bitmap)
    order: list[str] = []
    mark, write = bitmap.mark, bench.link.memory.write

    def mark_noted(*arguments: Any) -> None:
        order.append("mark")
        mark(*arguments)

    def write_noted(*arguments: Any) -> None:
        order.append("copy")
        write(*arguments)

    monkeypatch.setattr(bitmap, "mark", mark_noted)
    monkeypatch.setattr(bench.link.memory, "write", write_noted)
    assert _access(bench, Command.DMA_WRITE, 0x11FFF, 2, b"ab") == 0
    assert order == ["copy", "mark"]
    assert os.pread(bitmap.descriptor, 1, 0) == b"\x06"
    assert _access(bench, Command.DMA_READ, 0x10000, 2) == 0
    assert os.pread(bitmap.descriptor, 1, 0) == b"\x06", "a read dirties nothing"
    os.close(fd)
