"""DMA by message: the table of regions against plain sets of pages, and accesses from several
threads over both kinds of socket while requests cross them."""

import array
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from errno import EACCES, EEXIST, EFAULT, EINVAL, ENOENT, ENOSPC, ENOTSUP
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab.vfio_user.channel as channel_module
from lab.vfio_user.access import DmaAccess
from lab.vfio_user.client import CLIENT_CAPABILITIES, Client
from lab.vfio_user.dma import DmaTable
from lab.vfio_user.server import Server
from sync.vfio_user.protocol import (
    Capabilities,
    Command,
    Disconnected,
    DmaFlags,
    DmaMap,
    DmaUnmap,
    RegionAccess,
    TwinSocket,
    Version,
    VfioUserError,
    encode_message,
)

PAGE = 4096
WAIT_S = 10.0
TWIN = CLIENT_CAPABILITIES
MAIN = Capabilities(max_msg_fds=16)

page_spans = st.tuples(st.integers(0, 12), st.integers(1, 4))
operations = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "use"]), page_spans, st.integers(0, 3)),
    max_size=30,
)


def errno_of(action: Callable[[], object]) -> int:
    try:
        action()
    except VfioUserError as error:
        return error.errno
    return 0


@given(operations)
def test_the_table_against_sets_of_pages(steps: list[tuple[str, tuple[int, int], int]]) -> None:
    table = DmaTable(4, PAGE)
    model: dict[tuple[int, int], tuple[set[int], int]] = {}

    def remove(region: DmaMap) -> None:
        table.remove(table.find(region.address, region.size))

    for action, (page, count), flags in steps:
        pages = set(range(page, page + count))
        region = DmaMap(flags, 0, page * PAGE, count * PAGE)
        if action == "add":
            expected = 0
            if any(pages & other for other, _ in model.values()):
                expected = EEXIST
            elif len(model) == 4:
                expected = ENOSPC
            assert errno_of(partial(table.check, region)) == expected
            if not expected:
                table.add(region)
                model[page, count] = pages, flags
        elif action == "remove":
            expected = 0 if (page, count) in model else ENOENT
            assert errno_of(partial(remove, region)) == expected
            model.pop((page, count), None)
        else:
            flag = DmaFlags.READ if flags & 1 else DmaFlags.WRITE
            allowed = set().union(*(p for p, f in model.values() if f & flag))
            start, length = page * PAGE + 5, count * PAGE - 9

            def use(start: int = start, length: int = length, flag: DmaFlags = flag) -> None:
                with table.using(start, length, flag):
                    pass

            assert errno_of(use) == (0 if pages <= allowed else EFAULT)
    assert {(r.address // PAGE, r.size // PAGE) for r in table.regions} == set(model)


@pytest.mark.parametrize(("address", "size"), [(1, PAGE), (0, PAGE + 1), (PAGE // 2, PAGE // 2)])
def test_regions_consist_of_whole_pages(address: int, size: int) -> None:
    assert errno_of(lambda: DmaTable(4, PAGE).check(DmaMap(3, 0, address, size))) == EINVAL


class Memory:
    """Client memory at DMA address 0, reached by the device's messages only."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(random.Random(1).randbytes(size))
        self.counts: list[int] = []

    def read(self, address: int, count: int) -> bytes:
        self.counts.append(count)
        if address + count > len(self.data):
            raise VfioUserError(EACCES)
        return bytes(self.data[address : address + count])

    def write(self, address: int, data: bytes) -> None:
        self.counts.append(len(data))
        self.data[address : address + len(data)] = data

    def connect(self, path: Path, capabilities: Capabilities) -> Client:
        return Client(
            path, capabilities=capabilities, on_dma_read=self.read, on_dma_write=self.write
        )


def in_threads(actions: Sequence[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("capabilities", [TWIN, MAIN])
def test_accesses_are_split_by_the_transfer_size(
    served: Path, device: Any, capabilities: Capabilities
) -> None:
    memory = Memory(8 * PAGE)
    small = Capabilities(16, 1000, twin_socket=capabilities.twin_socket)
    with memory.connect(served, small) as client:
        client.dma_map(DmaMap(3, 0, 0, 4 * PAGE))
        client.dma_map(DmaMap(3, 0, 4 * PAGE, 4 * PAGE))
        assert device.dma.read(3 * PAGE, 2500) == memory.data[3 * PAGE : 3 * PAGE + 2500]
        device.dma.write(4 * PAGE - 1000, b"x" * 1500)
        assert memory.data[4 * PAGE - 1000 : 4 * PAGE + 500] == b"x" * 1500
        assert memory.counts == [1000, 1000, 500, 1000, 500]
        assert device.dma.read(0, 0) == b""


@pytest.mark.parametrize("capabilities", [TWIN, MAIN])
def test_what_is_not_mapped_is_not_reached(
    served: Path, device: Any, capabilities: Capabilities
) -> None:
    memory = Memory(PAGE)
    with memory.connect(served, capabilities) as client:
        client.dma_map(DmaMap(DmaFlags.READ, 0, 0, 2 * PAGE))
        assert errno_of(lambda: device.dma.write(0, b"x")) == EFAULT
        assert errno_of(lambda: device.dma.read(2 * PAGE - 1, 2)) == EFAULT
        assert errno_of(lambda: device.dma.read(2 * PAGE, 1)) == EFAULT
        assert memory.counts == []
        assert errno_of(lambda: device.dma.read(PAGE, 1)) == EACCES
        client.dma_unmap(DmaUnmap(0, 0, 2 * PAGE))
        assert errno_of(lambda: device.dma.read(0, 1)) == EFAULT
        assert device.dma.read(5, 0) == b""


@pytest.mark.parametrize("capabilities", [TWIN, MAIN])
def test_threads_of_both_sides_at_once(
    served: Path, device: Any, capabilities: Capabilities
) -> None:
    """Requests and replies of both directions cross; everyone gets the right answer."""
    memory = Memory(16 * PAGE)
    device.registers[:] = random.Random(2).randbytes(4096)
    registers = bytes(device.registers)
    device.on_write = lambda offset, data: device.dma.write(15 * PAGE + offset, data)

    with memory.connect(served, capabilities) as client:
        client.dma_map(DmaMap(3, 0, 0, 16 * PAGE))

        def device_thread(number: int) -> None:
            generator = random.Random(number)
            for step in range(40):
                address = number * PAGE + generator.randrange(PAGE - 64)
                content = bytes([number, step]) * 16
                device.dma.write(address, content)
                assert device.dma.read(address, 32) == content

        def guest_thread(number: int) -> None:
            generator = random.Random(number)
            for step in range(40):
                offset = generator.randrange(2048)
                assert client.region_read(0, offset, 16) == registers[offset : offset + 16]
                # The device answers this write only after DMA of its own.
                client.region_write(0, 2048 + 16 * number, bytes([step]) * 16)

        in_threads([partial(work, n) for work in (device_thread, guest_thread) for n in range(3)])
        for number in range(3):
            start = 15 * PAGE + 2048 + 16 * number
            assert memory.data[start : start + 16] == bytes([39]) * 16


@pytest.mark.parametrize("capabilities", [TWIN, MAIN])
def test_unmapping_waits_for_accesses_under_way(
    served: Path, device: Any, capabilities: Capabilities
) -> None:
    reading, release, unmapping = threading.Event(), threading.Event(), threading.Event()
    order = []

    def slow_read(address: int, count: int) -> bytes:
        reading.set()
        assert release.wait(WAIT_S)
        order.append("answered")
        return bytes(count)

    device.on_unmap = unmapping.set
    with Client(served, capabilities=capabilities, on_dma_read=slow_read) as client:
        client.dma_map(DmaMap(3, 0, 0, PAGE))
        client.dma_map(DmaMap(3, 0, PAGE, PAGE))
        access = threading.Thread(target=device.dma.read, args=(0, 64), daemon=True)
        access.start()
        assert reading.wait(WAIT_S)
        client.dma_unmap(DmaUnmap(0, PAGE, PAGE))
        unmapping.clear()

        def unmap() -> None:
            client.dma_unmap(DmaUnmap(0, 0, PAGE))
            order.append("unmapped")

        unmapper = threading.Thread(target=unmap, daemon=True)
        unmapper.start()
        assert unmapping.wait(WAIT_S)
        # Time for a server that does not wait to give itself away.
        unmapper.join(0.1)
        release.set()
        unmapper.join(WAIT_S)
        access.join(WAIT_S)
    assert order == ["answered", "unmapped"]


def test_a_device_that_drains_its_own_threads_before_it_lets_a_region_go(
    served: Path, device: Any
) -> None:
    """The serving thread waits for a worker, which waits for a reply on the serving thread's
    socket: the worker reads it for itself."""
    memory = Memory(PAGE)
    worker_done = threading.Event()
    start_worker = threading.Event()

    def worker() -> None:
        assert start_worker.wait(WAIT_S)
        for _ in range(10):
            device.dma.read(0, 64)
        worker_done.set()

    def drain() -> None:
        start_worker.set()
        assert worker_done.wait(WAIT_S)

    device.on_unmap = drain
    thread = threading.Thread(target=worker, daemon=True)
    thread.start()
    with memory.connect(served, MAIN) as client:
        client.dma_map(DmaMap(3, 0, 0, PAGE))
        client.dma_unmap(DmaUnmap(0, 0, PAGE))
    thread.join(WAIT_S)
    assert worker_done.is_set()


@pytest.fixture
def crossing_peer(connect_raw: Callable[[], Any], device: Any) -> Any:
    """A raw peer with one page mapped, without twin socket."""
    peer = connect_raw()
    peer.greet()
    assert peer.ask(Command.DMA_MAP, DmaMap(3, 0, 0, PAGE).pack())[0] == 0
    return peer


def start_read(device: Any, outcome: list[object], count: int = 4) -> threading.Thread:
    def access() -> None:
        try:
            outcome.append(device.dma.read(0, count))
        except (Disconnected, VfioUserError) as error:
            outcome.append(error)

    thread = threading.Thread(target=access, daemon=True)
    thread.start()
    return thread


def take_dma_request(peer: Any) -> int:
    """Read the next message, which has to be a DMA request; return its message id."""
    message_id, command, size, _, _ = struct.unpack("<HHIII", peer.exactly(16))
    peer.exactly(size - 16)
    assert command in (Command.DMA_READ, Command.DMA_WRITE)
    return int(message_id)


def test_a_request_that_crosses_the_devices_own(crossing_peer: Any, device: Any) -> None:
    """The client asks, with the same message id, before it answers the device."""
    device.registers[:4] = b"regs"
    outcome: list[object] = []
    thread = start_read(device, outcome)
    message_id = take_dma_request(crossing_peer)
    read = RegionAccess(0, 0, 4)
    crossing_peer.send(encode_message(message_id, Command.REGION_READ, read.pack()))
    expected = encode_message(
        message_id, Command.REGION_READ, RegionAccess(0, 0, 4, b"regs").pack(), reply=True
    )
    assert crossing_peer.exactly(len(expected)) == expected
    answer = DmaAccess(0, 4, b"data").pack()
    crossing_peer.send(encode_message(message_id, Command.DMA_READ, answer, reply=True))
    thread.join(WAIT_S)
    assert outcome == [b"data"]


def test_waiting_threads_learn_that_the_client_has_gone(crossing_peer: Any, device: Any) -> None:
    outcome: list[object] = []
    threads = [start_read(device, outcome) for _ in range(3)]
    for _ in threads:
        take_dma_request(crossing_peer)
    crossing_peer.close()
    for thread in threads:
        thread.join(WAIT_S)
    assert [type(error) for error in outcome] == [Disconnected] * 3
    assert device.gone.wait(WAIT_S)
    with pytest.raises(Disconnected):
        device.dma.read(0, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_is_stopped_from_within_frees_the_devices_threads_first(
    device: Any, tmp_path: Path
) -> None:
    """SystemExit in a device ends the server; a worker that waits for the client must not stay."""
    server = Server(tmp_path / "device.sock", device)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    reading, release = threading.Event(), threading.Event()
    outcome: list[object] = []

    def slow_read(address: int, count: int) -> bytes:
        reading.set()
        release.wait(WAIT_S)
        return bytes(count)

    def stop(offset: int, data: bytes) -> None:
        raise SystemExit

    def drain() -> None:
        worker.join(WAIT_S)
        outcome.append(worker.is_alive())

    device.on_write, device.detached = stop, drain
    serving.start()
    with Client(tmp_path / "device.sock", capabilities=MAIN, on_dma_read=slow_read) as client:
        client.dma_map(DmaMap(3, 0, 0, PAGE))
        worker = start_read(device, outcome)
        assert reading.wait(WAIT_S)
        with pytest.raises(Disconnected):
            client.region_write(0, 0, b"x")
        serving.join(WAIT_S)
        release.set()
    assert [str(item) for item in outcome] == ["the client has gone", "False"]


BAD_REPLIES = [
    DmaAccess(0, 4).pack(),
    DmaAccess(0, 3, b"abc").pack(),
    DmaAccess(0, 5, b"abcde").pack(),
    DmaAccess(8, 4, b"abcd").pack(),
    b"",
    bytes(7),
]


@pytest.mark.parametrize("body", BAD_REPLIES)
def test_i9_a_reply_that_answers_something_else_ends_the_connection(
    crossing_peer: Any, device: Any, body: bytes
) -> None:
    outcome: list[object] = []
    thread = start_read(device, outcome)
    message_id = take_dma_request(crossing_peer)
    crossing_peer.send(encode_message(message_id, Command.DMA_READ, body, reply=True))
    thread.join(WAIT_S)
    assert isinstance(outcome[0], Disconnected)
    assert crossing_peer.at_end()


def test_i9_a_reply_to_another_command_ends_the_connection(crossing_peer: Any, device: Any) -> None:
    outcome: list[object] = []
    thread = start_read(device, outcome)
    message_id = take_dma_request(crossing_peer)
    crossing_peer.send(encode_message(message_id, Command.DMA_WRITE, reply=True))
    thread.join(WAIT_S)
    assert isinstance(outcome[0], Disconnected)


@pytest.mark.parametrize("fds", [(), (0,)])
def test_i9_requests_without_end_instead_of_a_reply_end_the_connection(
    crossing_peer: Any,
    device: Any,
    monkeypatch: pytest.MonkeyPatch,
    open_fds: Callable[[], int],
    fds: tuple[int, ...],
) -> None:
    """While the serving thread is in the device, which waits for the client, requests pile up."""
    before = open_fds()
    monkeypatch.setattr(channel_module, "BACKLOG_BYTES", 1 << 16)
    device.on_write = lambda offset, data: device.dma.read(0, 4)
    crossing_peer.request(Command.REGION_WRITE, RegionAccess(0, 0, 1, b"x").pack())
    take_dma_request(crossing_peer)
    posted = encode_message(1, Command.DEVICE_RESET, no_reply=True) * (1 if fds else 100)
    with pytest.raises(ConnectionError):
        for _ in range(200):
            crossing_peer.send(posted, fds)
    assert device.gone.wait(WAIT_S)
    assert ("reset",) not in device.events
    with Client(crossing_peer.socket.getpeername()):
        assert open_fds() <= before + 1


def test_a_refusal_reaches_the_device(crossing_peer: Any, device: Any) -> None:
    outcome: list[Any] = []
    thread = start_read(device, outcome)
    message_id = take_dma_request(crossing_peer)
    crossing_peer.send(encode_message(message_id, Command.DMA_READ, reply=True, error=EACCES))
    thread.join(WAIT_S)
    assert outcome[0].errno == EACCES
    assert crossing_peer.ask(Command.DEVICE_RESET)[0] == 0


@pytest.fixture
def twin_peer(connect_raw: Callable[[], Any]) -> Iterator[tuple[Any, socket.socket]]:
    """A raw peer with one page mapped, and its twin socket."""
    peer = connect_raw()
    proposal = Version(capabilities=Capabilities(twin_socket=TwinSocket(True))).pack()
    peer.request(Command.VERSION, proposal)
    data, ancillary, _, _ = peer.socket.recvmsg(65536, socket.CMSG_SPACE(4))
    assert Version.unpack(data[16:]).capabilities.twin_socket == TwinSocket(True, 0)
    with socket.socket(fileno=array.array("i", ancillary[0][2])[0]) as twin:
        twin.settimeout(WAIT_S)
        assert peer.ask(Command.DMA_MAP, DmaMap(3, 0, 0, PAGE).pack())[0] == 0
        yield peer, twin


def test_nothing_is_asked_of_a_device_over_the_twin_socket(
    twin_peer: tuple[Any, socket.socket], device: Any
) -> None:
    """Requests there are refused."""
    _, twin = twin_peer
    outcome: list[object] = []
    thread = start_read(device, outcome)
    message_id = int.from_bytes(twin.recv(4096)[:2], "little")
    twin.send(encode_message(5, Command.DEVICE_RESET))
    assert twin.recv(4096) == encode_message(5, Command.DEVICE_RESET, reply=True, error=ENOTSUP)
    answer = DmaAccess(0, 4, b"data").pack()
    twin.send(encode_message(message_id, Command.DMA_READ, answer, reply=True))
    thread.join(WAIT_S)
    assert outcome == [b"data"]


@pytest.mark.parametrize("twin_ends", [True, False])
def test_either_socket_ends_the_other(
    twin_peer: tuple[Any, socket.socket], device: Any, twin_ends: bool
) -> None:
    """A device that waits for its threads when its client goes finds them free to end."""
    peer, twin = twin_peer
    outcome: list[object] = []
    thread = start_read(device, outcome)
    twin.recv(4096)
    ended = threading.Event()

    def drain() -> None:
        thread.join(WAIT_S)
        if not thread.is_alive():
            ended.set()

    device.detached = drain
    (twin if twin_ends else peer.socket).close()
    assert ended.wait(WAIT_S)
    assert [type(error) for error in outcome] == [Disconnected]
    assert not twin_ends or peer.at_end()
